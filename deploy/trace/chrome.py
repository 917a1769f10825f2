"""Spans as a Chrome trace (opens in Perfetto and chrome://tracing): one row per process, micro-batches below. Pure.

Format: "Trace Event Format", Google, 2016. Times are microseconds from the first span on.
"""

from collections.abc import Sequence
from typing import Any

from deploy.trace.blocks import Block
from deploy.trace.spans import Process

_ORDER = {"attention": 0, "router": 1, "expert": 2}
_WAITS = frozenset({"queue"})  # may overlap with other spans of the same row


def chrome_trace(processes: Sequence[Process], found: Sequence[Block]) -> dict[str, Any]:
    """The JSON document. A block out at the experts is an arrow from its posting over its computation to its answer."""
    origin = min((s.start for p in processes for s in p.spans), default=0)
    ordered = sorted(processes, key=lambda p: (_ORDER.get(p.role, 9), p.index))
    number = {p.name: i for i, p in enumerate(ordered)}
    events: list[dict[str, Any]] = []
    for pid, p in enumerate(ordered):
        common = {"pid": pid, "tid": 0, "ph": "M"}
        events.append({"name": "process_name", "args": {"name": p.name}, **common})
        events.append({"name": "process_sort_index", "args": {"sort_index": pid}, **common})
        for s in p.spans:
            where = {"pid": pid, "tid": s.lane, "ts": (s.start - origin) / 1e3}
            args = {"block": f"{s.block:x}", "layer": s.layer, "count": s.count}
            if s.name in _WAITS:
                label = {"name": s.name, "cat": "wait", "id": f"{s.block:x}", **where}
                events.append({"ph": "b", "args": args, **label})
                events.append({"ph": "e", **label, "ts": (s.end - origin) / 1e3})
            else:
                events.append(
                    {"name": s.name, "ph": "X", "dur": (s.end - s.start) / 1e3, "args": args} | where
                )  # fmt: skip
    for block in found:
        flow = {"name": "block", "cat": "block", "id": f"{block.block:x}"}
        sender = {"pid": number[f"attention-{block.attention}"], "tid": block.lane}
        events.append({"ph": "s", "ts": (block.posted - origin) / 1e3 - 0.001, **sender, **flow})
        for call in block.calls:
            place = {"pid": number[f"expert-{call.worker}"], "tid": block.lane}
            events.append({"ph": "t", "ts": (call.start - origin) / 1e3, **place, **flow})
        events.append({"ph": "f", "ts": (block.answered - origin) / 1e3, **sender, **flow})
    return {"traceEvents": events, "displayTimeUnit": "ms"}
