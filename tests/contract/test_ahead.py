"""Questions about a block that leave before the router's Python hears of it: the same sums, and nothing lost or kept.

Attention, router and experts are transports of this process, whose memory is in reach as a device's is (`conftest`).
"""

import contextlib
import random

import numpy as np
import pytest
import torch

from common.errors import LinkClosed, WireError
from common.ids import Role
from common.placement.plan import Plan
from common.transport.link import LinkLimits
from common.transport.outbox import Outbox
from common.waiting import poll_until
from common.wire.blocks import RowType, align, dispatch_layout, row_segment
from common.wire.header import Header, Kind, Wire
from services.router.dataflow import Dataflow
from services.router.epochs import Epochs
from tests.contract.harness import LIMITS, ROUTER, hello, run
from tests.contract.rows import LandedPeer, RowsPeer, check_no_block_leaked, post

WIDTH, LAYER, EXPERTS, WORKERS = 256, 3, 8, 4
HELD_BY = tuple((e % WORKERS,) for e in range(EXPERTS))


@pytest.fixture
def net(in_reach):
    return in_reach


class Expert(RowsPeer):
    """Answers with the bytes of the rows, as numbers, times one more than its index; or keeps what it is asked."""

    def __init__(self, index, pool_of):
        super().__init__()
        self.index, self.pool_of, self.kinds, self.hold = index, pool_of, [], False
        self.held, self.headers = [], []

    def on_message(self, link, header, payload):
        self.kinds.append(header.kind)
        self.headers.append(header)
        self.held.append((link, header, payload))
        if not self.hold:
            self.let_go()

    def let_go(self):
        held, self.held = self.held, []
        for link, header, payload in held:
            self.respond(link, header, payload)
            payload.release()

    def respond(self, link, header, payload):
        if header.width != WIDTH:
            reply = self.pool_of().acquire_text("another width")
            link.post(header.derive(Kind.FAILED, target=0, payload_nbytes=reply.nbytes), reply)
            reply.release()
            return
        flat = payload.rows.tensor.numpy()
        if header.kind is Kind.EXPERT_PICK:
            picks = np.frombuffer(payload.array.tobytes(), np.int32)[
                align(8 * header.num_pairs) // 4 :
            ]
            index = picks[1 : 1 + header.num_rows]
        else:
            index = np.arange(header.num_rows)
        rows = flat[: (index.max() + 1) * WIDTH].reshape(-1, WIDTH)[index].astype(np.float32)
        values = torch.from_numpy(rows * (self.index + 1)).bfloat16().view(torch.uint8).view(-1)
        segment = row_segment(header.num_rows, WIDTH, RowType.BF16)
        pool = self.pool_of()
        place = payload.landing
        reply = pool.acquire(segment.end, rows_nbytes=segment.end) if place is None else None
        if reply is None:
            reply = pool.acquire_with(place.retain())
        reply.rows.tensor[: values.numel()].copy_(values)
        with contextlib.suppress(LinkClosed):
            answer = header.derive(
                Kind.EXPERT_OUT, target=0, num_rows=header.num_rows, payload_nbytes=0
            )
            link.post(answer, reply)
        reply.release()


class Router:
    """A router without a cluster."""

    def __init__(self, transport, has_ahead):
        self.experts = {w: Outbox(f"expert-{w}") for w in range(WORKERS)}
        self.plan = Plan(1, {LAYER: HELD_BY, LAYER + 1: HELD_BY}, (0,) * WORKERS)
        self.flow = Dataflow(
            0, self.plan, EXPERTS, transport.pool, self.experts, {}, answer_rows=RowType.BF16, seam=transport.seam,
        )  # fmt: skip
        self.links, self.taken = [], 0
        if not has_ahead:
            self.flow.ahead = None
            return
        take = self.flow.ahead.take
        self.flow.ahead.take = lambda *asked: self._count(take(*asked))
        transport.forward_with(self.flow.ahead.forwarder)

    def _count(self, left):
        self.taken += left is not None
        return left

    def on_open(self, link):
        self.links.append(link)
        if link.peer.process.role is Role.EXPERT:
            self.experts[link.peer.process.index].opened(link)
            self.flow.calls.look()

    def on_close(self, link, error):
        if link.peer.process.role is Role.EXPERT:
            self.experts[link.peer.process.index].closed(link)
            self.flow.calls.look()
        self.flow.origin_closed(link)

    def on_message(self, link, header, payload):
        self.flow.on_message(link, header, payload)

    def on_landed(self, link, answer, landing):
        self.flow.on_landed(link, answer, landing)

    def on_control(self, link, message): ...


