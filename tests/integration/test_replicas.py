"""Replicas of an expert: rows go to one that is alive, and no bit of the answer shows which. The services are real."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common.ids import ProcessId, Role
from common.model.hf_config import load_config
from common.placement.plan import Plan
from common.transport.buffers import BufferPool
from common.transport.device import DevicePool
from tests.inproc_cluster import InprocCluster, inproc_cluster
from tests.oracle.configs import CONFIGS
from tests.oracle.reference import build_checkpoint

TOKENS = list(range(2, 42))
LAYOUT = {"nodes": 3, "attention": 1, "wire": "fp32", "ep": 24}
NODES = (0,) * 8 + (1,) * 8 + (2,) * 8
EXPERTS = 16


@dataclass(frozen=True)
class Case:
    """Where expert e's replicas are, by name: `spread` over two nodes each, `paired` on one node, or one of each."""

    name: str

    def plan(self, layers) -> Plan:
        holders = []
        for e in range(EXPERTS):
            if self.name == "spread":  # workers 0-15, and again 8 further on: always another node
                holders.append((e, (e + 8) % 24))
            elif self.name == "paired":  # two on a node for the first twelve
                holders.append((2 * e, 2 * e + 1) if e < 12 else ((2 * e) % 24,))
            else:
                holders.append((e, 16 + e % 8))
        return Plan(1, dict.fromkeys(layers, tuple(holders)), NODES)

    @property
    def per_gpu(self) -> int:
        return 1 + (self.name != "single") * 2


CASES = [Case("spread"), Case("paired"), Case("shared")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return build_checkpoint(tmp_path_factory.getbasetemp() / "replicas", CONFIGS[0])


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory) -> torch.Tensor:
    async def main() -> torch.Tensor:
        async with inproc_cluster(model, tmp_path_factory.mktemp("run"), **LAYOUT) as cluster:
            return await cluster.logits(TOKENS)

    return asyncio.run(main())


def cluster_of(model: Path, run_dir: Path, case: Case, **options):
    plan = case.plan(load_config(model).moe_layers)
    return inproc_cluster(
        model, run_dir, plan=plan, experts_per_gpu=case.per_gpu, **LAYOUT, **options
    )


def rows_apart() -> DevicePool:
    return DevicePool("cpu")


def slow(*_) -> int:
    return 50


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("routers", [1, 3])
def test_no_bit_depends_on_the_replica(model, expected, tmp_path, case, routers):
    async def main() -> torch.Tensor:
        async with cluster_of(model, tmp_path, case, routers=routers) as cluster:
            logits = await cluster.logits(TOKENS)
            for router in cluster.of(Role.ROUTER):
                assert not any(router.flow.calls.fleet.outstanding)
                assert not router.flow.calls.works
                assert not router.flow.calls.sources
            return logits

    assert torch.equal(asyncio.run(main()), expected)


async def crash_for_good(cluster: InprocCluster, victim: ProcessId, owes) -> torch.Tensor:
    """Crash `victim` at the first moment when it owes something; nobody takes its place."""
    step = asyncio.ensure_future(cluster.logits(TOKENS))
    while not owes():
        assert not step.done(), f"{victim} never owed a block"
        await asyncio.sleep(0)
    cluster.crash(victim)
    return await asyncio.wait_for(step, 20)


