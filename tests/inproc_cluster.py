"""A whole cluster in one process: the real services over the in-process transport, on one event loop.

For what needs many runs or a look inside: wire accuracy, failures at chosen moments. The gateway stays outside: tests
speak to attention workers directly.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.config import ClusterConfig, local_cluster
from common.ids import ProcessId, Role
from common.model.hf_config import load_config
from common.placement.plan import Plan
from common.plan_file import write_plan
from common.transport.buffers import BufferPool
from common.transport.inproc import InprocFabric, Script
from common.transport.link import LinkLimits
from services.attention.worker import AttentionWorker
from services.expert.worker import ExpertWorker
from services.router.worker import RouterWorker

WORKERS: dict[Role, Callable[..., Any]] = {
    Role.ROUTER: RouterWorker,
    Role.EXPERT: ExpertWorker,
    Role.ATTENTION: AttentionWorker,
}


class InprocCluster:
    """Running services by name; `config` is what `atoll up` would have made."""

    def __init__(
        self,
        config: ClusterConfig,
        fabric: InprocFabric,
        tasks: asyncio.TaskGroup,
        new_pool: Callable[[], BufferPool] = BufferPool,
    ) -> None:
        self.config = config
        self.new_pool = new_pool
        self.fabric = fabric
        self.tasks = tasks
        self.services: dict[ProcessId, Any] = {}

    async def start(self, process: ProcessId) -> Any:
        """Start one service, or its successor after `crash`."""
        limits = LinkLimits(window=self.config.limits.link_window)
        service = WORKERS[process.role](
            self.config,
            process.index,
            self.fabric.transport(link_limits=limits, pool=self.new_pool()),
        )
        self.services[process] = service
        await service.start(self.tasks)
        return service

    def crash(self, process: ProcessId) -> None:
        """As kill -9 would: peers see their links close, nothing is said."""
        self.services[process].transport.crash()

    def of(self, role: Role) -> list[Any]:
        """Services of a role by index."""
        return [
            s
            for process, s in sorted(self.services.items(), key=lambda p: p[0].index)
            if process.role is role
        ]

    @property
    def is_ready(self) -> bool:
        """Every router complete, every attention worker connected."""
        return all(r._state()[0] == "ready" for r in self.of(Role.ROUTER)) and all(
            a.state == "ready" for a in self.of(Role.ATTENTION)
        )

    async def logits(self, tokens: list[int], *, worker: int = 0, lane: int = 0) -> torch.Tensor:
        """Next-token logits after each token of a text, fp32 [tokens, vocab], through prefill of a lane."""
        from common.request import Request, SamplingParams
        from services.attention.scheduler import Slice
        from services.attention.sequence import Sequence

        attention = self.of(Role.ATTENTION)[worker]
        sequence = Sequence(
            Request("t", tuple(tokens), SamplingParams()), list(tokens), 0, len(tokens)
        )
        pages = attention.requests.scheduler.pages
        sequence.pages = pages.acquire(sequence, len(tokens))
        try:
            logits, _ = await attention._lanes[lane].forward(
                [Slice(sequence, 0, len(tokens))], all_rows=True
            )
            return logits
        finally:
            pages.release(sequence)


@asynccontextmanager
async def inproc_cluster(
    model: Path,
    run_dir: Path,
    *,
    seed: int = 0,
    script: Script | None = None,
    block_deadline_s: float = 30.0,
    link_window: int = 64,
    trace_events: int = 0,
    new_pool: Callable[[], BufferPool] = BufferPool,
    plan: Plan | None = None,
    dispatch: str = "hierarchical",
    expert_slices: int = 1,
    **layout: Any,
) -> AsyncIterator[InprocCluster]:
    """Start every service of a local cluster (`layout` as for `common.config.local_cluster`) and wait until ready."""
    shape = load_config(model)
    defaults: dict[str, Any] = {
        "ep": shape.num_experts, "nodes": 2, "attention": 1, "experts_per_gpu": 1, "microbatches": 1,
        "wire": "fp32", "port": 0,
    }  # fmt: skip
    config = local_cluster(model, **(defaults | layout), run_dir=run_dir)
    config = replace(
        config,
        limits=replace(config.limits, block_deadline_s=block_deadline_s, link_window=link_window),
        cluster=replace(config.cluster, trace_events=trace_events),
    )  # fmt: skip
    config = replace(
        config, placement=replace(config.placement, dispatch=dispatch, expert_slices=expert_slices)
    )
    if plan is not None:
        write_plan(run_dir / "plan.json", plan)
        config = replace(config, placement=replace(config.placement, plan=run_dir / "plan.json"))
    fabric = InprocFabric(seed, script=script)
    try:
        async with asyncio.TaskGroup() as tasks:
            cluster = InprocCluster(config, fabric, tasks, new_pool)
            for spec in config.processes():
                if spec.id.role in WORKERS:
                    await cluster.start(spec.id)
            async with asyncio.timeout(30):
                while not cluster.is_ready:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            yield cluster
            for service in cluster.services.values():
                await service.stop()
            raise _Done
    except* _Done:
        pass


class _Done(Exception):  # noqa: N818
    """Ends the task group."""