class Cluster:
    async def open(self, net, *, limits=LIMITS, experts_limits=LIMITS, has_ahead=True):
        self.net, self.experts_limits = net, experts_limits
        self.attention, self.dialled, self.holders = LandedPeer(), {}, HELD_BY
        self.dialler, self.transport = net.transport(limits), net.transport(limits)
        self.router = Router(self.transport, has_ahead)
        self.address = await self.transport.listen(net.address(), ROUTER, self.router)
        self.link = await self.dialler.connect(
            self.address, hello(Role.ATTENTION), self.attention, timeout_s=5
        )
        self.experts = {}
        for worker in range(WORKERS):
            await self.dial(worker)
        await poll_until(lambda: len(self.router.links) == 1 + WORKERS)
        return self

    async def dial(self, worker, port=None):
        """`port`: what the expert's transport has instead of its own."""
        transport = self.net.transport(self.experts_limits)
        if port is not None:
            plane = transport._start()
            plane.port = plane.reactor.port = port(plane.port)
        expert = self.experts[worker] = Expert(worker, lambda: transport.pool)
        link = await transport.connect(
            self.address, hello(Role.EXPERT, worker), expert, timeout_s=5
        )
        self.dialled[worker] = link

    def block(self, num_rows, seed, top_k=2, wider=0, ids=None):
        """(header, rows, tail) of a DISPATCH."""
        rng = np.random.default_rng(seed)
        layout = dispatch_layout(num_rows, WIDTH, top_k, Wire.FP8)
        self.rows = rng.integers(0, 256, (num_rows, WIDTH), np.uint8)
        self.ids = np.array([rng.permutation(EXPERTS)[:top_k] for _ in range(num_rows)], np.int32)
        if ids is not None:
            self.ids[:] = ids
        self.weights = rng.random((num_rows, top_k), np.float32)
        both = self.ids.tobytes(), self.weights.tobytes()
        tail = b"".join(part + bytes(-len(part) % 16) for part in both)
        scales = layout.rows.end - layout.rows.scales_offset
        packed = self.rows.tobytes() + bytes(-self.rows.size % 16 + wider + scales)
        sizes = WIDTH, seed + 1, seed + 1, num_rows, num_rows * top_k
        return Header(Kind.DISPATCH, Wire.FP8, LAYER, 1, *sizes), packed, tail

    def post(self, header, packed, tail, wanted):
        """The place of the answer."""
        place = self.dialler.pool.acquire_rows(wanted) if wanted else None
        post(self.link, header, self.dialler.pool, packed, tail, landing=place)
        return place

    def ask(self, num_rows, seed, *, wider=0, ids=None, epoch=1):
        """A block; (the place of its answer, what that shall be). `ids`: experts of every row."""
        block = self.block(num_rows, seed, wider=wider, ids=ids)
        block[0].epoch = epoch
        rows, ids, weights = self.rows, self.ids, self.weights
        place = self.post(*block, 2 * num_rows * WIDTH)
        order = ids.argsort(axis=1, kind="stable")
        ids, weights = np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)
        sums = torch.zeros(num_rows, WIDTH)
        for k in range(ids.shape[1]):
            factor = (np.array(self.holders)[ids[:, k]] + 1).astype(np.float32)
            answer = torch.from_numpy(rows.astype(np.float32) * factor).bfloat16().float()
            sums += answer * torch.from_numpy(weights[:, k : k + 1])
        return place, sums.bfloat16()

    async def answered(self, place, sums):
        await self.attention.until(lambda: len(self.attention.got) > 0)
        (answer, rows, _) = self.attention.got.pop(0)
        place.release()
        assert answer.kind == Kind.COMBINED, rows
        got = torch.frombuffer(bytearray(rows), dtype=torch.bfloat16)[: sums.numel()]
        assert torch.equal(got.view(sums.shape), sums)

    @property
    def num_asked(self):
        """Questions that experts have got."""
        return sum(len(expert.headers) for expert in self.experts.values())

    async def outcome(self, *asked):
        """What becomes of a request, whatever it is."""
        place, peer = self.post(*asked), self.attention
        await peer.until(lambda: bool(peer.got or peer.closed))
        got, peer.got = peer.got, []
        if place is not None:
            place.release()
        if peer.closed:
            return None, str(peer.closed[0][1])
        ((answer, rows, sentence),) = got
        return answer.kind, answer.block, rows, sentence

    async def quiet(self):
        """Nothing is owed, and all memory is where it belongs."""
        flow, pool = self.router.flow, self.transport.pool
        await poll_until(
            lambda: not flow.num_in_flight and not any(map(len, flow.experts.values()))
        )
        assert not flow.calls.works
        assert not any(flow.calls.fleet.outstanding)
        flow.ahead.close()
        await poll_until(lambda: not pool.rows_outstanding)
        await poll_until(lambda: not self.dialler.pool.rows_outstanding)


