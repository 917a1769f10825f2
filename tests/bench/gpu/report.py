"""The GPU section of README, from tests/bench/results/gpu."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
PARTS = ("pack", "split", "wire out", "queue", "compute", "wire back", "combine")


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def where(facts: dict[str, Any]) -> str:
    """On what, and when."""
    cards = facts["cards"]
    return (
        f"{len(cards)} x {cards[0]}, driver {facts['driver']}, torch {facts['torch']}, ucxx {facts['ucxx']}, "
        f"commit {facts['commit'][:7]}, {facts['date']}"
    )


def gpu() -> str:
    """Hop, round trip beside NCCL, and the reference width."""
    return "\n\n".join([hop(), round_trip(), serving()])


def hop() -> str:
    facts = read("hop")
    lines = [
        "| bytes of a block | one way, us | 1 in flight, GB/s | 8 in flight, GB/s | 32 in flight, GB/s |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['bytes']} | {r['one_way_us']} | {r['gb_per_s_1']} | {r['gb_per_s_8']} | {r['gb_per_s_32']} |"
        for r in facts["rows"]
    ]
    return "\n".join(
        [*lines, "", f"`python -m tests.bench.gpu.hop`: GPU to GPU over NVLink, {where(facts)}."]
    )


def round_trip() -> str:
    """One router, and several that divide blocks, beside NCCL and the bare loop."""
    one, several, nccl, bare = (
        read(name) for name in ("round_trip", "routers", "nccl", "bare_loop")
    )
    layers = {r["tokens"]: r["layer_us"] for r in nccl["rows"]}
    floor = {(r["tokens"], r["in_flight"]): r for r in bare["rows"]}
    lines = [
        "| tokens | blocks in flight | routers | round trip, us | without the expert, us | us per block "
        "| bare loop: round trip, per block, us | NCCL, synchronous: us per layer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [(r, facts["routers"]) for facts in (one, several) for r in facts["rows"]]
    for r, routers in sorted(rows, key=lambda row: (row[0]["tokens"], row[0]["in_flight"], row[1])):
        least = floor.get((r["tokens"], r["in_flight"]))
        beside = "" if least is None else f"{least['latency_us']}, {least['per_block_us']}"
        lines.append(
            f"| {r['tokens']} | {r['in_flight']} | {routers} | {r['latency_us']} | {r['without_expert_us']} "
            f"| {r['per_block_us']} | {beside} | {layers.get(r['tokens'], '')} |"
        )
    return "\n".join(
        [
            *lines, "",
            f"`python -m tests.bench.gpu.round_trip [--routers {several['routers']} --divide blocks]`, "
            f"{one['experts']} experts of hidden width {one['hidden']}, every token to all of them; "
            "`python -m tests.bench.gpu.bare_loop`: the same way, experts that only convert their rows, none of our "
            f"protocol; `python -m tests.bench.gpu.nccl`; all in one call. {where(one)}.",
        ]
    )  # fmt: skip


def serving() -> str:
    """Tokens per second of whole models."""
    lines = [
        "| model | micro-batches | routers | concurrency | tokens/s | tokens/s while decoding "
        "| time per output token, ms | exposed communication, % of the step | on a free wire, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for file in ("serving_m1", "serving_m3", "serving_reference", "serving_demo"):
        facts = read(file)
        name = "demo model"
        if file != "serving_demo":
            name = f"{facts['model']}, {facts['layers']} layers"
            notes.append(
                f"{name}: {facts['workers']} expert workers with 32 experts of each layer, "
                f"{facts['distinct']} of them distinct"
            )
        for r in facts["rows"]:
            seen = r.get("trace", {}).get("overlap", [{}])[0]
            stalled = r["tpot_ms"] <= 0  # a short run took longer than a long one
            decoding = "-" if stalled else round(r["decode_tokens_per_s"])
            at = f" at {r['commit']}" if "commit" in r else ""
            lines.append(
                f"| {name}{at} | {r['microbatches']} | {facts['routers']} | {r['concurrency']} "
                f"| {r['tokens_per_s']:.0f} | {decoding} | {'-' if stalled else r['tpot_ms']} "
                f"| {seen.get('exposed_percent', '')} | {seen.get('free_wire_exposed_percent', '')} |"
            )
    return "\n".join(
        [
            *lines, "",
            f"`python -m tests.bench.gpu.serving`, full width. {'; '.join(dict.fromkeys(notes))}; demo model: 16 "
            f"expert workers. {where(read('serving_m3'))}; demo model at {read('serving_demo')['commit'][:7]}.",
        ]
    )  # fmt: skip
