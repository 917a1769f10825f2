"""Going from plan to plan under every mishap that hypothesis can think of.

The gateway's `Rebalancer`, the routers' `Placement` and the attention workers' `MoeClient` are the real ones; links are
queues whose messages arrive in order, one by one, whenever the test says. Two nodes with a router, an attention worker
and two expert workers each. At every moment:

    a block on its way is served by every router, with workers that must hold what it needs;
    a worker that may be asked holds what all binding plans give it;
    a plan that is in force anywhere is never given up.

And once nothing more goes wrong, all serve one plan, and workers hold that one's experts only.
"""

import json
import random
from collections import deque
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import config as cluster_config
from common.errors import LinkClosed, Retryable
from common.ids import ProcessId, Role
from common.model.manifest import Manifest
from common.placement.handover import Report, next_frames
from common.placement.plan import Plan
from common.plan_file import placement_path, read_placement
from common.transport.base import Hello
from common.transport.outbox import Outbox
from common.wire.header import Wire
from services.attention.moe_client import MoeClient
from services.gateway.rebalance import Rebalancer
from services.router.epochs import Epochs
from services.router.placement import Placement

NODES, LAYER = (0, 0, 1, 1), 1
GATEWAY = ProcessId(Role.GATEWAY, 0)
MANIFEST = Manifest("m", {(LAYER, expert): f"hash {expert}" for expert in range(4)})
MODEL = SimpleNamespace(moe_layers=[LAYER], num_experts=4)


def plan_of(order, epoch=1) -> Plan:
    return Plan(epoch, {LAYER: tuple((worker,) for worker in order)}, NODES)


BASE = plan_of(range(4))


class End:
    """One end of a link: what is sent into it waits in `queue` until the test delivers it to the other end."""

    def __init__(self, peer: ProcessId, facts=None) -> None:
        node = peer.index if peer.role is not Role.EXPERT else NODES[peer.index]
        self.peer = Hello(peer, node, 1, "m", 1, "fp32", facts=facts or {})
        self.queue: deque = deque()
        self.is_open = True

    def send_control(self, message) -> None:
        if not self.is_open:
            raise LinkClosed("closed")
        self.queue.append(json.loads(json.dumps(message)))

    def close(self, reason) -> None:
        raise AssertionError(reason)


