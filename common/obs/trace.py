"""Where the time of a block goes: spans of one process in a bounded ring, written to a file when the process stops.

Off by default (`cluster.trace_events` 0): then a service holds None and each place that could record tests that. A span
is (name, block, layer, micro-batch, start, end, count); its times are nanoseconds of the monotonic clock, which all
processes of a host share. What spans of several processes mean together is `deploy.trace`.

    attention  begin attention pack shared add head sample   count: rows; `answer` is an instant; on a GPU attention,
               shared and head are the device's times, and `post` instead of `pack` goes from its end to the posting
    router     dispatch relay   from arrival until all is posted, count: the node
               expert_out partial  likewise, the last one with the sum and the answer; count: expert worker or node
    expert     queue compute    count: calls that were computed together
"""

import json
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.config import ClusterConfig, ProcessSpec

DIRECTORY = "trace"  # in the run directory
# name, block, layer, micro-batch, start, end, count; start and end may be what `resolve` turns into nanoseconds
Span = tuple[str, int, int, int, Any, Any, int]


class Recorder:
    """The last `capacity` spans of one process; older ones are dropped and counted."""

    def __init__(self, spec: ProcessSpec, capacity: int, *, path: Path | None = None) -> None:
        """`path` is the file that `write` makes; without one nothing is written."""
        self.spec = spec
        self.spans: deque[Span] = deque(maxlen=capacity)
        self.num_recorded = 0
        self.resolve: Callable[[Any], int] = int  # of times that are no nanoseconds yet
        self._path = path

    def __repr__(self) -> str:
        return f"<Recorder {self.spec.id} [{len(self.spans)} spans | {self.num_dropped} dropped]>"

    @property
    def num_dropped(self) -> int:
        """Spans that the ring had no room for any more."""
        return self.num_recorded - len(self.spans)

    def span(
        self, name: str, block: int, layer: int, lane: int, start: Any, end: Any, count: int = 0  # noqa: ANN401
    ) -> None:  # fmt: skip
        """Record one span. 0.2 us; the test when nothing records is below 10 ns (Python 3.11, Intel Xeon)."""
        self.num_recorded += 1
        self.spans.append((name, block, layer, lane, start, end, count))

    def to_json(self) -> dict[str, Any]:
        """What `write` writes."""
        return {
            "process": str(self.spec.id), "node": self.spec.node, "host": host_id(), "pid": os.getpid(),
            "dropped": self.num_dropped,
            "spans": [(*s[:4], self.resolve(s[4]), self.resolve(s[5]), s[6]) for s in self.spans],
        }  # fmt: skip

    def write(self) -> None:
        """Write `<run_dir>/trace/<process>.json`, whole or not at all."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.to_json()))
        partial.replace(self._path)


def open_recorder(config: ClusterConfig, spec: ProcessSpec) -> Recorder | None:
    """The recorder of a process, None unless the cluster records."""
    capacity = config.cluster.trace_events
    if not capacity:
        return None
    path = config.cluster.run_dir / DIRECTORY / f"{spec.id}.json"
    return Recorder(spec, capacity, path=path)


def host_id() -> str:
    """Names the running kernel: processes with the same one share a monotonic clock."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
