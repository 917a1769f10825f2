"""What a process says of itself and of the processes behind it, for /cluster, /metrics and readiness. Pure."""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from common.ids import ProcessId


class State(StrEnum):
    """`LOST` is said of others only: configured, but not connected now."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """One entry of `processes`. `counters` are numbers since the process started; a nested table is for people."""

    role: str
    index: int
    node: int
    pid: int
    state: State
    counters: dict[str, Any] = field(default_factory=dict)
    missing: str = ""  # why the process is not ready, one sentence

    @classmethod
    def of(
        cls,
        process: ProcessId,
        *,
        node: int,
        pid: int,
        state: State,
        counters: dict[str, Any] | None = None,
        missing: str = "",
    ) -> "ProcessStatus":
        """Build an entry from a process's name."""
        return cls(str(process.role), process.index, node, pid, state, counters or {}, missing)

    def to_json(self) -> dict[str, Any]:
        """The entry as it stands in a `status` frame."""
        return asdict(self)


def status_frame(request_id: int | None, processes: list[dict[str, Any]]) -> dict[str, Any]:
    """A `status` control frame; `request_id` None when it is pushed."""
    return {"type": "status", "id": request_id, "processes": processes}
