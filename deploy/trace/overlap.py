"""How much of the communication is hidden: what the attention device did while blocks were out. Pure.

Exposed communication is the time in which the attention device idles although no expert owes it compute, over the
length of the window. An expert owes compute from a block's arrival to the end of its computation, in so far as that
expert computes at all meanwhile. So waiting for experts that are busy is theirs; everything else that the device waits
for (wires, routers, the event loops of all processes) is communication.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deploy.trace.blocks import Block
from deploy.trace.intervals import Interval, intersect, subtract, total, union
from deploy.trace.spans import Process, Span

BUSY = frozenset({"begin", "attention", "pack", "shared", "add", "head", "sample"})


@dataclass(frozen=True, slots=True)
class Overlap:
    """One attention worker over `steps` steps; nanoseconds. `idle` = `owed` (experts compute) + `exposed`."""

    attention: int
    lanes: int
    steps: int
    window: Interval
    busy: int
    owed: int
    exposed: int

    @property
    def length(self) -> int:
        """Of the window."""
        return self.window[1] - self.window[0]

    @property
    def exposed_percent(self) -> float:
        """Exposed communication in percent of the window."""
        return 100 * self.exposed / self.length

    @property
    def step_us(self) -> float:
        """Mean length of a step of one lane."""
        return self.length * self.lanes / self.steps / 1e3


def last_steps(process: Process, count: int) -> list[Span]:
    """The last `count` decode steps of an attention worker over all lanes, without the first step of each lane."""
    steps = [s for s in process.spans if s.name == "step"]
    seen: set[int] = set()
    warm = []
    for step in sorted(steps, key=lambda s: s.start):
        if step.lane in seen and not step.layer:  # layer: number of prompt rows
            warm.append(step)
        seen.add(step.lane)
    return warm[-count:]


def window_of(steps: Sequence[Span]) -> Interval:
    """Where every lane of `steps` is at work: from the last lane's first start to the first lane's last end."""
    lanes = {s.lane for s in steps}
    start = max(min(s.start for s in steps if s.lane == lane) for lane in lanes)
    end = min(max(s.end for s in steps if s.lane == lane) for lane in lanes)
    return (start, end) if end > start else (steps[0].start, steps[-1].end)


def overlap(
    attention: Process, experts: Iterable[Process], found: Iterable[Block], steps: Sequence[Span]
) -> Overlap:
    """Split the window of `steps` into busy, owed and exposed time."""
    window = window_of(steps)
    busy = union((s.start, s.end) for s in attention.spans if s.name in BUSY)
    idle = subtract([window], busy)
    owing: list[Interval] = []
    waits: dict[int, list[Interval]] = {}
    for block in found:
        if block.attention == attention.index:
            for call in block.calls:
                waits.setdefault(call.worker, []).append((call.arrived, call.end))
    for expert in experts:
        computing = union((s.start, s.end) for s in expert.spans if s.name == "compute")
        owing += intersect(computing, union(waits.get(expert.index, [])))
    exposed = subtract(idle, union(owing))
    inside = sum(
        (min(s.end, window[1]) - max(s.start, window[0])) / (s.end - s.start)
        for s in steps
        if s.end > window[0] and s.start < window[1]
    )
    return Overlap(
        attention.index, len({s.lane for s in steps}), max(1, round(inside)), window,
        window[1] - window[0] - total(idle), total(idle) - total(exposed), total(exposed),
    )  # fmt: skip
