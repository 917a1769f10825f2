"""From plan to plan while blocks are on their way: no bit changes, and what is interrupted is undone.

The services are the real ones; the gateway's part is its `Backends` and `Rebalancer` on the same fabric.
"""

import asyncio
import random
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.errors import ConfigError, Retryable
from common.ids import ProcessId, Role
from common.model import names
from common.model.checkpoint import Checkpoint
from common.model.hf_config import load_config
from common.placement.plan import Plan
from common.plan_file import placement_path, read_placement
from common.plan_search import search_apart
from common.status import ProcessStatus
from services.gateway.backends import Backends
from services.gateway.links import ClusterDialler
from tests.inproc_cluster import InprocCluster, inproc_cluster
from tests.oracle.configs import CONFIGS
from tests.oracle.reference import build_checkpoint

TOKENS = list(range(2, 42))
LAYOUT = {"nodes": 3, "attention": 2, "wire": "fp32", "ep": 18}
NODES = (0,) * 6 + (1,) * 6 + (2,) * 6
EXPERTS = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return build_checkpoint(tmp_path_factory.getbasetemp() / "rebalance", CONFIGS[0])


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory) -> torch.Tensor:
    async def main() -> torch.Tensor:
        async with inproc_cluster(model, tmp_path_factory.mktemp("run"), **LAYOUT) as cluster:
            return await cluster.logits(TOKENS)

    return asyncio.run(main())


class Silent:
    """Nobody has sent the gateway a request."""

    def on_tokens(self, worker, event) -> None: ...

    def on_worker(self, worker, ready) -> None: ...

    def on_worker_lost(self, worker, reason) -> None: ...


class Gateway:
    """Links to every router and attention worker, as a gateway has them; `stop` is a crash."""

    def __init__(self, cluster: InprocCluster) -> None:
        spec = cluster.config.process(Role.GATEWAY, 0)
        self.backends = Backends(cluster.config, ProcessStatus.of(spec.id, node=0))
        self.backends.listener = Silent()
        self.rebalancer = self.backends.rebalancer
        self._transport = cluster.fabric.transport()
        dialler = ClusterDialler(cluster.config, 0, self._transport)
        self._tasks = [
            cluster.tasks.create_task(self._keep(dialler, s.address))
            for s in cluster.config.processes()
            if s.id.role in (Role.ROUTER, Role.ATTENTION)
        ]

    async def _keep(self, dialler, address) -> None:
        await dialler.keep(address, self.backends)

    def stop(self) -> None:
        self._transport.crash()
        for task in self._tasks:
            task.cancel()

    async def settled(self) -> "Gateway":
        """Wait until all have reported."""
        await until(lambda: self._is_settled(), "the gateway knows every router")
        return self

    def _is_settled(self) -> bool:
        try:
            self.rebalancer._settled()
        except Retryable:
            return False
        return True


async def until(condition, what: str) -> None:
    try:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"never: {what}") from None


@asynccontextmanager
async def running(model, run_dir, **options):
    async with inproc_cluster(model, run_dir, **(LAYOUT | options)) as cluster:
        gateway = await Gateway(cluster).settled()
        yield cluster, gateway
        gateway.stop()


def shuffled(model: Path, seed: int, *, replicas: int = 0) -> Plan:
    """Every layer's experts anywhere, `replicas` of them twice."""
    rng = random.Random(seed)
    holders = {}
    for layer in load_config(model).moe_layers:
        places = rng.sample(range(18), 18)
        layer_holders = [(worker,) for worker in places[:EXPERTS]]
        for expert, worker in zip(
            rng.sample(range(EXPERTS), replicas), places[EXPERTS:], strict=False
        ):
            layer_holders[expert] = (*layer_holders[expert], worker)
        holders[layer] = tuple(layer_holders)
    return Plan(0, holders, NODES)


def served(cluster) -> list[list[int]]:
    return [router.flow.epochs.served for router in cluster.of(Role.ROUTER)]


def nothing_is_left(cluster: InprocCluster, plan: Plan) -> None:
    """Exactly the plan's experts are held, nothing is owed, every buffer is back."""
    for expert in cluster.of(Role.EXPERT):
        assert set(expert.bank.weights) == set(plan.residents(expert.spec.id.index))
        assert set(expert.bank.hashes) == set(expert.bank.weights)
    for router in cluster.of(Role.ROUTER):
        assert not any(router.flow.calls.fleet.outstanding)
        assert router.flow.num_in_flight == 0
        assert not router.flow.epochs.candidate
    left = {str(p): s.transport.pool.outstanding for p, s in cluster.services.items()}
    assert not any(left.values()), left


