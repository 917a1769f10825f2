"""Names for processes: a role and an index within that role."""

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """What a process does. The order is the order in which a cluster starts."""

    ROUTER = "router"
    EXPERT = "expert"
    ATTENTION = "attention"
    GATEWAY = "gateway"


@dataclass(frozen=True, slots=True)
class ProcessId:
    """One process of a cluster, e.g. ``expert-3``; ``index`` counts within the role over all nodes."""

    role: Role
    index: int

    def __str__(self) -> str:
        return f"{self.role}-{self.index}"
