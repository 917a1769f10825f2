"""The same steps on a wire that costs nothing: a replay of the recorded durations. Pure, deterministic.

Each lane goes through its layers in order; the attention device and every expert worker do one thing at a time, first
come first served. Durations are those recorded: what a call shared a batch with pays its part of the batch. With
`wire=True` each block also takes its recorded way out and back, which should give the recorded time again: how far it
does not is the replay's own error, and is reported.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from deploy.trace.blocks import Block
from deploy.trace.intervals import Interval, intersect, subtract, total, union

MOE = ("attention", "pack")


@dataclass(frozen=True, slots=True)
class Work:
    """One stretch of a lane: `before` on the device, then (perhaps) a block with `after` run meanwhile; nanoseconds."""

    before: int
    block: Block | None = None
    after: int = 0


@dataclass(slots=True)
class _Lane:
    work: Sequence[Work]
    place: int = 0
    waits: int = 0  # for the device's `after` part and for each expert


@dataclass(slots=True)
class Replay:
    """State of one replay; `run` is called once."""

    lanes: Sequence[Sequence[Work]]
    wire: bool
    busy: list[Interval] = field(default_factory=list)
    owed: list[Interval] = field(default_factory=list)
    _device_free: int = 0
    _expert_free: dict[int, int] = field(default_factory=dict)
    _events: list[tuple[int, int, int, str, Work | None]] = field(default_factory=list)
    _number: int = 0

    def run(self) -> tuple[int, int]:
        """(length, exposed) in nanoseconds: until every lane is through; idle device time that no expert owes."""
        lanes = [_Lane(work) for work in self.lanes]
        for lane, state in enumerate(lanes):
            if state.work:
                self._at(0, lane, "before")
        end = 0
        while self._events:
            now, _, lane, what, work = heapq.heappop(self._events)
            end = max(end, now)
            state = lanes[lane]
            if what == "before":
                self._on_device(now, lane, state.work[state.place])
            elif what == "posted":
                assert work is not None
                state.waits = self._post(now, lane, work)
            else:
                state.waits -= 1
                if state.waits <= 0:
                    state.place += 1
                    if state.place < len(state.work):
                        self._at(now, lane, "before")
        idle = subtract([(0, end)], union(self.busy))
        return end, total(subtract(idle, union(self.owed)))

    def _on_device(self, now: int, lane: int, work: Work) -> None:
        start = max(now, self._device_free)
        posted = start + work.before
        self._device_free = (
            posted + work.after
        )  # nothing comes between posting and the shared expert
        self.busy.append((start, self._device_free))
        if work.block is not None:
            self._at(posted, lane, "posted", work)
        self._at(self._device_free, lane, "done")

    def _post(self, now: int, lane: int, work: Work) -> int:
        """Send a block out; returns how many ends the lane waits for."""
        block = work.block
        assert block is not None
        parts = block.parts
        out, back = parts["split"], parts["combine"]
        if self.wire:
            out, back = out + parts["wire out"], back + parts["wire back"]
        for call in block.calls:
            cost = (call.end - call.start) // call.shared_by
            start = max(now + out, self._expert_free.get(call.worker, 0))
            self._expert_free[call.worker] = start + cost
            self.owed.append((now + out, start + cost))
            self._at(start + cost + back, lane, "done")
        return len(block.calls) + 1

    def _at(self, when: int, lane: int, what: str, work: Work | None = None) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, lane, what, work))


def lanes_of(found: Sequence[Block], window: Interval, extra: dict[int, int]) -> list[list[Work]]:
    """The work of each lane whose blocks were posted in `window`.

    `extra` is the device time of a lane, nanoseconds, outside its MoE layers (dense layers, head, sampling); it is
    spread over its blocks.
    """
    lanes: dict[int, list[Block]] = {}
    for block in found:
        if window[0] <= block.posted < window[1]:
            lanes.setdefault(block.lane, []).append(block)
    return [
        [
            Work(
                sum(b.parts[p] for p in MOE) + extra.get(lane, 0) // len(blocks),
                b,
                b.parts["shared"],
            )
            for b in blocks
        ]
        for lane, blocks in sorted(lanes.items())
    ]


def outside_moe(
    busy: Sequence[tuple[int, Interval]], blocks: Sequence[Block], window: Interval
) -> dict[int, int]:
    """Lane -> its device time in `window` that is no part of a block; `busy` are (lane, span) of everything it did."""
    result: dict[int, int] = {}
    for lane in {lane for lane, _ in busy}:
        everything = intersect(union(span for at, span in busy if at == lane), [window])
        mine = [b for b in blocks if b.lane == lane and window[0] <= b.posted < window[1]]
        known = sum(b.parts[p] for b in mine for p in (*MOE, "shared"))
        result[lane] = max(0, total(everything) - known)
    return result