class Stream:
    """Forward passes one after the other, on both attention workers, until told to stop."""

    def __init__(self, cluster: InprocCluster) -> None:
        self._cluster, self._stop = cluster, False
        self._tasks = [asyncio.ensure_future(self._run(worker)) for worker in (0, 1)]

    async def _run(self, worker: int) -> list[torch.Tensor]:
        logits = []
        while not self._stop:
            logits.append(await self._cluster.logits(TOKENS, worker=worker))
        return logits

    async def finish(self) -> list[torch.Tensor]:
        self._stop = True
        return [logits for each in await asyncio.gather(*self._tasks) for logits in each]


@pytest.mark.parametrize("divide", ["destinations", "blocks"])
@pytest.mark.parametrize("routers", [1, 3])
@pytest.mark.parametrize("replicas", [0, 2])
def test_blocks_on_their_way_follow_their_own_epoch(
    model, expected, tmp_path, routers, replicas, divide
):
    """Rails must agree on the epoch of each block, or a pair is computed twice or not at all."""

    async def main() -> None:
        def scramble(sender, receiver, random):
            return random.randrange(0, 3000)

        layout = {"routers": routers, "routers_divide": divide}
        async with running(model, tmp_path, **layout, script=scramble) as (cluster, gateway):
            stream = Stream(cluster)
            for seed in range(4):
                plan = shuffled(model, seed, replicas=replicas)
                assert await gateway.rebalancer.carry_out(plan) == seed + 2
                assert served(cluster) == [[seed + 2]] * 3 * routers
            results = await stream.finish()
            assert len(results) > 8
            for logits in results:
                assert torch.equal(logits, expected)
            nothing_is_left(cluster, plan)
            assert all(r.flow.counters.failed == 0 for r in cluster.of(Role.ROUTER))
            trace = await gateway.rebalancer.trace()  # of routers that had no block, too
            assert trace.num_experts == EXPERTS

    asyncio.run(main())


def test_slices_move_as_experts_do(model, tmp_path):
    """Counters, plans and what is loaded are those of the sliced model; where slices lie changes no bit."""

    async def main() -> None:
        options = {"expert_slices": 2, "ep": 32, "nodes": 2}
        async with running(model, tmp_path, **options) as (cluster, gateway):
            before = await cluster.logits(TOKENS)
            layers = load_config(model).moe_layers
            places = random.Random(3).sample(range(32), 32)
            plan = Plan(
                0, {at: tuple((w,) for w in places) for at in layers}, (0,) * 16 + (1,) * 16
            )
            await gateway.rebalancer.carry_out(plan)
            assert torch.equal(await cluster.logits(TOKENS), before)
            nothing_is_left(cluster, plan)
            trace = await gateway.rebalancer.trace()
            assert (trace.num_experts, trace.top_k) == (32, 2 * load_config(model).top_k)
            assert (trace.expert_ids[..., ::2] + 1 == trace.expert_ids[..., 1::2]).all()

    asyncio.run(main())


def test_blocks_of_two_epochs_are_on_their_way_at_once(model, expected, tmp_path):
    """An attention worker that is slow keeps the old plan alive: it is retired after that one's last block only."""

    async def main() -> None:
        async with running(model, tmp_path, script=lambda *_: 200) as (cluster, gateway):
            held = cluster.services[ProcessId(Role.EXPERT, 9)]
            compute, held._run = held._run, lambda: None  # it computes nothing for now
            step = asyncio.ensure_future(cluster.logits(TOKENS))
            moe = cluster.of(Role.ATTENTION)[0].moe
            await until(lambda: len(held.batcher), "a block is on its way")
            moved = asyncio.ensure_future(gateway.rebalancer.carry_out(shuffled(model, 1)))
            await until(lambda: moe.epoch == 2, "the new epoch is in force")
            await until(lambda: cluster.of(Role.ATTENTION)[1]._told_epoch == 2, "the other is done")
            for _ in range(60):
                await asyncio.sleep(0.01)
                assert served(cluster) == [[1, 2]] * 3
                assert moe.oldest_epoch == 1
            held._run = compute
            held._scheduled = False
            held._schedule()
            assert torch.equal(await step, expected)
            assert await moved == 2
            assert served(cluster) == [[2]] * 3

    asyncio.run(main())


