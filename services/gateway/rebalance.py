"""Takes a running cluster from one plan to the next, asked to or by itself. The decisions are
`common.placement.handover` (whom to tell what) and `common.placement.rebalance` (whether a new plan is worth it).

Also at rest every report is looked at: a router that comes back with an older plan, or with one that was never put in
force, is brought in line by the same rules.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from common.config import ClusterConfig
from common.errors import AtollError, LinkClosed, Retryable, WireError
from common.ids import ProcessId, Role
from common.model.hf_config import ModelConfig, load_config
from common.model.slices import sliced_config
from common.placement.handover import Report, next_frames
from common.placement.links import RowBytes
from common.placement.optimise import Options, moves
from common.placement.plan import Plan, check_plan
from common.placement.rebalance import Hysteresis, Sample, gain, join_samples, options_like
from common.placement.routing_trace import RoutingTrace
from common.placement.topology import cluster_topology
from common.plan_search import Found, Search, search_apart

log = logging.getLogger(__name__)
_SAMPLE_S = 5.0  # for routers to send their samples
_SEARCH_S = 600.0
_RETIRE_S = 60.0  # after the decision: how long a caller waits for the end


@dataclass(slots=True)
class Rebalancer:
    """`send` posts a control frame to a process (raises LinkClosed)."""

    config: ClusterConfig
    send: Callable[[ProcessId, dict[str, Any]], None]
    lost_workers: Callable[[], frozenset[int]]
    _reports: dict[int, Report | None] = field(init=False)
    _oldest: dict[int, int | None] = field(default_factory=dict)  # by attention worker connected
    _sent: dict[int, str] = field(default_factory=dict)  # by router: the last, until it reports
    _goal: Plan | None = None
    _outcome: "asyncio.Future[None] | None" = None
    _voted: asyncio.Event = field(default_factory=asyncio.Event)  # on the goal, one way or other
    _committing: bool = False  # the goal may be in force somewhere
    _last_epoch: int = -1  # ever tried
    _known: tuple[object, Plan | None] = (
        None,
        None,
    )  # the last plan reported, as it came and as it is
    _samples: dict[int, Sample] = field(default_factory=dict)  # by router
    _sampled: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._reports = dict.fromkeys(spec.id.index for spec in self.config.of_role(Role.ROUTER))

    # ---- what processes say --------------------------------------------------------------------

    def opened(self, process: ProcessId) -> None:
        """A link opened; what its process serves is not known yet."""
        if process.role is Role.ATTENTION:
            self._oldest[process.index] = None
        elif process.role is Role.ROUTER:
            self._forget(process.index)

    def closed(self, process: ProcessId) -> None:
        """A link closed. An attention worker that is gone has no blocks on their way."""
        if process.role is Role.ATTENTION:
            self._oldest.pop(process.index, None)
        elif process.role is Role.ROUTER:
            self._forget(process.index)
        self._advance()

    def _forget(self, router: int) -> None:
        self._reports[router] = None
        self._sent.pop(router, None)

    def on_frame(self, process: ProcessId, message: dict[str, Any]) -> None:
        """`placement` and `routing` of routers, `epochs` of attention workers. Raises WireError."""
        match message["type"], process.role:
            case "placement", Role.ROUTER:
                document, plan = self._known
                if plan is None or message["plan"] != document:
                    plan = Plan.from_json(message["plan"])
                    self._known = message["plan"], plan
                self._reports[process.index] = Report.from_json(message, plan)
                self._sent.pop(process.index, None)
                self._advance()
            case "epochs", Role.ATTENTION:
                self._oldest[process.index] = int(message["oldest"])
                self._advance()
            case "routing", Role.ROUTER:
                self._samples[process.index] = Sample.from_json(message)
                self._sampled.set()
            case kind, _:
                raise WireError(f"unexpected frame {kind!r} from {process}")

    def _advance(self) -> None:
        step = next_frames(self._reports, self._oldest, self._goal)
        if step.failed and self._committing:
            return  # somebody may have put it in force: what they report decides
        for router, (kind, plan) in step.frames.items():
            what = kind if plan is None else f"{kind} {plan.epoch}"
            if self._sent.get(router) == what:
                continue
            self._sent[router] = what
            if plan is not None and plan is self._goal and kind == "commit":
                self._committing = True
                self._voted.set()
            frame: dict[str, Any] = {"type": kind}
            if plan is not None:
                frame["plan"] = plan.to_json()
            try:
                self.send(ProcessId(Role.ROUTER, router), frame)
            except LinkClosed:
                continue  # `closed` follows
        if self._goal is not None and step.failed:
            self._end(Retryable(step.failed))
        elif self._goal is not None and step.decided and step.done:
            self._end(None)

    def _end(self, error: AtollError | None) -> None:
        self._goal, self._committing = None, False
        self._voted.set()
        if self._outcome is not None and not self._outcome.done():
            if error is None:
                self._outcome.set_result(None)
            else:
                self._outcome.set_exception(error)
        self._advance()

    # ---- plans ---------------------------------------------------------------------------------

    @property
    def in_force(self) -> Plan | None:
        """The plan in force; None before any router has said."""
        plans = [report.plan for report in self._reports.values() if report is not None]
        return max(plans, key=lambda plan: plan.epoch, default=None)

    def to_json(self) -> dict[str, Any]:
        """For /cluster."""
        plan = self.in_force
        served = {e for r in self._reports.values() if r is not None for e in r.served}
        return {
            "epoch": None if plan is None else plan.epoch, "digest": None if plan is None else plan.digest,
            "served": sorted(served), "rebalancing": self._goal is not None,
        }  # fmt: skip

    def _settled(self) -> Plan:
        """The plan in force, when nothing is under way. Raises Retryable."""
        plan = self.in_force
        absent = [router for router, report in self._reports.items() if report is None]
        if self._goal is not None:
            raise Retryable(f"a rebalance to epoch {self._goal.epoch} is under way")
        if plan is None or absent:
            raise Retryable(f"router-{absent[0]} is not connected")
        if not next_frames(self._reports, self._oldest, None).done:
            raise Retryable(f"plans beside that of epoch {plan.epoch} are still served")
        return plan

    def next_epoch(self) -> int:
        """A number that no plan has had."""
        seen = [
            e for r in self._reports.values() if r is not None for e in (*r.served, r.plan.epoch)
        ]
        return max(self._last_epoch, *seen) + 1

    async def carry_out(self, plan: Plan) -> int:
        """Put a plan in force, under a new epoch, which is returned. Cancelled before the decision, it is undone.

        Raises ConfigError when it is not for this cluster, Retryable when the plan in force stays, and why.
        """
        model = await asyncio.to_thread(_model, self.config)
        previous = self._settled()
        check_plan(
            plan, moe_layers=model.moe_layers, num_experts=model.num_experts, nodes=previous.nodes,
            experts_per_gpu=self.config.placement.experts_per_gpu,
        )  # fmt: skip
        self._last_epoch = epoch = self.next_epoch()
        self._goal = replace(plan, epoch=epoch)
        self._voted.clear()
        outcome = self._outcome = asyncio.get_running_loop().create_future()
        log.info("rebalance to epoch %d: %d moves", epoch, len(moves(previous, plan)))
        self._advance()
        limit = self.config.limits.start_deadline_s
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit):
                    await self._voted.wait()
            if not self._voted.is_set():
                self._end(Retryable(f"not every router was ready within {limit:g} s"))
            await asyncio.wait([outcome], timeout=_RETIRE_S)
            if outcome.done():
                outcome.result()
        except AtollError as exc:
            sentence = f"epoch {epoch} was given up, epoch {previous.epoch} stays: {exc}"
            log.warning("%s", sentence)
            raise Retryable(sentence) from exc
        finally:
            if not outcome.done() and not self._committing:  # cancelled
                outcome.cancel()
                self._end(None)
        return epoch

    # ---- finding one ---------------------------------------------------------------------------

    async def trace(self) -> RoutingTrace:
        """What the gate has been choosing lately. Raises Retryable when that is too little, or a router is silent."""
        every = self.config.routers_divide_blocks  # else all see the same blocks
        routers = [s.id for s in self.config.of_role(Role.ROUTER) if every or s.rail == 0]
        wanted = {r.index for r in routers if self.config.nodes[self._node(r)].attention}
        self._samples.clear()
        for index in wanted:
            self.send(ProcessId(Role.ROUTER, index), {"type": "routing_request"})
        try:
            async with asyncio.timeout(_SAMPLE_S):
                while wanted - set(self._samples):
                    self._sampled.clear()
                    await self._sampled.wait()
        except TimeoutError as exc:
            silent = min(wanted - set(self._samples))
            raise Retryable(f"router-{silent} sent no sample within {_SAMPLE_S:g} s") from exc
        model = await asyncio.to_thread(_model, self.config)
        return join_samples(
            [self._samples[index] for index in sorted(wanted)], tuple(model.moe_layers),
            num_experts=model.num_experts, num_groups=model.num_groups, top_k_groups=model.top_k_groups,
        )  # fmt: skip

    def _node(self, router: ProcessId) -> int:
        return self.config.process(Role.ROUTER, router.index).node

    async def search(self, *, replicas: int | None = None) -> Found:
        """The best plan for recent traffic, of the same kind as the one in force, without lost workers.

        Raises Retryable when there was too little traffic or a rebalance is under way, ConfigError when no such plan
        exists.
        """
        previous = self._settled()
        trace = await self.trace()
        model = await asyncio.to_thread(_model, self.config)
        options = Options(
            excluded=self.lost_workers(),
            row=RowBytes.of(model.hidden_size, self.config.cluster.wire),
        )
        per_gpu = self.config.placement.experts_per_gpu
        fields = options_like(previous, options, experts_per_gpu=per_gpu, replicas=replicas)
        wanted = Search(
            trace, cluster_topology(self.config), Options(**fields), previous, self.next_epoch()
        )
        return await search_apart(wanted, deadline_s=_SEARCH_S)

    async def watch(self) -> None:
        """Rebalance by itself, every `rebalance_every_s` that it is worth it. For ever."""
        section = self.config.placement
        hysteresis = Hysteresis(section.rebalance_gain, section.rebalance_patience)
        while True:
            await asyncio.sleep(section.rebalance_every_s)
            try:
                found = await self.search()
                worth = gain(found.before, found.after)
                if not hysteresis.observe(found.before, found.after):
                    log.info("a new plan would gain %.1f %%: not yet", 100 * worth)
                    continue
                started = time.monotonic()
                epoch = await self.carry_out(found.plan)
                took = time.monotonic() - started
                log.info("epoch %d, %.1f %% better, in %.1f s", epoch, 100 * worth, took)
            except AtollError as exc:
                log.info("no rebalance: %s", exc)


def _model(config: ClusterConfig) -> ModelConfig:
    """As the expert side sees it: slices are experts."""
    return sliced_config(load_config(config.model.path), config.placement.expert_slices)