class World:
    def __init__(self, directory: Path) -> None:
        document = {
            "cluster": {"run_dir": str(directory), "wire": "fp32"}, "model": {"path": str(directory)},
            "nodes": [{"attention": 1, "experts": 2}] * 2,
        }  # fmt: skip
        self.config = cluster_config.parse(document, source="test")
        self.held: dict[int, set] = {w: set(BASE.residents(w)) for w in range(4)}
        self.ends: dict[tuple[ProcessId, ProcessId], End] = {}  # (who sends, who gets)
        self.routers: dict[int, Placement] = {}
        self.moes: dict[int, MoeClient] = {}
        self.told: dict[int, int] = {}
        self.out_of_date: set[int] = set()  # routers that have lost what they wrote down
        self.has_been_ready = [False, False]  # attention workers: could have got requests
        self.most = 1  # the latest epoch that was in force anywhere
        self.gateway = self._new_gateway()
        for index in range(2):
            self.moes[index] = MoeClient(
                index, 8, Wire.FP32, 1, None, 1.0, routers={index: Outbox("router")}
            )
            self.told[index] = 1
        for index in range(2):
            self.start_router(index)
        for index in range(2):
            self.connect(attention(index), GATEWAY)

    # ---- processes -----------------------------------------------------------------------------

    def _new_gateway(self) -> Rebalancer:
        return Rebalancer(self.config, self._send, frozenset)

    def _send(self, process, frame) -> None:
        if (GATEWAY, process) not in self.ends:
            raise LinkClosed(f"{process} is not connected")
        self.ends[GATEWAY, process].send_control(frame)

    def start_router(self, index: int) -> None:
        """A new process, which knows what its predecessor wrote down."""
        flow = SimpleNamespace(
            plan=BASE, epochs=Epochs(BASE, index),
            experts={w: Outbox(f"expert-{w}") for w in range(4) if NODES[w] == index},
            routers={1 - index: Outbox("router")},
        )  # fmt: skip
        spec = self.config.process(Role.ROUTER, index)
        self.routers[index] = Placement(self.config, spec, MODEL, MANIFEST, flow, lambda role: None)
        for worker in flow.experts:
            self.connect(router(index), expert(worker))
        self.connect(router(index), attention(index))
        self.connect(router(index), GATEWAY)
        if 1 - index in self.routers:
            self.connect(router(index), router(1 - index))

    def stop(self, process: ProcessId) -> list[ProcessId]:
        """All its links close at once."""
        peers = [b for a, b in self.ends if a == process]
        for peer in peers:
            self.disconnect(process, peer)
        return peers

    def connect(self, a: ProcessId, b: ProcessId) -> None:
        self.disconnect(a, b)
        to_b, to_a = End(b, self._facts(b)), End(a, self._facts(a))
        self.ends[a, b], self.ends[b, a] = to_b, to_a
        self._opened(a, to_b)
        self._opened(b, to_a)

    def disconnect(self, a: ProcessId, b: ProcessId) -> None:
        for here, there in ((a, b), (b, a)):
            end = self.ends.pop((here, there), None)
            if end is not None:
                end.is_open = False
                self._closed(here, end)

    def _facts(self, process: ProcessId):
        if process.role is Role.EXPERT:
            return {"experts": self.experts_of(process.index)}
        return {}

    def experts_of(self, worker: int) -> list:
        return [[*place, MANIFEST.expert_hashes[place]] for place in sorted(self.held[worker])]

    def _opened(self, me: ProcessId, end: End) -> None:
        if me.role is Role.ROUTER:
            self.routers[me.index].opened(end)
        elif me == GATEWAY:
            self.gateway.opened(end.peer.process)
        elif me.role is Role.ATTENTION and end.peer.process == GATEWAY:
            end.send_control({"type": "epochs", "oldest": self.told[me.index]})

    def _closed(self, me: ProcessId, end: End) -> None:
        peer = end.peer.process
        if me.role is Role.ROUTER:
            placement = self.routers[me.index]
            if peer.role is Role.EXPERT:
                placement._flow.experts[peer.index].closed(end)
            elif peer.role is Role.ROUTER:
                placement._flow.routers[peer.index].closed(end)
            placement.closed(end)
        elif me == GATEWAY:
            self.gateway.closed(peer)
        elif me.role is Role.ATTENTION and peer == GATEWAY:
            self.moes[me.index]._pending.clear()  # blocks of requests that the gateway has failed
        elif me.role is Role.ATTENTION and peer.role is Role.ROUTER:
            self.moes[me.index].routers[peer.index].closed(end)

    # ---- what can happen -----------------------------------------------------------------------

    def deliver(self, key, *, fails: bool = False) -> None:
        """The oldest message of a link arrives."""
        sender, me = key
        message, back = self.ends[key].queue.popleft(), self.ends[me, sender]
        if me.role is Role.ROUTER:
            self.routers[me.index].on_control(back, message)
        elif me == GATEWAY:
            self.gateway.on_frame(sender, message)
        elif me.role is Role.EXPERT:
            wanted = {tuple(place) for place in message["experts"]}
            lacking = wanted - self.held[me.index]
            error = "the disk is broken" if fails and lacking else ""
            self.held[me.index] = wanted - lacking if error else wanted
            held = self.experts_of(me.index)
            back.send_control(
                {"type": "held", "id": message["id"], "experts": held, "error": error}
            )
        elif message["type"] == "epoch":
            self.has_been_ready[me.index] |= self.moes[me.index].in_force(back, message["epoch"])

    def tick(self, index: int) -> None:
        """An attention worker looks at its blocks."""
        oldest = self.moes[index].oldest_epoch
        if oldest != self.told[index]:
            self.told[index] = oldest
            if (attention(index), GATEWAY) in self.ends:
                self.ends[attention(index), GATEWAY].send_control(
                    {"type": "epochs", "oldest": oldest}
                )

    def begin(self, order) -> None:
        """Ask for a rebalance, as `Rebalancer.carry_out` does."""
        gateway = self.gateway
        try:
            gateway._settled()
        except Retryable:
            return
        gateway._last_epoch = epoch = gateway.next_epoch()
        gateway._goal, gateway._committing = plan_of(order, epoch), False
        gateway._advance()

    def restart(self, process: ProcessId) -> None:
        peers = self.stop(process)
        if process.role is Role.ROUTER:
            self.start_router(process.index)
            return
        if process == GATEWAY:
            self.gateway = self._new_gateway()
        elif process.role is Role.EXPERT:
            left = read_placement(placement_path(self.config, router(NODES[process.index])), BASE)
            plans = left.plans if left else (BASE,)
            self.held[process.index] = {p for plan in plans for p in plan.residents(process.index)}
        elif process.role is Role.ATTENTION:  # its requests are gone with it
            index = process.index
            self.moes[index] = MoeClient(
                index, 8, Wire.FP32, 1, None, 1.0, routers={index: Outbox("router")}
            )
            self.told[index] = 1
            self.has_been_ready[index] = False
        for peer in peers:
            self.connect(process, peer)

    def boot(self, index: int) -> None:
        """A host starts anew, and what its router wrote down is lost. Once at a time, and not amid a rebalance."""
        everywhere = [placement.epochs for placement in self.routers.values()]
        if all(epochs.served == [self.most] for epochs in everywhere):
            self.out_of_date.add(index)
            placement_path(self.config, router(index)).unlink(missing_ok=True)
            self.restart(attention(index))
            self.restart(router(index))

    # ---- what must hold ------------------------------------------------------------------------

    def check(self) -> None:
        for placement in self.routers.values():
            self.most = max(self.most, placement.epochs.current.epoch)
        assert max(p.epochs.current.epoch for p in self.routers.values()) == self.most
        for index, placement in self.routers.items():
            epochs = placement.epochs
            binding = {plan.epoch for plan in epochs.binding_plans}
            if self.most in binding:
                self.out_of_date.discard(index)
            elif index in self.out_of_date:
                assert self.routers[1 - index]._flow.routers[index].link is None
                assert self.moes[index].routers[index].link is None, "asked before it knows better"
                continue
            for moe in self.moes.values():
                for pending in moe._pending.values():
                    assert pending.epoch in binding, f"{epochs!r} and a block of {pending.epoch}"
            assert self.most in binding, epochs
            for worker, outbox in placement._flow.experts.items():
                if outbox.link is not None:
                    assert epochs.binding(worker) <= self.held[worker]

    def settle(self) -> None:
        """Nothing goes wrong any more."""
        for moe in self.moes.values():
            moe._pending.clear()
        for _ in range(1000):
            for index in range(2):
                self.tick(index)
            waiting = [key for key, end in self.ends.items() if end.queue]
            if not waiting:
                break
            self.deliver(waiting[0])
        else:
            raise AssertionError("it never comes to rest")
        self.check()
        plans = [p.epochs.current for p in self.routers.values()]
        assert plans[0] == plans[1]
        for placement in self.routers.values():
            assert placement.epochs.served == [self.most]
            assert placement.epochs.candidate is None
            assert all(box.link is not None for box in placement._flow.experts.values())
            assert all(box.link is not None for box in placement._flow.routers.values())
        assert self.held == {w: set(plans[0].residents(w)) for w in range(4)}
        for index, moe in self.moes.items():
            assert moe.epoch == self.most
            assert moe.routers[index].link is not None
        assert self.gateway._settled() == plans[0]


