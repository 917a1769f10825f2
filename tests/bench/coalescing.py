"""How often blocks could ride together: same layer, same destination, other attention workers of one node, soon after.

    python -m tests.bench.coalescing [--out FILE]

A real cluster of two nodes with two attention workers each, sixteen streams decoding. From the routers' traces: of the
blocks that a router got from its own node (each goes to the one other node), the share that another attention worker's
block of the same layer preceded or followed by less than a deadline.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config import local_cluster
from common.model.small import write_small_model
from common.obs.trace import DIRECTORY
from tests.bench.environment import facts
from tests.e2e.harness import Cluster

DEADLINES_US = (50, 200, 500, 1000, 5000)
STREAMS, TOKENS, NODES, ATTENTION = 16, 48, 2, 4


def record(directory: Path) -> list[list[Any]]:
    """The DISPATCH spans of every router."""
    run_dir = directory / "run"
    config = local_cluster(
        write_small_model(directory / "model"), ep=16, nodes=NODES, attention=ATTENTION, experts_per_gpu=1,
        microbatches=2, wire="fp8", port=0, run_dir=run_dir,
    )  # fmt: skip
    config = replace(config, cluster=replace(config.cluster, trace_events=1 << 16))
    path = directory / "cluster.toml"
    path.write_text(config.to_toml())
    prompts = [[1 + (7 * i + j) % 97 for j in range(8)] for i in range(STREAMS)]
    with Cluster("--cluster", str(path), "--local", "--run-dir", str(run_dir)) as cluster:
        cluster.generate(prompts, TOKENS)
    files = [json.loads(f.read_text()) for f in (run_dir / DIRECTORY).glob("router-*.json")]
    return [[s for s in f["spans"] if s[0] == "dispatch"] for f in files]


def together(routers: list[list[Any]]) -> dict[str, Any]:
    """Shares of blocks, in percent, by deadline."""
    found, blocks = dict.fromkeys(DEADLINES_US, 0), 0
    for spans in routers:
        by_layer: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for _, block, layer, _, start, *_ in spans:
            by_layer[layer].append((start, block >> 48))  # the high bits: which attention worker
        for arrivals in by_layer.values():
            for start, worker in arrivals:
                blocks += 1
                gap = min((abs(t - start) for t, w in arrivals if w != worker), default=1 << 62)
                for deadline in DEADLINES_US:
                    found[deadline] += gap <= 1000 * deadline
    return {
        "blocks": blocks,
        "percent": {str(us): round(100 * count / blocks, 2) for us, count in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="F", help="write the result as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="atoll-coalescing-") as directory:
        result = together(record(Path(directory)))
    result |= facts() | {"command": "python -m tests.bench.coalescing"}
    print(json.dumps(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