@pytest.mark.parametrize("num_rows", [1, 3, 16, 128])
@pytest.mark.parametrize("wider", [0, 4096])
def test_questions_leave_before_python_hears_of_the_block(net, num_rows, wider):
    async def main():
        cluster = await Cluster().open(net)
        for seed in range(25):  # more than the window
            await cluster.answered(*cluster.ask(num_rows, seed, wider=wider))
        assert cluster.router.taken == 24, "all but the first"
        assert cluster.router.flow.counters.late == 0
        kinds = {kind for expert in cluster.experts.values() for kind in expert.kinds}
        assert kinds == {Kind.EXPERT_PICK}
        await cluster.quiet()
        for there in cluster.router.links:
            here = cluster.dialled.get(there.peer.process.index, cluster.link)
            if there.peer.process.role is Role.ATTENTION:
                here = cluster.link
            assert there._credits.next == here._credits.sent
            assert here._credits.next == there._credits.sent
            assert there._credits.available + here._credits.owed == LIMITS.window
            assert here._credits.available + there._credits.owed == LIMITS.window

    run(net, main)
    check_no_block_leaked(net)


def test_blocks_that_come_together_and_without_credit_are_all_answered(net):
    async def main():
        cluster = await Cluster().open(net, experts_limits=LinkLimits(2, 64, 16 << 20))
        await cluster.answered(*cluster.ask(16, 0))
        for expert in cluster.experts.values():
            expert.hold = True
        asked = [
            cluster.ask(16, seed) for seed in range(1, 3)
        ]  # as many as experts have credit for
        await poll_until(lambda: cluster.router.flow.num_in_flight == 2)
        for seed in range(3, 8):  # one by one, so that each finds a spare
            asked.append(cluster.ask(16, seed))
            await poll_until(lambda n=seed: cluster.router.flow.num_in_flight == n)
        for link in cluster.router.links:
            assert link._credits.available >= 0
        assert all(len(expert.held) == 2 for expert in cluster.experts.values())
        for expert in cluster.experts.values():
            expert.hold = False
            expert.let_go()
        for block in asked:
            await cluster.answered(*block)
        assert cluster.router.taken > 0
        await cluster.quiet()

    run(net, main)
    check_no_block_leaked(net)


def test_a_lost_expert_is_asked_again_and_the_next_blocks_go_ahead_to_the_new_one(net):
    async def main():
        cluster = await Cluster().open(net)
        for seed in range(3):
            await cluster.answered(*cluster.ask(16, seed))
        cluster.experts[1].hold = True
        block = cluster.ask(16, 3)
        await poll_until(lambda: bool(cluster.experts[1].held))
        assert cluster.router.taken == 3
        held, cluster.experts[1].held = cluster.experts[1].held, []
        cluster.dialled[1].close("a test")
        for _, _, payload in held:
            payload.release()
        await poll_until(lambda: cluster.router.experts[1].link is None)
        await cluster.dial(1)
        await cluster.answered(*block)
        for seed in range(4, 8):
            await cluster.answered(*cluster.ask(16, seed))
        assert cluster.router.taken == 3 + 3, "but the first to the new one"
        await cluster.quiet()

    run(net, main, leak_free=False)