def router(index: int) -> ProcessId:
    return ProcessId(Role.ROUTER, index)


def attention(index: int) -> ProcessId:
    return ProcessId(Role.ATTENTION, index)


def expert(index: int) -> ProcessId:
    return ProcessId(Role.EXPERT, index)


PROCESSES = [GATEWAY, *map(router, range(2)), *map(attention, range(2)), *map(expert, range(4))]
MISHAPS = ("restart", "drop", "fail", "boot")


def happen(world: World, kind: str, number: int) -> None:
    """One event; `number` says which of those that are possible."""
    waiting = sorted((key for key, end in world.ends.items() if end.queue), key=str)
    if kind in ("deliver", "fail") and waiting:
        world.deliver(waiting[number % len(waiting)], fails=kind == "fail")
    elif kind == "begin":
        order = list(range(4))
        random.Random(number).shuffle(order)
        world.begin(order)
    elif kind == "restart":
        world.restart(PROCESSES[number % len(PROCESSES)])
    elif kind == "boot":
        world.boot(number % 2)
    elif kind == "drop":  # a link only: both ends live on
        keys = sorted(world.ends, key=str)
        world.connect(*keys[number % len(keys)])
    elif kind == "block":
        moe = world.moes[number % 2]
        if world.has_been_ready[number % 2]:
            moe._pending[number] = SimpleNamespace(epoch=moe.epoch)
    elif kind == "answer":
        pending = world.moes[number % 2]._pending
        if pending:
            del pending[min(pending)]
    elif kind == "tick":
        world.tick(number % 2)


KINDS = st.sampled_from(
    ["deliver"] * 12 + ["begin"] * 2 + ["block", "answer", "tick"] * 2 + list(MISHAPS)
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(KINDS, st.integers(0, 1 << 16)), max_size=250))
def test_whatever_happens(events):
    with TemporaryDirectory() as directory:
        world = World(Path(directory))
        for kind, number in events:
            happen(world, kind, number)
            world.check()
        world.settle()