def test_a_worker_lost_while_it_loads_undoes_all(model, expected, tmp_path):
    async def main() -> None:
        async with running(model, tmp_path) as (cluster, gateway):
            stream = Stream(cluster)
            victim = cluster.services[ProcessId(Role.EXPERT, 4)]
            read = victim.holdings.read

            def killed(place):
                victim.loop.call_soon_threadsafe(victim.transport.crash)
                return read(place)

            victim.holdings.read = killed
            with pytest.raises(
                Retryable,
                match="epoch 2 was given up, epoch 1 stays: expert-4 was lost while it loaded",
            ):
                await gateway.rebalancer.carry_out(shuffled(model, 3))
            await cluster.start(ProcessId(Role.EXPERT, 4))
            await until(lambda: served(cluster) == [[1]] * 3, "rolled back")
            for logits in await stream.finish():
                assert torch.equal(logits, expected)
            await gateway.settled()
            assert await gateway.rebalancer.carry_out(shuffled(model, 3)) == 3
            nothing_is_left(cluster, shuffled(model, 3))
            assert torch.equal(await cluster.logits(TOKENS), expected)

    asyncio.run(main())


@pytest.mark.parametrize("victim", [ProcessId(Role.EXPERT, 7), ProcessId(Role.ROUTER, 1)], ids=str)
def test_a_process_lost_between_prepare_and_commit(model, expected, tmp_path, victim):
    """All but one are ready when it dies."""

    async def main() -> None:
        async with running(model, tmp_path) as (cluster, gateway):
            stream = Stream(cluster)
            routers = cluster.of(Role.ROUTER)
            vote, routers[2].placement._vote = routers[2].placement._vote, lambda: None
            moved = asyncio.ensure_future(gateway.rebalancer.carry_out(shuffled(model, 3)))
            await until(
                lambda: all(
                    r.flow.epochs.candidate and r.flow.epochs.candidate.ready for r in routers[:2]
                ),
                "two are ready",
            )
            cluster.crash(victim)
            with pytest.raises(
                Retryable, match=f"epoch 1 stays: {victim} (was lost|is not connected)"
            ):
                await moved
            routers[2].placement._vote = vote
            vote()
            await cluster.start(victim)
            await until(lambda: served(cluster) == [[1]] * 3, "rolled back")
            for logits in await stream.finish():
                assert torch.equal(logits, expected)

    asyncio.run(main())


def test_a_worker_lost_after_the_decision_comes_back_with_both_plans(model, expected, tmp_path):
    async def main() -> None:
        async with running(model, tmp_path) as (cluster, gateway):
            plan, stream = shuffled(model, 5), Stream(cluster)
            routers, victim = cluster.of(Role.ROUTER), ProcessId(Role.EXPERT, 8)
            moved = asyncio.ensure_future(gateway.rebalancer.carry_out(plan))
            await until(lambda: any(r.flow.epochs.current.epoch == 2 for r in routers), "decided")
            cluster.crash(victim)
            await cluster.start(victim)
            assert await moved == 2
            for logits in await stream.finish():
                assert torch.equal(logits, expected)
            nothing_is_left(cluster, plan)

    asyncio.run(main())


def flip_a_byte(model: Path, layer: int, expert: int) -> None:
    name = next(iter(names.ffn_weights(names.layer(layer, names.expert(expert)))))
    with Checkpoint(model) as checkpoint:
        (path,) = checkpoint.files
        wanted = bytes(checkpoint.content(name))
    data = bytearray(path.read_bytes())
    data[data.index(wanted)] ^= 1
    path.write_bytes(data)


def test_a_wrong_hash_undoes_all(tmp_path):
    """The checkpoint on disk changes behind the cluster's back."""
    model = build_checkpoint(tmp_path / "damaged", CONFIGS[0])
    plan = Plan(0, shuffled(model, 2).holders, NODES)
    layer = min(plan.holders)
    # an expert that moves
    expert = next(e for e, (worker,) in enumerate(plan.holders[layer]) if worker != e)

    async def main() -> None:
        async with running(model, tmp_path) as (cluster, gateway):
            before = await cluster.logits(TOKENS)
            flip_a_byte(model, layer, expert)
            with pytest.raises(
                Retryable,
                match=rf"epoch 1 stays: expert-\d+ holds \w+ as expert {expert} of layer {layer}, the",
            ):
                await gateway.rebalancer.carry_out(plan)
            await until(lambda: served(cluster) == [[1]] * 3, "rolled back")
            assert torch.equal(await cluster.logits(TOKENS), before)

    asyncio.run(main())


