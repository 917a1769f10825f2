"""What happens to blocks on their way: any order of arrival, lost workers, silent workers. The services are real."""

import asyncio
from pathlib import Path

import pytest
import torch

from common.errors import AtollError
from common.ids import ProcessId, Role
from common.transport.buffers import BufferPool
from common.transport.device import DevicePool
from common.transport.inproc import InprocTransport
from tests.inproc_cluster import InprocCluster, inproc_cluster
from tests.oracle.configs import CONFIGS
from tests.oracle.reference import build_checkpoint

TOKENS = list(range(2, 42))
LAYOUT = {"nodes": 3, "attention": 1, "wire": "fp32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return build_checkpoint(tmp_path_factory.getbasetemp() / "in-flight", CONFIGS[0])


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory) -> torch.Tensor:
    async def main() -> torch.Tensor:
        async with inproc_cluster(model, tmp_path_factory.mktemp("run"), **LAYOUT) as cluster:
            return await cluster.logits(TOKENS)

    return asyncio.run(main())


@pytest.mark.parametrize("seed", range(8))
def test_no_bit_depends_on_the_order_of_arrival(model, expected, tmp_path, seed):
    def scramble(sender, receiver, random):
        return random.randrange(0, 5000)

    async def main() -> torch.Tensor:
        async with inproc_cluster(model, tmp_path, seed=seed, script=scramble, **LAYOUT) as cluster:
            return await cluster.logits(TOKENS)

    assert torch.equal(asyncio.run(main()), expected)


@pytest.mark.parametrize("routers", [2, 3, 8])
def test_no_bit_depends_on_the_number_of_rails(model, expected, tmp_path, routers):
    async def main() -> torch.Tensor:
        async with inproc_cluster(model, tmp_path, **LAYOUT, routers=routers) as cluster:
            logits = await cluster.logits(TOKENS)
            for router in cluster.of(Role.ROUTER):
                assert all(
                    (router.spec.node + peer) % routers == router.spec.rail
                    for peer in router.flow.counters.links
                ), "a rail talked to a node that is another rail's"
            used = [r for r in cluster.of(Role.ROUTER)[:routers] if r.flow.counters.rows_to_experts]
            assert len(used) == min(routers, 6), "rails share their node's six experts"
            return logits

    assert torch.equal(asyncio.run(main()), expected)


@pytest.mark.parametrize("routers", [2, 3])
def test_no_bit_depends_on_which_router_has_a_block(model, expected, tmp_path, routers):
    layout = LAYOUT | {"routers": routers, "routers_divide": "blocks", "microbatches": 3}

    async def main() -> tuple[list[torch.Tensor], list[int]]:
        async with inproc_cluster(model, tmp_path, script=lambda *_: 50, **layout) as cluster:
            lanes = await asyncio.gather(*(cluster.logits(TOKENS, lane=i) for i in range(3)))
            own = cluster.of(Role.ROUTER)[:routers]
            return lanes, [r.flow.counters.blocks for r in own]

    lanes, blocks = asyncio.run(main())
    assert all(torch.equal(logits, expected) for logits in lanes)
    assert min(blocks) > 0, "a router of the node had no block"


def rows_apart() -> DevicePool:
    return DevicePool("cpu")


@pytest.mark.parametrize("wire", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"nodes": 1},
        {"routers": 2},
        {"routers": 2, "routers_divide": "blocks"},
        {"ep": 6, "experts_per_gpu": 3},
    ],
)
def test_rows_apart_from_their_messages_give_the_same_bits(model, tmp_path, wire, layout):
    async def main(**how) -> torch.Tensor:
        async with inproc_cluster(
            model, tmp_path, **(LAYOUT | layout | {"wire": wire}), **how
        ) as c:
            logits = await c.logits(TOKENS)
            for service in c.services.values():
                pool = service.transport.pool
                assert pool.outstanding == 0, service.spec.id
                assert getattr(pool, "rows_outstanding", 0) == 0, service.spec.id
            return logits

    apart = asyncio.run(main(new_pool=rows_apart))
    assert torch.equal(asyncio.run(main()), apart)


def test_a_router_shows_what_asks_ahead_of_it_and_gives_the_spare_back(
    model, tmp_path, monkeypatch
):
    shown = []
    monkeypatch.setattr(
        InprocTransport, "forward_with", lambda _, forwarder: shown.append(forwarder)
    )

    async def main():
        async with inproc_cluster(model, tmp_path, new_pool=rows_apart, **LAYOUT) as cluster:
            flows = [router.flow for router in cluster.of(Role.ROUTER)]
            for flow in flows:  # as after a block whose rows were handed on
                flow.ahead._spare = 0, flow.pool.take(64), ()
        assert len(shown) == len(flows)
        assert [flow.pool.rows_outstanding for flow in flows] == [0] * len(flows)

    asyncio.run(main())


async def crash_while_it_owes(cluster: InprocCluster, victim: ProcessId, owes) -> torch.Tensor:
    """Run a forward pass, crash `victim` at the first moment when it owes something, start its successor."""
    step = asyncio.ensure_future(cluster.logits(TOKENS))
    while not owes():
        assert not step.done(), f"{victim} never owed a block"
        await asyncio.sleep(0)
    cluster.crash(victim)
    await asyncio.sleep(0.02)
    assert not step.done()
    await cluster.start(victim)
    return await asyncio.wait_for(step, 20)


