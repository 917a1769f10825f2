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
        f"commit {facts['commit']}, {facts['date']}"
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
    facts, nccl = read("round_trip"), read("nccl")
    theirs = {r["tokens"]: r for r in nccl["rows"]}
    lines = [
        "| tokens | blocks in flight | round trip, us | of it the expert, us | us per block "
        "| NCCL, synchronous: us per layer |",
        "|---|---|---|---|---|---|",
    ]
    for r in facts["rows"]:
        layer = theirs.get(r["tokens"], {}).get("layer_us", "")
        lines.append(
            f"| {r['tokens']} | {r['in_flight']} | {r['latency_us']} | {r['expert_us']} | {r['per_block_us']} "
            f"| {layer} |"
        )
    parts = facts["parts_us"]
    way = ", ".join(f"{name} {parts[name]:.0f}" for name in PARTS) if parts else ""
    way = f"; medians of a block's way over all these runs, us: {way}" if way else ""
    return "\n".join(
        [
            *lines, "",
            f"`python -m tests.bench.gpu.round_trip`, {facts['experts']} experts of hidden width "
            f"{facts['hidden']}, every token to all of them{way}. "
            f"{where(facts)}. `python -m tests.bench.gpu.nccl`: {where(nccl)}. {rails()}",
        ]
    )  # fmt: skip


def rails() -> str:
    """The same with more routers."""
    facts = read("rails")
    found = [
        f"{r['latency_us']} us with {r['in_flight']} in flight ({r['per_block_us']} per block)"
        for r in facts["rows"]
    ]
    tokens = facts["rows"][0]["tokens"]
    return f"With {facts['routers']} routers (`--routers`), {tokens} tokens: {', '.join(found)}."


def serving() -> str:
    facts = read("serving")
    lines = [
        "| micro-batches | concurrency | tokens/s | tokens/s while decoding | time per output token, ms "
        "| exposed communication, % of the step | on a free wire, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in facts["rows"]:
        seen = r.get("trace", {}).get("overlap", [{}])[0]
        lines.append(
            f"| {r['microbatches']} | {r['concurrency']} | {r['tokens_per_s']:.0f} "
            f"| {r['decode_tokens_per_s']:.0f} | {r['tpot_ms']} | {seen.get('exposed_percent', '')} "
            f"| {seen.get('free_wire_exposed_percent', '')} |"
        )
    commits = sorted({r["commit"] for r in facts["rows"] if "commit" in r})
    earlier = f"; one micro-batch at {', '.join(commits)}" if commits else ""
    return "\n".join(
        [
            *lines, "",
            f"`python -m tests.bench.gpu.serving --trace`: {facts['model']} at full width, {facts['layers']} layers, "
            f"{facts['workers']} expert workers with 32 experts of each layer, {facts['distinct']} of them distinct, "
            f"{where(facts)}{earlier}.",
        ]
    )  # fmt: skip