def test_a_gateway_lost_before_the_decision_undoes_all(model, expected, tmp_path):
    async def main() -> None:
        async with running(model, tmp_path) as (cluster, gateway):
            routers = cluster.of(Role.ROUTER)
            vote, routers[2].placement._vote = routers[2].placement._vote, lambda: None
            moved = asyncio.ensure_future(gateway.rebalancer.carry_out(shuffled(model, 3)))
            await until(lambda: routers[0].flow.epochs.candidate, "prepared")
            gateway.stop()
            moved.cancel()
            await asyncio.wait([moved])
            routers[2].placement._vote = vote
            vote()
            assert torch.equal(await cluster.logits(TOKENS), expected)
            assert served(cluster) == [[1, 2]] * 3, "who was ready waits for the gateway's word"
            successor = await Gateway(cluster).settled()
            assert served(cluster) == [[1]] * 3
            assert await successor.rebalancer.carry_out(shuffled(model, 3)) == 2
            assert torch.equal(await cluster.logits(TOKENS), expected)
            successor.stop()

    asyncio.run(main())


def test_a_gateway_lost_after_the_decision_has_it_finished_by_the_next(model, expected, tmp_path):
    async def main() -> None:
        async with running(model, tmp_path) as (cluster, gateway):
            plan, routers = shuffled(model, 3), cluster.of(Role.ROUTER)
            tell, told = gateway.backends.tell, []

            def only_one(process, frame):
                if frame["type"] != "commit" or process.index == 1:
                    told.append(frame["type"])
                    tell(process, frame)

            gateway.rebalancer.send = only_one
            moved = asyncio.ensure_future(gateway.rebalancer.carry_out(plan))
            await until(lambda: routers[1].flow.epochs.current.epoch == 2, "decided")
            gateway.stop()
            moved.cancel()
            await asyncio.wait([moved])
            # in force at one, prepared at the others: whatever starts anywhere is served
            assert [r.flow.epochs.current.epoch for r in routers] == [1, 2, 1]
            for worker in (0, 1):
                assert torch.equal(await cluster.logits(TOKENS, worker=worker), expected)
            successor = await Gateway(cluster).settled()
            assert served(cluster) == [[2]] * 3
            await until(lambda: all(len(e.bank.weights) == len(plan.residents(e.spec.id.index))
                                    for e in cluster.of(Role.EXPERT)), "unloaded")  # fmt: skip
            nothing_is_left(cluster, plan)
            successor.stop()

    asyncio.run(main())


def test_a_caller_that_gives_up_before_the_decision_undoes_all(model, tmp_path):
    async def main() -> None:
        async with running(model, tmp_path) as (cluster, gateway):
            routers = cluster.of(Role.ROUTER)
            routers[2].placement._vote = lambda: None
            moved = asyncio.ensure_future(gateway.rebalancer.carry_out(shuffled(model, 3)))
            await until(lambda: routers[0].flow.epochs.candidate, "prepared")
            with pytest.raises(Retryable, match="a rebalance to epoch 2 is under way"):
                await gateway.rebalancer.carry_out(shuffled(model, 4))
            moved.cancel()
            await asyncio.wait([moved])
            await until(lambda: served(cluster) == [[1]] * 3, "rolled back")

    asyncio.run(main())


def test_restarted_processes_come_up_with_the_plan_in_force(model, expected, tmp_path):
    async def main() -> None:
        async with running(model, tmp_path) as (cluster, gateway):
            plan = shuffled(model, 6, replicas=2)
            await gateway.rebalancer.carry_out(plan)
            for process in (
                ProcessId(Role.EXPERT, 2), ProcessId(Role.ROUTER, 0), ProcessId(Role.ROUTER, 2),
                ProcessId(Role.ATTENTION, 1),
            ):  # fmt: skip
                cluster.crash(process)
                service = await cluster.start(process)
                if process.role is Role.EXPERT:
                    assert set(service.bank.weights) == set(plan.residents(2)), (
                        "nothing is loaded twice"
                    )
                await until(lambda: cluster.is_ready, f"{process} is back")
            assert served(cluster) == [[2]] * 3
            for worker in (0, 1):
                assert torch.equal(await cluster.logits(TOKENS, worker=worker), expected)
            await gateway.settled()
            assert gateway.rebalancer.in_force == replace(plan, epoch=2)

    asyncio.run(main())


