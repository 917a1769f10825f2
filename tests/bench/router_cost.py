"""What routing costs: CPU per message and per row from EP16 to EP256, and operations per layer with R rails at EP256.

    python -m tests.bench.router_cost [--out FILE] [--graph FILE]

CPU: real clusters of eight experts per node, a router each; the routers' CPU time while sixteen streams decode, over
the messages and the rows that they handled. Operations: the same services in one process, 32 nodes, 256 experts, an
attention worker on each node that sends one block of 128 rows per layer; every router counts what it receives and
posts.
"""

import argparse
import asyncio
import json
import logging
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from common.ids import Role
from common.model.small import small_config, write_tokenizer
from common.model.writer import write_random
from tests.bench.cluster import cpu_s
from tests.bench.environment import facts
from tests.e2e.harness import Cluster
from tests.inproc_cluster import inproc_cluster

SIZES, PER_NODE = (16, 64, 256), 8
STREAMS, TOKENS, WARM_TOKENS = 16, 16, 2
EXPERTS, RAILS, NODES, ROWS = 256, (1, 8), 32, 128
COLOURS = {"cpu_us_per_message": "#1f77b4", "cpu_us_per_row": "#d62728"}
LABELS = {"cpu_us_per_message": "per message", "cpu_us_per_row": "per row handed on"}
WIDTH, HEIGHT, MARGIN = 640, 320, 48


def totals(cluster: Cluster) -> dict[str, float]:
    """Of all routers together: messages, rows handed to experts or other nodes, blocks, CPU microseconds."""
    sums: Counter[str] = Counter()
    for counters in cluster.counters("router"):
        links = [both["out"] for both in counters["links"].values()]
        sums["messages"] += counters["messages_in"] + counters["messages_out"]
        sums["rows"] += counters["rows_to_experts"] + sum(link["rows"] for link in links)
        sums["blocks"] += counters["blocks"]
    pids = [p["pid"] for p in cluster.processes if p["role"] == "router"]
    return dict(sums) | {"cpu_us": 1e6 * sum(map(cpu_s, pids))}


def cpu_cost(experts: int) -> dict[str, Any]:
    """A cluster of `experts` expert workers under sixteen streams."""
    shape = ("--ep", experts, "--nodes", experts // PER_NODE, "--attention", 2)
    prompts = [[1 + (7 * i + j) % 97 for j in range(8)] for i in range(STREAMS)]
    with Cluster(*map(str, shape), start_deadline_s=240) as cluster:
        cluster.generate(prompts, WARM_TOKENS)
        before = totals(cluster)
        cluster.generate(prompts, TOKENS)
        after = totals(cluster)
    spent = {name: after[name] - before[name] for name in after}
    return {
        "experts": experts, "nodes": experts // PER_NODE, "messages": int(spent["messages"]),
        "cpu_us_per_message": round(spent["cpu_us"] / spent["messages"], 1),
        "cpu_us_per_row": round(spent["cpu_us"] / spent["rows"], 1),
        "rows_per_message": round(spent["rows"] / spent["messages"], 2),
        "operations_per_block": round(spent["messages"] / spent["blocks"], 1),
    }  # fmt: skip


def one_layer_model(directory: Path) -> Path:
    """EXPERTS experts behind V3's gate in the one layer that has any: every layer costs routers the same."""
    write_random(directory, small_config(EXPERTS) | {"num_hidden_layers": 2})
    write_tokenizer(directory)
    return directory


def operations(rails: int) -> dict[str, Any]:
    """Messages received and posted by each router for one layer in which every node sends one block."""

    async def main(run_dir: Path) -> list[int]:
        layout = {
            "ep": EXPERTS,
            "nodes": NODES,
            "attention": NODES,
            "routers": rails,
            "wire": "fp8",
        }
        async with inproc_cluster(one_layer_model(run_dir / "model"), run_dir, **layout) as cluster:
            generator = torch.Generator().manual_seed(5)
            texts = torch.randint(0, 256, (NODES, ROWS), generator=generator).tolist()
            await asyncio.gather(
                *(cluster.logits(text, worker=node) for node, text in enumerate(texts))
            )
            routers = [router.flow.counters.operations for router in cluster.of(Role.ROUTER)]
            return [count for counts in routers for count in counts.values()]

    with tempfile.TemporaryDirectory(prefix="atoll-rails-") as directory, torch.inference_mode():
        counts = asyncio.run(main(Path(directory)))
    return {
        "rails": rails, "per_router_and_layer": round(sum(counts) / len(counts), 1),
        "busiest": max(counts), "per_node_and_layer": round(rails * sum(counts) / len(counts), 1),
    }  # fmt: skip


def graph(rows: list[dict[str, Any]]) -> str:
    """Both costs over the number of experts (each step four times the last), as SVG."""
    top = 10 * (1 + int(max(row[key] for row in rows for key in COLOURS)) // 10)

    def x(i: int) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * i / (len(rows) - 1)

    def y(value: float) -> float:
        return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * value / top

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="24">CPU microseconds of routers</text>',
    ]
    for i in range(6):
        tick = top * i / 5
        line = f'x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y(tick)}" y2="{y(tick)}"'
        parts.append(
            f'<line {line} stroke="#dddddd"/><text x="12" y="{y(tick) + 4}">{tick:g}</text>'
        )
    for i, row in enumerate(rows):
        label = f'x="{x(i)}" y="{HEIGHT - MARGIN + 20}" text-anchor="middle"'
        parts.append(f"<text {label}>EP{row['experts']}</text>")
    for place, (key, colour) in enumerate(COLOURS.items()):
        points = " ".join(f"{x(i):.1f},{y(row[key]):.1f}" for i, row in enumerate(rows))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<text x="460" y="{24 + 16 * place}" fill="{colour}">{LABELS[key]}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="F", help="write the result as JSON")
    parser.add_argument("--graph", type=Path, metavar="F", help="draw it, SVG")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # hundreds of links that close at the end
    rails: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for found, measure, sizes in ((rows, cpu_cost, SIZES), (rails, operations, RAILS)):
        for size in sizes:
            found.append(measure(size))
            print(found[-1], flush=True)
            if arguments.out is not None:  # what was measured is not lost with what comes after
                command = "python -m tests.bench.router_cost"
                result = facts() | {"command": command, "rows": rows, "rails": rails}
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        if arguments.graph is not None:
            arguments.graph.write_text(graph(rows))


if __name__ == "__main__":
    main()