@pytest.mark.parametrize("seed", range(40))
def test_a_long_life(seed):
    """Longer than hypothesis goes: several rebalances, one event in sixty-six a mishap."""
    chance = random.Random(seed)
    with TemporaryDirectory() as directory:
        world = World(Path(directory))
        usual = ("deliver",) * 12 + ("begin", "block", "answer", "answer", "tick", "tick")
        for _ in range(1000):
            kinds = MISHAPS if chance.random() < 0.015 else usual
            happen(world, chance.choice(kinds), chance.randrange(1 << 16))
            world.check()
        world.settle()
        assert world.most > 2, "nothing was ever rebalanced"


REPORT = Report(BASE, (1,))
GOAL = plan_of((1, 0, 2, 3), 2)


@pytest.mark.parametrize(
    ("reports", "oldest", "goal", "frames", "failed", "done"),
    [
        ({0: REPORT, 1: REPORT}, {}, None, {}, "", True),
        ({0: REPORT, 1: None}, {}, GOAL, {}, "router-1 is not connected", False),
        ({0: REPORT, 1: REPORT}, {}, GOAL, {0: "prepare", 1: "prepare"}, "", False),
        ({0: Report(BASE, (1, 2), 2, True), 1: Report(BASE, (1, 2), 2)}, {}, GOAL, {}, "", False),
        (
            {0: Report(BASE, (1, 2), 2, True), 1: Report(BASE, (1, 2), 2, True)},
            {}, GOAL, {0: "commit", 1: "commit"}, "", False,
        ),
        (
            {0: Report(BASE, (1, 2), 2, True), 1: Report(BASE, (1, 2), 2, False, "no room")},
            {}, GOAL, {0: "abort", 1: "abort"}, "no room", False,
        ),
        # the one that is not there may have put it in force
        ({0: Report(BASE, (1, 2), 2, True), 1: None}, {}, None, {}, "", False),
        ({0: Report(BASE, (1, 2), 2, True), 1: Report(GOAL, (1, 2))}, {}, None, {0: "commit"}, "", False),
        ({0: Report(GOAL, (1, 2)), 1: Report(GOAL, (1, 2))}, {0: 1}, GOAL, {}, "", False),
        ({0: Report(GOAL, (1, 2)), 1: Report(GOAL, (1, 2))}, {0: None}, GOAL, {}, "", False),
        (
            {0: Report(GOAL, (1, 2)), 1: Report(GOAL, (1, 2))},
            {0: 2}, GOAL, {0: "retire", 1: "retire"}, "", False,
        ),
        ({0: Report(GOAL, (2,)), 1: Report(GOAL, (2,))}, {0: 2}, GOAL, {}, "", True),
    ],
)  # fmt: skip
def test_what_each_router_is_told(reports, oldest, goal, frames, failed, done):
    step = next_frames(reports, oldest, goal)
    assert {router: kind for router, (kind, _) in step.frames.items()} == frames
    assert (step.failed, step.done) == (failed, done)


def test_what_a_worker_held_before_it_was_told_to_drop_it_does_not_count():
    """Prepared, given up and prepared again faster than the worker answers."""
    with TemporaryDirectory() as directory:
        world = World(Path(directory))
        world.settle()
        placement, worker = world.routers[0], expert(0)
        gateway, other = world.ends[router(0), GATEWAY], plan_of((1, 0, 2, 3))
        for epoch in (2, 3):
            plan = json.loads(json.dumps(Plan(epoch, other.holders, NODES).to_json()))
            placement.on_control(gateway, {"type": "prepare", "plan": plan})
            if epoch == 2:
                world.deliver((router(0), worker))  # it loads; its answer is on its way
                placement.on_control(gateway, {"type": "abort"})
        world.deliver((worker, router(0)))
        assert not placement.epochs.candidate.ready
        world.check()
        while any(
            world.ends[key].queue
            for key in list(world.ends)
            if Role.EXPERT in (key[0].role, key[1].role)
        ):
            for key in list(world.ends):
                if Role.EXPERT in (key[0].role, key[1].role) and world.ends[key].queue:
                    world.deliver(key)
                    world.check()
        assert placement.epochs.candidate.ready


def test_a_router_that_is_out_of_date_is_not_asked():
    moe = MoeClient(0, 8, Wire.FP32, 1, None, 1.0, routers={0: Outbox("a"), 1: Outbox("b")})
    first, second = End(router(0)), End(router(1))
    assert moe.in_force(first, 2)
    assert not moe.in_force(second, 1), "a host that booted anew"
    assert (moe.epoch, moe.routers[1].link) == (2, None)
    assert moe.in_force(second, 2)
    assert not moe.in_force(first, 3), "it is asked already"
    assert moe.epoch == 3