def test_what_went_to_a_link_that_another_has_replaced_is_asked_anew(net):
    async def main():
        cluster = await Cluster().open(net)
        for seed in range(3):
            await cluster.answered(*cluster.ask(16, seed))
        first = cluster.experts[2]
        first.hold = True
        await cluster.dial(2)  # the first link stays
        await poll_until(lambda: len(cluster.router.links) == 2 + WORKERS)
        await cluster.answered(*cluster.ask(16, 3))
        assert first.held, "went ahead, on the old link"
        assert cluster.router.taken == 2
        late = cluster.router.flow.counters.late
        first.let_go()
        await poll_until(lambda: cluster.router.flow.counters.late > late)
        for seed in range(4, 7):
            await cluster.answered(*cluster.ask(16, seed))
        assert cluster.router.taken == 5
        await cluster.quiet()

    run(net, main)
    check_no_block_leaked(net)


def test_a_block_that_python_refuses_keeps_nothing_of_what_has_left(net, monkeypatch):
    async def main():
        cluster = await Cluster().open(net)
        for seed in range(3):
            await cluster.answered(*cluster.ask(16, seed))
        routes = Epochs.routes

        def refuse(self, epoch, layer):
            raise WireError("an epoch of the past")

        monkeypatch.setattr(Epochs, "routes", refuse)
        place, _ = cluster.ask(16, 3)
        await cluster.attention.until(lambda: bool(cluster.attention.got))
        ((answer, _, sentence),) = cluster.attention.got
        assert (answer.kind, sentence) == (Kind.FAILED, b"an epoch of the past")
        cluster.attention.got.clear()
        place.release()
        await poll_until(lambda: cluster.router.flow.counters.late > 0)
        monkeypatch.setattr(Epochs, "routes", routes)
        for seed in range(4, 7):
            await cluster.answered(*cluster.ask(16, seed))
        assert cluster.router.taken == 2 + 2, "a spare is gone with the refused one"
        await cluster.quiet()

    run(net, main)
    check_no_block_leaked(net)


def test_blocks_of_any_size_and_attempt_go_ahead_once_one_so_large_has_come(net):
    async def main():
        cluster = await Cluster().open(net)
        for seed, num_rows in enumerate([1, 128, 1, 128, 200, 128, 200, 3]):
            header, *rest = cluster.block(num_rows, seed)
            header.attempt = seed
            answer, *_ = await cluster.outcome(header, *rest, 2 * num_rows * WIDTH)
            assert answer == Kind.COMBINED
        assert cluster.router.taken == 8 - 3, (
            "the first, and those that were larger than any before"
        )
        seen = [header.attempt for expert in cluster.experts.values() for header in expert.headers]
        assert set(seen) == set(range(8))
        await cluster.quiet()

    run(net, main)
    check_no_block_leaked(net)


def test_a_link_that_is_gone_is_not_asked_though_its_rows_are_still_read(net):
    async def main():
        cluster = await Cluster().open(net)
        for seed in range(3):
            await cluster.answered(*cluster.ask(16, seed))
        old = cluster.experts[3]
        for expert in cluster.experts.values():
            expert.hold = True
        header, *rest = cluster.block(16, 3)  # an expert may ask, too: nobody forbids it
        post(cluster.dialled[3], header, old.pool_of(), *rest)
        await poll_until(lambda: all(expert.held for expert in cluster.experts.values()))
        held = {expert: expert.held for expert in cluster.experts.values()}
        for expert in held:
            expert.hold, expert.held = False, []
        cluster.dialled[3].close("a test")
        await poll_until(lambda: cluster.router.experts[3].link is None)
        await cluster.dial(3)
        await poll_until(lambda: cluster.router.experts[3].link is not None)
        await cluster.answered(*cluster.ask(16, 4))
        for expert, questions in held.items():
            expert.held = questions
            expert.let_go()
        await cluster.quiet()

    run(net, main, leak_free=False)