@pytest.mark.parametrize(
    ("case", "worker"),
    [(CASES[0], 0), (CASES[0], 12), (CASES[1], 3), (CASES[1], 9), (CASES[2], 2), (CASES[2], 20)],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("new_pool", [BufferPool, rows_apart], ids=["rows-inside", "rows-apart"])
def test_what_a_dead_worker_owes_goes_to_replicas_at_once(
    model, expected, tmp_path, case, worker, new_pool
):
    """On the source's node and on others, with the replica on the same node or another."""

    async def main() -> torch.Tensor:
        async with cluster_of(model, tmp_path, case, script=slow, new_pool=new_pool) as cluster:
            routers = cluster.of(Role.ROUTER)
            outbox = routers[NODES[worker]].flow.experts[worker]
            logits = await crash_for_good(
                cluster, ProcessId(Role.EXPERT, worker), lambda: len(outbox) > 0
            )
            assert sum(r.flow.counters.rerouted for r in routers) >= 1
            assert all(r._state()[0] == "ready" for r in routers), "replicas keep the node whole"
            assert all(r.flow.num_in_flight == 0 for r in routers)
            assert not any(any(r.flow.calls.fleet.outstanding) for r in routers)
            again = await cluster.logits(TOKENS)
            assert len(outbox) == 0, "nobody asks the dead"
            assert torch.equal(again, logits)
            return logits

    assert torch.equal(asyncio.run(main()), expected)


def test_a_lost_node_is_replaced_by_replicas_elsewhere(model, expected, tmp_path):
    """Every expert of node 1 has a replica on node 0 or 2; its router dies and stays dead."""

    async def main() -> torch.Tensor:
        async with cluster_of(model, tmp_path, CASES[0], script=slow) as cluster:
            source = cluster.of(Role.ROUTER)[0]
            logits = await crash_for_good(
                cluster, ProcessId(Role.ROUTER, 1), lambda: len(source.flow.routers[1]) > 0
            )
            assert source.flow.counters.rerouted >= 1
            return logits

    assert torch.equal(asyncio.run(main()), expected)


def test_without_a_living_replica_the_block_waits_for_the_first_to_return(
    model, expected, tmp_path
):
    async def main() -> torch.Tensor:
        async with cluster_of(model, tmp_path, CASES[1], script=slow) as cluster:
            first, second = (cluster.of(Role.ROUTER)[1].flow.experts[w] for w in (8, 9))
            step = asyncio.ensure_future(cluster.logits(TOKENS))
            while not len(first) and not len(second):
                assert not step.done()
                await asyncio.sleep(0)
            for worker in (8, 9):
                cluster.crash(ProcessId(Role.EXPERT, worker))
            await asyncio.sleep(0.05)
            assert not step.done()
            dead = 8 if len(first) else 9
            await cluster.start(ProcessId(Role.EXPERT, 17 - dead))  # not the one that owes
            return await asyncio.wait_for(step, 20)

    assert torch.equal(asyncio.run(main()), expected)


@pytest.mark.parametrize("new_pool", [BufferPool, rows_apart], ids=["rows-inside", "rows-apart"])
def test_buffers_come_back_after_a_lost_worker(model, tmp_path, new_pool):
    async def main() -> None:
        async with cluster_of(model, tmp_path, CASES[0], script=slow, new_pool=new_pool) as cluster:
            outbox = cluster.of(Role.ROUTER)[0].flow.experts[0]
            await crash_for_good(cluster, ProcessId(Role.EXPERT, 0), lambda: len(outbox) > 0)
            await asyncio.sleep(0.05)
            outstanding = {
                str(p): (
                    s.transport.pool.outstanding,
                    getattr(s.transport.pool, "rows_outstanding", 0),
                )
                for p, s in cluster.services.items()
                if p != ProcessId(Role.EXPERT, 0)
            }
        assert set(outstanding.values()) == {(0, 0)}, outstanding

    asyncio.run(main())


@pytest.mark.parametrize("new_pool", [BufferPool, rows_apart], ids=["rows-inside", "rows-apart"])
@pytest.mark.parametrize("routers", [1, 3])
def test_unicast_computes_the_same_and_sends_every_copy(
    model, expected, tmp_path, routers, new_pool
):
    async def main() -> torch.Tensor:
        options = LAYOUT | {"routers": routers, "new_pool": new_pool, "dispatch": "unicast"}
        async with inproc_cluster(model, tmp_path, **options) as cluster:
            logits = await cluster.logits(TOKENS)
            traffic = [
                link
                for router in cluster.of(Role.ROUTER)
                for both in router.flow.counters.links.values()
                for link in both
            ]
            assert sum(link.rows for link in traffic) > 0
            assert all(link.rows == link.unicast_rows for link in traffic)
            return logits

    assert torch.equal(asyncio.run(main()), expected)


def test_the_rows_of_each_link_are_in_the_status(model, tmp_path):
    async def main() -> None:
        async with inproc_cluster(model, tmp_path, **LAYOUT) as cluster:
            await cluster.logits(TOKENS)
            entry = cluster.of(Role.ROUTER)[0]._entries()[0]
            assert list(entry["counters"]["links"]) == ["1"]
            assert entry["counters"]["links"]["1"]["out"]["rows"] > 0

    asyncio.run(main())
