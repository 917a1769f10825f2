"""One MoE layer of one micro-batch as the sum of its parts, along the way of the answer that came last. Pure.

From posting a block to its answer every nanosecond belongs to one part:

    pack ──► wire out ──► split (source router, and the expert's router) ──► wire out ──► queue ──► compute
         ──► wire back ──► combine (the expert's router, and the source router) ──► wire back ──► answer

On a GPU the device packs, and `pack` is the time until the process has seen it and posted (span "post").

The critical expert is found backwards: the message after which the source router answered, and on another node the
one after which that router did. Wires include whatever a message waited for in a busy process.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from deploy.trace.spans import Process, Span

PARTS = (
    "attention", "pack", "split", "wire out", "queue", "compute", "wire back", "combine", "shared",
)  # fmt: skip
ROUND_TRIP = ("split", "wire out", "queue", "compute", "wire back", "combine")


@dataclass(frozen=True, slots=True)
class Call:
    """One expert worker's share of a block; `shared_by` calls were computed in one batch."""

    worker: int
    arrived: int
    start: int
    end: int
    shared_by: int


@dataclass(frozen=True, slots=True)
class Block:
    """Times are nanoseconds; `parts` by name of PARTS. `attention` is the attention worker's index."""

    block: int
    layer: int
    lane: int
    attention: int
    rows: int
    posted: int
    answered: int
    parts: dict[str, int]
    calls: tuple[Call, ...]


def blocks(processes: Sequence[Process]) -> list[Block]:
    """Every block whose whole way was recorded, in the order of posting; others (cut by the ring) are left out."""
    routers: dict[int, dict[int, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for p in processes:
        if p.role == "router":
            for block, spans in _by_block(p).items():
                routers[p.node][block] += spans
    experts = {p.index: (p.node, _by_block(p)) for p in processes if p.role == "expert"}
    calls: dict[int, list[Call]] = defaultdict(list)
    for worker, (_, spans_of) in experts.items():
        for block, spans in spans_of.items():
            named = {s.name: s for s in spans}
            if "queue" in named and "compute" in named:
                queue, compute = named["queue"], named["compute"]
                calls[block].append(
                    Call(worker, queue.start, compute.start, compute.end, max(1, compute.count))
                )
    found = []
    for p in processes:
        if p.role == "attention":
            for block, spans in _by_block(p).items():
                named = {s.name: s for s in spans}
                source = routers.get(p.node, {}).get(block, [])
                joined = _join(p.index, named, source, routers, calls.get(block, []))
                if joined is not None:
                    found.append(joined)
    return sorted(found, key=lambda b: b.posted)


def _by_block(process: Process) -> dict[int, list[Span]]:
    result: dict[int, list[Span]] = defaultdict(list)
    for span in process.spans:
        if span.block:
            result[span.block].append(span)
    return result


def _join(
    attention: int, mine: dict[str, Span], source: list[Span],
    routers: dict[int, dict[int, list[Span]]], calls: list[Call],
) -> Block | None:  # fmt: skip
    pack = mine.get("pack", mine.get("post"))
    if pack is None or not {"attention", "answer"} <= mine.keys():
        return None
    split = [s for s in source if s.name == "dispatch"]
    arrivals = [s for s in source if s.name in ("expert_out", "partial")]
    if not split or not arrivals:
        return None
    last = max(arrivals, key=lambda s: s.end)
    splits, combines = split[0].end - split[0].start, last.end - last.start
    if last.name == "partial":
        there = routers.get(last.count, {}).get(pack.block, [])
        relay = [s for s in there if s.name == "relay"]
        outs = [s for s in there if s.name == "expert_out"]
        if not relay or not outs:
            return None
        last = max(outs, key=lambda s: s.end)
        splits += relay[0].end - relay[0].start
        combines += last.end - last.start
    critical = next((c for c in calls if c.worker == last.count), None)
    if critical is None:
        return None
    answer = mine["answer"]
    shared = mine.get("shared")
    parts = {
        "attention": mine["attention"].end - mine["attention"].start,
        "pack": pack.end - pack.start,
        "split": splits,
        "wire out": critical.arrived - pack.end - splits,
        "queue": critical.start - critical.arrived,
        "compute": critical.end - critical.start,
        "wire back": answer.end - critical.end - combines,
        "combine": combines,
        "shared": 0 if shared is None else shared.end - shared.start,
    }
    return Block(
        pack.block, pack.layer, pack.lane, attention, pack.count, pack.end, answer.end, parts,
        tuple(sorted(calls, key=lambda c: c.worker)),
    )  # fmt: skip


def by_layer(found: Iterable[Block]) -> dict[int, dict[str, float]]:
    """Medians of every part per layer, microseconds; `round trip` is the median of the whole, posting to answer."""
    groups: dict[int, list[Block]] = defaultdict(list)
    for block in found:
        groups[block.layer].append(block)
    return {
        layer: {part: median(b.parts[part] for b in group) / 1e3 for part in PARTS}
        | {"round trip": median(b.answered - b.posted for b in group) / 1e3}
        for layer, group in sorted(groups.items())
    }