def test_blocks_of_another_epoch_go_to_its_workers(net):
    async def main():
        cluster, layer = await Cluster().open(net), {LAYER: HELD_BY}
        for seed in range(3):
            await cluster.answered(*cluster.ask(16, seed))
        epochs, other = cluster.router.flow.epochs, {LAYER: tuple((3 - w,) for (w,) in HELD_BY)}
        for epoch, plan in ((2, layer), (3, other), (4, layer)):
            epochs.commit(Plan(epoch, plan, (0,) * WORKERS))
            cluster.holders = plan[LAYER]
            for seed in range(3):
                await cluster.answered(*cluster.ask(16, 10 * epoch + seed, epoch=epoch))
        assert cluster.router.taken == 4 * 2
        assert cluster.router.flow.counters.late == 0
        epochs._routes[4] = epochs._routes[3]  # an order of before
        cluster.holders = other[LAYER]
        await cluster.answered(*cluster.ask(16, 50, epoch=4))
        assert cluster.router.taken == 4 * 2
        await poll_until(lambda: cluster.router.flow.counters.late > 0)
        replicas = {LAYER: tuple((w, (w + 1) % WORKERS) for (w,) in HELD_BY)}
        epochs.commit(Plan(5, replicas, (0,) * WORKERS))
        for seed in range(3):
            header, *rest = cluster.block(16, seed)
            header.epoch = 5
            assert (await cluster.outcome(header, *rest, 32 * WIDTH))[0] == Kind.COMBINED
        assert cluster.router.taken == 4 * 2, "there is a choice to make"
        await cluster.quiet()

    run(net, main)
    check_no_block_leaked(net)


def test_an_expert_whose_queue_is_full_fails_the_block_and_keeps_nothing_of_it(net):
    async def main():
        limits, few = LinkLimits(64, 2, 16 << 20), LinkLimits(2, 64, 16 << 20)
        cluster = await Cluster().open(net, limits=limits, experts_limits=few)
        await cluster.answered(*cluster.ask(64, 0))
        cluster.experts[1].hold = True
        asked = []
        for seed in range(1, 5):  # two with credit and two in the queue
            asked.append(cluster.ask(64, seed))
            await poll_until(lambda n=seed: cluster.router.flow.num_in_flight == n)
        kind, _, _, sentence = await cluster.outcome(*cluster.block(64, 5), 128 * WIDTH)
        assert kind == Kind.FAILED
        assert b"2 messages wait for expert-1" in sentence
        assert cluster.router.taken == 5
        cluster.experts[1].hold = False
        cluster.experts[1].let_go()
        for block in asked:
            await cluster.answered(*block)
        await cluster.quiet()

    run(net, main)
    check_no_block_leaked(net)


def test_rows_with_unequal_numbers_of_experts_are_not_asked_about(net):
    async def main():
        cluster = await Cluster().open(net)
        await cluster.answered(*cluster.ask(5, 0))
        before = cluster.num_asked
        header, *rest = cluster.block(5, 1, top_k=1)
        header.num_pairs = 6  # whose tables are as long
        kind, _, _, sentence = await cluster.outcome(header, *rest, 10 * WIDTH)
        assert (kind, sentence) == (Kind.FAILED, b"6 pairs for 5 rows")
        await cluster.answered(*cluster.ask(5, 2))
        assert cluster.num_asked <= before + WORKERS
        await cluster.quiet()

    run(net, main)
    check_no_block_leaked(net)


class Unreachable:
    """A port to which nobody's rows are in reach."""

    def __init__(self, real):
        self._real = real

    def __getattr__(self, name):
        return getattr(self._real, name)

    def reach_rows(self, data):
        return 0, 0, 0


def test_an_expert_that_cannot_read_rows_of_others_gets_copies(net):
    async def main():
        cluster = await Cluster().open(net)
        for seed in range(2):
            await cluster.answered(*cluster.ask(16, seed))
        cluster.dialled[1].close("a test")
        await poll_until(lambda: cluster.router.experts[1].link is None)
        await cluster.dial(1, Unreachable)
        await poll_until(lambda: cluster.router.experts[1].link is not None)
        await cluster.answered(*cluster.ask(16, 2, ids=[0, 2]))  # the way to expert 1 is known
        assert not cluster.experts[1].kinds
        block = cluster.ask(16, 3)
        await poll_until(lambda: cluster.router.experts[1].link is None)
        assert not cluster.transport.pool.hands_on
        await cluster.dial(1, Unreachable)
        await cluster.answered(*block)
        await cluster.answered(*cluster.ask(16, 4))
        assert set(cluster.experts[1].kinds) == {Kind.EXPERT_IN}

    run(net, main, leak_free=False)


