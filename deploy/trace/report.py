"""What a trace says, as numbers and as text. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from deploy.trace.blocks import PARTS, Block, blocks, by_layer
from deploy.trace.overlap import BUSY, Overlap, last_steps, overlap
from deploy.trace.replay import Replay, lanes_of, outside_moe
from deploy.trace.spans import Process

_COLUMNS = (*PARTS, "round trip")


@dataclass(frozen=True, slots=True)
class Bound:
    """One attention worker's steps replayed; milliseconds. `again` has the recorded wire: the replay's own error."""

    recorded_ms: float
    again_ms: float
    free_wire_ms: float
    free_wire_exposed_percent: float


@dataclass(frozen=True, slots=True)
class Report:
    """Per layer medians in microseconds over the blocks of the steps looked at; overlap per attention worker."""

    num_blocks: int
    layers: dict[int, dict[str, float]]
    all_layers: dict[str, float]
    overlaps: tuple[Overlap, ...]
    bounds: tuple[Bound, ...]
    dropped: int

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, for a file."""
        rows = [
            {
                "attention": o.attention, "microbatches": o.lanes, "steps": o.steps,
                "step_ms": round(o.step_us / 1e3, 3), "busy_percent": _percent(o.busy, o),
                "experts_owe_percent": _percent(o.owed, o),
                "exposed_percent": round(o.exposed_percent, 2),
                "free_wire_exposed_percent": round(b.free_wire_exposed_percent, 2),
                "free_wire_speedup": round(b.recorded_ms / b.free_wire_ms, 3),
                "replay_over_recorded": round(b.again_ms / b.recorded_ms, 3),
            }
            for o, b in zip(self.overlaps, self.bounds, strict=True)
        ]  # fmt: skip
        medians = {part: round(us, 1) for part, us in self.all_layers.items()}
        layers = {
            str(layer): {part: round(us, 1) for part, us in row.items()}
            for layer, row in self.layers.items()
        }
        return {"blocks": self.num_blocks, "median_us": medians, "layers": layers, "overlap": rows}

    def text(self) -> str:
        """A table per layer and a line per attention worker."""
        lines = ["layer " + "".join(f"{name:>11}" for name in _COLUMNS) + "   (medians, us)"]
        table = {**{str(layer): row for layer, row in self.layers.items()}, "all": self.all_layers}
        for name, row in table.items():
            lines.append(f"{name:>5} " + "".join(f"{row[part]:11.1f}" for part in _COLUMNS))
        for o, b in zip(self.overlaps, self.bounds, strict=True):
            lines.append(
                f"attention-{o.attention}: {o.lanes} micro-batches, {o.steps} steps of {o.step_us / 1e3:.2f} ms; "
                f"device busy {_percent(o.busy, o)} %, waiting for experts that compute {_percent(o.owed, o)} %, "
                f"exposed communication {o.exposed_percent:.1f} %"
            )
            lines.append(
                f"  replayed on a wire that costs nothing: {b.recorded_ms / b.free_wire_ms:.2f}x as fast, exposed "
                f"{b.free_wire_exposed_percent:.1f} % (replayed with the recorded wire: "
                f"{b.again_ms / b.recorded_ms:.2f} of the recorded time)"
            )
        if self.dropped:
            lines.append(f"{self.dropped} older spans did not fit the rings (--events)")
        return "\n".join(lines)


def make_report(processes: Sequence[Process], *, steps: int) -> Report:
    """Look at the last `steps` decode steps of every attention worker. Raises ValueError when there are none."""
    every = blocks(processes)
    experts = [p for p in processes if p.role == "expert"]
    overlaps, bounds, used = [], [], []
    for p in processes:
        chosen = last_steps(p, steps) if p.role == "attention" else []
        if chosen:
            o = overlap(p, experts, every, chosen)
            mine = [b for b in every if b.attention == p.index]
            overlaps.append(o)
            bounds.append(_bound(p, mine, o))
            used += [b for b in mine if o.window[0] <= b.posted and b.answered <= o.window[1]]
    if not used:
        raise ValueError("the trace holds no whole step")
    return Report(
        len(used), by_layer(used), {part: median(_all(used, part)) for part in _COLUMNS},
        tuple(overlaps), tuple(bounds), sum(p.dropped for p in processes),
    )  # fmt: skip


def _all(used: Sequence[Block], part: str) -> list[float]:
    if part == "round trip":
        return [(b.answered - b.posted) / 1e3 for b in used]
    return [b.parts[part] / 1e3 for b in used]


def _bound(process: Process, mine: Sequence[Block], o: Overlap) -> Bound:
    busy = [(s.lane, (s.start, s.end)) for s in process.spans if s.name in BUSY]
    lanes = lanes_of(mine, o.window, outside_moe(busy, mine, o.window))
    again, _ = Replay(lanes, wire=True).run()
    free, exposed = Replay(lanes, wire=False).run()
    return Bound(o.length / 1e6, again / 1e6, free / 1e6, 100 * exposed / max(1, free))


def _percent(part: int, o: Overlap) -> float:
    return round(100 * part / o.length, 1)
