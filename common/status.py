"""What a process says of itself and of the processes behind it, for /cluster, /metrics and readiness. Pure."""

from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from common.ids import ProcessId, Role


class State(StrEnum):
    """`LOST` is said of others only: configured, but not connected now."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(slots=True)
class ProcessStatus:
    """One entry of `processes`; `pid` None when it was never heard of.

    `counters` are numbers since the process started; a nested table is for people.
    """

    role: str
    index: int
    node: int
    pid: int | None
    state: State
    counters: dict[str, Any] = field(default_factory=dict)
    missing: str = ""  # why the process is not ready, one sentence

    @classmethod
    def of(
        cls, process: ProcessId, *, node: int, pid: int | None = None,
        state: State = State.STARTING, counters: dict[str, Any] | None = None, missing: str = "",
    ) -> "ProcessStatus":  # fmt: skip
        """Build an entry from a process's name."""
        return cls(str(process.role), process.index, node, pid, state, counters or {}, missing)

    @property
    def id(self) -> ProcessId:
        """Whose it is."""
        return ProcessId(Role(self.role), self.index)

    def to_json(self) -> dict[str, Any]:
        """The entry as it stands in a `status` frame and in /cluster."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def status_frame(request_id: int | None, processes: list[dict[str, Any]]) -> dict[str, Any]:
    """A `status` control frame; `request_id` None when it is pushed."""
    return {"type": "status", "id": request_id, "processes": processes}
