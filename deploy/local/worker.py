"""What the launcher knows of one worker, and when a dead one is started again."""

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from common.config import ProcessSpec
from common.ids import Role
from deploy.local.output import LinePipe

QUICK_DEATH_S = 2.0  # a death sooner than this after readiness counts as one more failed start
MAX_DELAY_S = 5.0
MAX_FAILED_STARTS = 5  # of one worker before the cluster was ever ready
TAIL_LINES = 20


class WorkerState(StrEnum):
    """`WAITING` is between a death and the next start."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    ENDED = "ended"


@dataclass(slots=True)
class Worker:
    """One process of the cluster over all its lives. Times are the event loop's, in seconds."""

    spec: ProcessSpec
    state: WorkerState = WorkerState.WAITING
    pid: int | None = None
    ready_at: float | None = None
    num_quick_deaths: int = 0
    num_starts: int = 0
    pipe: LinePipe | None = None
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))

    @property
    def name(self) -> str:
        """E.g. expert-3."""
        return str(self.spec.id)

    @property
    def role(self) -> Role:
        """What the process does."""
        return self.spec.id.role

    @property
    def last_words(self) -> str:
        """The last line it wrote, by convention the sentence that says why it ended."""
        return self.tail[-1] if self.tail else f"atoll {self.name}: ended without a word"

    def as_json(self) -> dict[str, object]:
        """Its entry in the ready file."""
        return {
            "role": str(self.role),
            "index": self.spec.id.index,
            "node": self.spec.node,
            "pid": self.pid,
        }

    def spawned(self, pid: int) -> None:
        """It has a process."""
        self.pid = pid
        self.state = WorkerState.STARTING
        self.ready_at = None
        self.num_starts += 1

    def ready(self, now: float) -> None:
        """It said that it is ready."""
        self.state = WorkerState.READY
        self.ready_at = now

    def ended(self, now: float) -> float:
        """Its process is gone; returns the delay in seconds before the next start."""
        quick = self.ready_at is None or now - self.ready_at < QUICK_DEATH_S
        self.num_quick_deaths = self.num_quick_deaths + 1 if quick else 0
        self.pid = None
        self.state = WorkerState.WAITING
        return restart_delay_s(self.num_quick_deaths)


def restart_delay_s(num_quick_deaths: int) -> float:
    """Nothing after a first death, then doubling: one that cannot live must not take the cores of those that do."""
    if num_quick_deaths <= 1:
        return 0.0
    return min(MAX_DELAY_S, 0.1 * 2.0 ** (num_quick_deaths - 2))