def test_a_router_whose_host_lost_its_files_is_told_the_plan_in_force(model, expected, tmp_path):
    async def main() -> None:
        async with running(model, tmp_path) as (cluster, gateway):
            await gateway.rebalancer.carry_out(shuffled(model, 6))
            stream = Stream(cluster)
            victim = cluster.config.process(Role.ROUTER, 1)
            cluster.crash(victim.id)
            placement_path(cluster.config, victim.id).unlink()
            await cluster.start(victim.id)
            await until(lambda: cluster.is_ready, "it is back")
            assert served(cluster) == [[2]] * 3
            for logits in await stream.finish():
                assert torch.equal(logits, expected)

    asyncio.run(main())


def test_a_whole_cluster_comes_up_with_the_plan_that_was_in_force(model, expected, tmp_path):
    async def main() -> None:
        plan = shuffled(model, 7)
        async with running(model, tmp_path) as (cluster, gateway):
            await gateway.rebalancer.carry_out(plan)
        async with running(model, tmp_path) as (cluster, gateway):
            assert served(cluster) == [[2]] * 3
            assert torch.equal(await cluster.logits(TOKENS), expected)
            path = placement_path(cluster.config, ProcessId(Role.ROUTER, 0))
        assert read_placement(path, Plan(5, plan.holders, NODES)) is None, "another TOML's"

    asyncio.run(main())


def test_a_plan_for_another_cluster_is_refused(model, tmp_path):
    async def main() -> None:
        async with running(model, tmp_path) as (cluster, gateway):
            plan = shuffled(model, 1)
            with pytest.raises(ConfigError, match="the plan is for 17 expert workers"):
                await gateway.rebalancer.carry_out(Plan(1, plan.holders, NODES[:-1]))
            crowded = {
                layer: tuple((0,) for _ in workers) for layer, workers in plan.holders.items()
            }
            with pytest.raises(ConfigError, match="experts_per_gpu allows 1"):
                await gateway.rebalancer.carry_out(Plan(1, crowded, NODES))
            assert served(cluster) == [[1]] * 3

    asyncio.run(main())


def test_the_search_sees_the_traffic_and_keeps_the_kind_of_plan(model, expected, tmp_path):
    async def main() -> None:
        async with running(model, tmp_path) as (cluster, gateway):
            with pytest.raises(Retryable, match="has had 0 rows so far"):
                await gateway.rebalancer.search()
            for _ in range(2):
                await asyncio.gather(*(cluster.logits(TOKENS, worker=w) for w in (0, 1)))
            trace = await gateway.rebalancer.trace()
            assert trace.num_tokens == 2 * 2 * len(TOKENS)
            found = await gateway.rebalancer.search()
            assert found.plan.spares == found.plan.spares[:2], "16 experts on 18 workers"
            assert len(found.plan.spares) == 2
            assert not any(found.plan.has_replicas(layer) for layer in found.plan.holders)
            assert found.after.link_s <= found.before.link_s
            await gateway.rebalancer.carry_out(found.plan)
            assert torch.equal(await cluster.logits(TOKENS), expected)
            with_replicas = await gateway.rebalancer.search(replicas=2)
            assert all(sum(map(len, layer)) == 18 for layer in with_replicas.plan.holders.values())

    asyncio.run(main())


@pytest.mark.parametrize(("wanted_gain", "moves"), [(0.0, True), (1.0, False)])
def test_by_itself_only_when_it_is_worth_it(
    model, expected, tmp_path, monkeypatch, wanted_gain, moves
):
    async def main() -> None:
        async with running(model, tmp_path) as (cluster, gateway):
            section = replace(
                cluster.config.placement, rebalance_every_s=0.01, rebalance_gain=wanted_gain, rebalance_patience=2
            )  # fmt: skip
            gateway.rebalancer.config = replace(cluster.config, placement=section)
            looks = []

            async def counted(wanted, **limit):
                looks.append(await search_apart(wanted, **limit))
                return looks[-1]

            monkeypatch.setattr("services.gateway.rebalance.search_apart", counted)
            watch = cluster.tasks.create_task(gateway.rebalancer.watch())
            await asyncio.sleep(0.2)
            assert looks == [], "there was no traffic to look at"
            stream = Stream(cluster)
            await until(lambda: len(looks) > 2, "three looks")
            watch.cancel()
            for logits in await stream.finish():
                assert torch.equal(logits, expected)
            assert (gateway.rebalancer.in_force.epoch > 1) is moves

    asyncio.run(main())