def test_what_may_have_been_overtaken_does_not_go_ahead(net):
    async def main():
        cluster = await Cluster().open(net)
        for seed in range(3):
            await cluster.answered(*cluster.ask(16, seed))
        (there,) = (
            link for link in cluster.router.links if link.peer.process.role is Role.ATTENTION
        )
        there._credits.by_ring = False  # as where a message has come by UCX
        for seed in range(3, 6):
            await cluster.answered(*cluster.ask(16, seed))
        assert cluster.router.taken == 2
        assert cluster.router.flow.counters.late == 0
        await cluster.quiet()

    run(net, main)
    check_no_block_leaked(net)


def test_whoever_asked_may_go_before_the_answers_come(net):
    async def main():
        cluster = await Cluster().open(net)
        for seed in range(3):
            await cluster.answered(*cluster.ask(16, seed))
        for expert in cluster.experts.values():
            expert.hold = True
        place, _ = cluster.ask(16, 3)
        await poll_until(lambda: cluster.router.taken == 3)
        cluster.link.close("a test")
        await poll_until(lambda: not cluster.router.flow.num_in_flight)
        for expert in cluster.experts.values():
            expert.let_go()
        place.release()
        await poll_until(lambda: cluster.router.flow.counters.late > 0)

    run(net, main, leak_free=False)


def spoiled(order, cluster, seed):
    """A block with something wrong about it, or unusual, or nothing."""
    num_rows, top_k = order.choice([1, 5, 16]), order.choice([1, 2, 8])
    header, packed, tail = cluster.block(num_rows, seed, top_k)
    ids, what, wanted = bytearray(tail), order.randrange(16), 2 * num_rows * WIDTH
    at = 4 * order.randrange(num_rows * top_k)
    if what == 0:
        ids[at : at + 4] = order.choice([-1, EXPERTS, 1 << 30]).to_bytes(4, "little", signed=True)
    elif what == 1:
        header.epoch = 2
    elif what == 2:
        header.layer = 9
    elif what == 3:
        header.num_rows = order.choice([0, num_rows + 1, 1 << 31])
    elif what == 4:
        header.num_pairs = order.choice([0, 1 << 31, num_rows * top_k + 1])
    elif what == 5:
        header.width = order.choice([0, WIDTH - 128, 2 * WIDTH])
    elif what == 6:
        ids = ids[:-16]
    elif what == 7:
        ids += bytes(16)
    elif what == 8:
        packed = packed[:-16]
    elif what == 9:
        packed = packed[:-16] + bytes(32)
    elif what == 10:
        header.kind = order.choice([Kind.RELAY, Kind.EXPERT_IN, Kind.EXPERT_PICK])
    elif what == 11:
        wanted = order.choice([0, 16, 2 * wanted])
    elif what == 12:
        header.layer = LAYER + 1
    return header, bytes(packed), bytes(ids), wanted


@pytest.mark.parametrize("seed", range(10))
def test_wrong_and_unusual_blocks_are_answered_as_without_going_ahead(net, seed):
    async def main():
        order, seen, taken = random.Random(seed), set(), 0
        both = []
        for number in range(30):
            if not both or both[0].attention.closed:
                both = [await Cluster().open(net, has_ahead=has) for has in (True, False)]
                for cluster in both:
                    await cluster.answered(*cluster.ask(16, 100))
            asked, before = spoiled(order, both[0], number), both[0].router.taken
            answers = [await cluster.outcome(*asked) for cluster in both]
            assert answers[0] == answers[1], asked
            seen.add(answers[0][0])
            taken += both[0].router.taken - before
            if not both[0].attention.closed:  # what Python refuses does not leave
                await poll_until(lambda c=tuple(both): c[0].num_asked == c[1].num_asked)
        assert taken > 0
        assert {Kind.COMBINED, Kind.FAILED} <= seen

    run(net, main, leak_free=False)
