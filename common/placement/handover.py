"""How a running cluster goes from one plan to the next: what is said, and what the gateway makes of it. Pure.

Control frames (JSON objects, `type` says which):

    gateway -> router    {"type": "prepare" | "commit", "plan": {...}}   {"type": "abort"}   {"type": "retire"}
    router -> gateway    {"type": "placement", ...Report}   when the link opens, and whenever something changed
    router -> expert     {"type": "hold", "id": n, "experts": [[layer, expert], ...]}   all that it shall hold
    expert -> router     {"type": "held", "id": n, "experts": [[layer, expert, hash], ...], "error": ""}
    router -> router     {"type": "serves", "plans": [[epoch, digest], ...]}
    router -> attention  {"type": "epoch", "epoch": e}   the epoch in force: stamp new blocks with it
    attention -> gateway {"type": "epochs", "oldest": e}   no block of an earlier epoch is, or will be, on its way

The gateway keeps nothing on disk. `next_frames` looks at what every router reports and says what each must be told; it
is asked again at every report, so a lost frame, a restarted router and a restarted gateway are all the same case. A
plan is decided when the first router has put it in force (and written that down): from then on all others follow. Until
then a candidate that somebody cannot serve is dropped by all, and the plan in force has never ceased to be.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import WireError
from common.placement.plan import Plan


@dataclass(frozen=True, slots=True)
class Report:
    """What a router serves. `plan` is in force; `candidate` (an epoch) is prepared, `ready` or impossible (`error`)."""

    plan: Plan
    served: tuple[int, ...]
    candidate: int | None = None
    ready: bool = False
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """The frame."""
        return {
            "type": "placement", "plan": self.plan.to_json(), "served": self.served,
            "candidate": self.candidate, "ready": self.ready, "error": self.error,
        }  # fmt: skip

    @classmethod
    def from_json(cls, frame: dict[str, Any], plan: Plan) -> "Report":
        """`plan` is the frame's, which is long and rarely new. Raises WireError for what no router sends."""
        try:
            candidate = frame["candidate"]
            return cls(
                plan, tuple(map(int, frame["served"])), None if candidate is None else int(candidate),
                bool(frame["ready"]), str(frame["error"]),
            )  # fmt: skip
        except (LookupError, TypeError, ValueError) as exc:
            raise WireError(f"malformed placement frame: {exc}") from exc


@dataclass(frozen=True, slots=True)
class Step:
    """What to tell each router now: the frame's type, and the plan that goes with it."""

    frames: dict[int, tuple[str, Plan | None]]
    failed: str = ""  # why the goal cannot be reached, one sentence
    decided: bool = False  # the goal is in force somewhere, so it will be everywhere
    done: bool = False  # nothing is left to do


def next_frames(
    reports: Mapping[int, Report | None], oldest: Mapping[int, int | None], goal: Plan | None
) -> Step:
    """`reports` by router (None: not heard of since its link opened, or not connected).

    `oldest` by attention worker that is connected; `goal` is the plan that a rebalance under way wants.
    """
    known = {router: report for router, report in reports.items() if report is not None}
    epoch = max((report.plan.epoch for report in known.values()), default=-1)
    frames: dict[int, tuple[str, Plan | None]] = {}
    decided = goal is not None and epoch >= goal.epoch
    failed = "" if goal is None or decided else _failure(reports, goal)
    in_force = next((r.plan for r in known.values() if r.plan.epoch == epoch), None)
    is_whole = len(known) == len(reports)
    for router, report in known.items():
        if report.plan.epoch < epoch:
            frames[router] = ("commit", in_force)
        elif report.candidate is not None and (goal is None or decided or failed):
            if is_whole:  # else the one that is missing may have put it in force
                frames[router] = ("abort", None)
        elif goal is not None and not decided and not failed and report.candidate != goal.epoch:
            frames[router] = ("prepare", goal)
    if frames or not is_whole:
        return Step(frames, failed, decided)
    if goal is not None and not decided and not failed:
        ready = all(report.ready for report in known.values())
        return Step(dict.fromkeys(known, ("commit", goal)) if ready else {})
    behind = any(number is None or number < epoch for number in oldest.values())
    old = [router for router, report in known.items() if min(report.served) < epoch]
    if not behind:
        frames = dict.fromkeys(old, ("retire", None))
    return Step(frames, failed, decided, done=not old)


def _failure(reports: Mapping[int, Report | None], goal: Plan) -> str:
    for router, report in reports.items():
        if report is None:
            return f"router-{router} is not connected"
        if report.candidate == goal.epoch and report.error:
            return report.error
    return ""
