"""The placements that a router serves, by epoch: the one in force, the one before it, the one to come. Pure.

    prepare    a candidate is served beside the plan in force, once this node's workers hold what it needs
    commit     the candidate is in force; the plan before is served as long as blocks of it may be outstanding
    abort      the candidate is dropped
    retire     plans before the one in force are dropped

A router that has said it is ready for a candidate keeps it until it is told how the rebalance ended, whatever happens
to it or to the gateway meanwhile: others may have committed. Hence a plan is *binding* if it was ever in force or
this router was ready for it; a worker is not asked for anything before it holds the experts of all binding plans.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.errors import WireError
from common.placement.plan import Place, Plan
from services.router.routes import Routes


@dataclass(slots=True)
class Candidate:
    """`ready`: this router has said so. `error`: why it cannot be, one sentence."""

    plan: Plan
    ready: bool = False
    error: str = ""


@dataclass(slots=True)
class Epochs:
    """Plans by epoch, for rail `rail` of `node`. `current` is the one in force."""

    current: Plan
    node: int
    rail: int = 0
    num_rails: int = 1
    candidate: Candidate | None = None
    _routes: dict[int, Routes] = field(default_factory=dict)
    _plans: dict[int, Plan] = field(default_factory=dict)
    _digests: dict[int, str] = field(default_factory=dict)  # by epoch
    _residents: dict[tuple[int, int], frozenset[Place]] = field(default_factory=dict)
    _in_use: frozenset[int] = frozenset()  # workers that the plan in force uses
    has_replicas: bool = False  # in any plan served

    def __post_init__(self) -> None:
        self._serve(self.current)

    def __repr__(self) -> str:
        coming = ""
        if self.candidate is not None:
            state = self.candidate.error or ("ready" if self.candidate.ready else "loading")
            coming = f" | {self.candidate.plan.epoch} {state}"
        return f"<Epochs [{self.current.epoch} in force | serves {self.served}{coming}]>"

    @property
    def served(self) -> list[int]:
        """Epochs whose blocks are taken, ascending."""
        return sorted(self._plans)

    @property
    def plans(self) -> list[Plan]:
        """All that are served, by epoch."""
        return [self._plans[epoch] for epoch in self.served]

    @property
    def binding_plans(self) -> list[Plan]:
        """Those served whatever comes: all but a candidate that this router has not been ready for."""
        coming = None if self.candidate is None or self.candidate.ready else self.candidate.plan
        return [plan for plan in self.plans if plan is not coming]

    def routes(self, epoch: int, layer: int) -> Routes:
        """The tables of a block. Raises WireError when its epoch is not served or its layer has no experts."""
        routes = self._routes.get(epoch)
        if routes is None:
            served = " and ".join(map(str, self.served))
            raise WireError(f"epoch {epoch}, this router serves epoch {served}")
        if layer not in routes:
            raise WireError(f"layer {layer} has no experts")
        return routes

    def holds_any(self, worker: int) -> bool:
        """Whether a worker holds anything by the plan in force."""
        return worker in self._in_use

    def residents(self, epoch: int, worker: int) -> frozenset[Place]:
        """What a worker holds by one of the plans; asked often, and a large plan is long."""
        known = self._residents.get((epoch, worker))
        if known is None:
            known = frozenset(self._plans[epoch].residents(worker))
            self._residents[epoch, worker] = known
        return known

    def wanted(self, worker: int) -> set[Place]:
        """What a worker of this node shall hold, the candidate's included."""
        return set().union(*(self.residents(epoch, worker) for epoch in self._plans))

    def binding(self, worker: int) -> set[Place]:
        """What it must hold before it is asked for anything."""
        return set().union(*(self.residents(p.epoch, worker) for p in self.binding_plans))

    @property
    def digests(self) -> dict[int, str]:
        """Of the binding plans, by epoch."""
        return {plan.epoch: self._digests[plan.epoch] for plan in self.binding_plans}

    def prepare(self, plan: Plan) -> bool:
        """Begin with a candidate; False when it is known already, or over."""
        known = self.candidate is not None and self.candidate.plan.epoch == plan.epoch
        if known or plan.epoch <= self.current.epoch:
            return False
        self.abort()
        self.candidate = Candidate(plan)
        self._serve(plan)
        return True

    def commit(self, plan: Plan) -> bool:
        """The plan is in force from now on, prepared or not; False when it, or a later one, is already."""
        if plan.epoch <= self.current.epoch:
            return False
        if self.candidate is not None and self.candidate.plan.epoch != plan.epoch:
            self.abort()
        self.candidate = None
        self.current = plan
        self._serve(plan)
        return True

    def abort(self) -> bool:
        """Drop the candidate; False when there is none."""
        if self.candidate is None:
            return False
        self._drop(self.candidate.plan.epoch)
        self.candidate = None
        return True

    def retire(self) -> bool:
        """Drop the plans before the one in force; False when there is none."""
        old = [epoch for epoch in self._plans if epoch < self.current.epoch]
        for epoch in old:
            self._drop(epoch)
        return bool(old)

    def restore(self, epoch: int, plans: Sequence[Plan]) -> None:
        """Take up what a predecessor left: of `plans` that of `epoch` is in force, a later one it was ready for."""
        self.candidate = None
        for known in self.served:
            self._drop(known)
        self.current = next(plan for plan in plans if plan.epoch == epoch)
        for plan in plans:
            self._serve(plan)
            if plan.epoch > epoch:
                self.candidate = Candidate(plan, ready=True)

    def _drop(self, epoch: int) -> None:
        del self._plans[epoch], self._routes[epoch], self._digests[epoch]
        for key in [key for key in self._residents if key[0] == epoch]:
            del self._residents[key]

    def _serve(self, plan: Plan) -> None:
        if plan.epoch not in self._plans:
            self._plans[plan.epoch] = plan
            self._digests[plan.epoch] = plan.digest
            self._routes[plan.epoch] = Routes(
                plan, self.node, rail=self.rail, num_rails=self.num_rails
            )
        holders = self.current.holders.values()
        self._in_use = frozenset(w for layer in holders for workers in layer for w in workers)
        self.has_replicas = any(p.has_replicas(n) for p in self.plans for n in p.holders)