@pytest.mark.parametrize("new_pool", [BufferPool, rows_apart])
@pytest.mark.parametrize("expert", [0, 5, 15])
def test_a_crashed_expert_costs_no_bit(model, expected, tmp_path, expert, new_pool):
    async def main() -> tuple[torch.Tensor, int]:
        async with inproc_cluster(
            model, tmp_path, script=lambda *_: 50, new_pool=new_pool, **LAYOUT
        ) as cluster:
            outboxes = [r.flow.experts.get(expert) for r in cluster.of(Role.ROUTER)]
            (outbox,) = [box for box in outboxes if box is not None]
            logits = await crash_while_it_owes(
                cluster, ProcessId(Role.EXPERT, expert), lambda: len(outbox) > 0
            )
            return logits, outbox.num_resent

    logits, num_resent = asyncio.run(main())
    assert torch.equal(logits, expected)
    assert num_resent >= 1


@pytest.mark.parametrize("new_pool", [BufferPool, rows_apart])
@pytest.mark.parametrize("router", [0, 1])
def test_a_crashed_router_costs_no_bit(model, expected, tmp_path, router, new_pool):
    """Router 0 serves the attention worker, router 1 another node; whoever asked them asks their successors again."""

    async def main() -> torch.Tensor:
        async with inproc_cluster(
            model, tmp_path, script=lambda *_: 50, new_pool=new_pool, **LAYOUT
        ) as cluster:
            (attention,) = cluster.of(Role.ATTENTION)
            source = cluster.of(Role.ROUTER)[0]
            outbox = attention.moe.routers[0] if router == 0 else source.flow.routers[1]
            return await crash_while_it_owes(
                cluster, ProcessId(Role.ROUTER, router), lambda: len(outbox) > 0
            )

    assert torch.equal(asyncio.run(main()), expected)


@pytest.mark.parametrize("new_pool", [BufferPool, rows_apart])
@pytest.mark.parametrize("rail", [0, 1])
def test_a_crashed_rail_costs_no_bit(model, expected, tmp_path, rail, new_pool):
    async def main() -> torch.Tensor:
        layout = LAYOUT | {"routers": 2}
        async with inproc_cluster(
            model, tmp_path, script=lambda *_: 50, new_pool=new_pool, **layout
        ) as cluster:
            (attention,) = cluster.of(Role.ATTENTION)
            outbox, other = attention.moe.routers[rail], attention.moe.routers[1 - rail]
            logits = await crash_while_it_owes(
                cluster, ProcessId(Role.ROUTER, rail), lambda: len(outbox) > 0
            )
            assert outbox.num_resent >= 1
            assert other.num_resent == 0, "only the lost rail's share is asked again"
            return logits

    assert torch.equal(asyncio.run(main()), expected)


@pytest.mark.parametrize("new_pool", [BufferPool, rows_apart])
def test_a_router_that_divides_blocks_is_replaced_at_once(model, expected, tmp_path, new_pool):
    layout = LAYOUT | {"routers": 2, "routers_divide": "blocks"}

    async def main() -> torch.Tensor:
        async with inproc_cluster(
            model, tmp_path, script=lambda *_: 50, new_pool=new_pool, **layout
        ) as cluster:
            (attention,) = cluster.of(Role.ATTENTION)
            first, second = attention.moe.routers.values()
            step = asyncio.ensure_future(cluster.logits(TOKENS))
            while not len(first):
                assert not step.done()
                await asyncio.sleep(0)
            cluster.crash(ProcessId(Role.ROUTER, 0))
            logits = await asyncio.wait_for(step, 20)
            assert not len(first), "a block waits for the lost router"
            assert second.num_resent == 1, "what it owed was not asked of the other"
            return logits

    assert torch.equal(asyncio.run(main()), expected)


@pytest.mark.parametrize("back", [0, 1])
def test_the_first_router_that_is_back_takes_what_all_of_them_owed(model, expected, tmp_path, back):
    layout = LAYOUT | {"routers": 2, "routers_divide": "blocks"}

    async def main() -> torch.Tensor:
        async with inproc_cluster(model, tmp_path, script=lambda *_: 50, **layout) as cluster:
            (attention,) = cluster.of(Role.ATTENTION)
            routers = attention.moe.routers
            step = asyncio.ensure_future(cluster.logits(TOKENS))
            while not len(routers[0]):
                assert not step.done()
                await asyncio.sleep(0)
            for index in (0, 1):
                cluster.crash(ProcessId(Role.ROUTER, index))
            await asyncio.sleep(0.02)
            assert not step.done()
            await cluster.start(ProcessId(Role.ROUTER, back))
            logits = await asyncio.wait_for(step, 20)
            assert routers[1 - back].link is None, "the other came back, too"
            return logits

    assert torch.equal(asyncio.run(main()), expected)


@pytest.mark.parametrize("expert", [1, 12])  # on the source's node, and on another
def test_a_silent_expert_is_named_with_layer_and_microbatch(model, tmp_path, expert):
    async def main() -> None:
        async with inproc_cluster(model, tmp_path, block_deadline_s=0.4, **LAYOUT) as cluster:
            silent = cluster.services[ProcessId(Role.EXPERT, expert)]
            silent.batcher.add = lambda layer, call: call.item[2].release()
            with pytest.raises(
                AtollError, match=rf"expert-{expert} within 0\.4 s \(layer \d, micro-batch 0"
            ):
                await cluster.logits(TOKENS)
            assert all(r.flow.num_in_flight == 0 for r in cluster.of(Role.ROUTER))

    asyncio.run(main())


def test_buffers_come_back(model, tmp_path):
    async def main() -> None:
        async with inproc_cluster(model, tmp_path, **LAYOUT) as cluster:
            await cluster.logits(TOKENS)
            await asyncio.sleep(0.05)
            outstanding = {
                str(p): s.transport.pool.outstanding for p, s in cluster.services.items()
            }
        assert not any(outstanding.values()), outstanding

    asyncio.run(main())
