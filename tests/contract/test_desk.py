"""Questions that an expert answers without Python: the same answers as with it, to right questions and to wrong ones.

The device is the CPU, whose memory is in reach (`conftest`). A step of a graph runs when it is launched, or when the
test says so.
"""

import asyncio
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.ids import ProcessId, Role
from common.transport.seam import Seam
from common.waiting import poll_until
from common.wire.blocks import RowType, align, row_segment
from common.wire.header import Header, Kind, Wire
from kernels import graphs, ops
from services.expert.batcher import Batcher
from services.expert.device_bank import DeviceBank
from services.expert.device_experts import GraphedExperts
from services.expert.worker import ExpertWorker
from tests.contract.harness import LIMITS, ROUTER, hello, run
from tests.contract.rows import LandedPeer, check_no_block_leaked, post
from tests.unit.test_graphed_experts import WIDTH, expert

LAYER = 3


@pytest.fixture
def net(in_reach):
    return in_reach


class Later:
    """A stream: steps of graphs run, one behind the other, when the test says so. By whom they were launched."""

    def __init__(self, monkeypatch):
        self.steps, self.by_desk, self.num_done, self.status = [], 0, 0, 0
        monkeypatch.setattr(graphs.Replays, "_run_step", self._launch)
        monkeypatch.setattr(graphs.Replays, "run", lambda _, key, step: self.steps.append(step))
        self.graphs = None

    def _launch(self, handle, stream):
        self.by_desk += 1
        if self.status == 0:
            self.steps.append(self.graphs._steps[handle])
        return self.status

    def seam(self):
        """Of a worker whose events are in this stream."""
        return Seam(lambda: Moment(self))

    def go(self):
        while self.num_done < len(self.steps):
            self.steps[self.num_done]()
            self.num_done += 1


class Moment:
    def __init__(self, stream):
        self.stream = stream

    def record(self):
        self.number = len(self.stream.steps)

    def query(self):
        return self.stream.num_done >= self.number


class Worker(ExpertWorker):
    """An expert worker without a cluster: experts 5 and 6 of a layer, of which each question asks one."""

    def __init__(self, transport, *, has_desk=True):
        self.spec = SimpleNamespace(id=ProcessId(Role.EXPERT, 0))
        self.transport, self.trace, self.links, self.heard = transport, None, [], 0
        counted = ("calls", "rows", "batches", "queue_us", "compute_us", "failed")
        self.counters = dict.fromkeys(counted, 0)
        self.batcher = Batcher(GraphedExperts.BUCKETS[-1])
        self._scheduled, self._in_flight, self._ended_ns = False, 0, 0
        self.loop = asyncio.get_running_loop()
        places = {(LAYER, 5): expert(1), (LAYER, 6): expert(2)}
        graphed = GraphedExperts(WIDTH, torch.device("cpu"))
        counts = dict.fromkeys(places, 0)
        self.bank = DeviceBank(WIDTH, "m", {}, dict.fromkeys(places, "h"), counts, places, graphed)
        self.desk = self.bank.open_desk(self._answered) if has_desk else None
        if has_desk:
            transport.answer_with(self.desk.answerer)

    def on_open(self, link):
        self.links.append(link)

    def on_message(self, link, header, payload):
        self.heard += 1
        super().on_message(link, header, payload)


def block_of(num_rows, seed=0):
    """Rows as they travel, and the same for a bank."""
    generator = torch.Generator().manual_seed(seed)
    rows, scales = ops.quantise(torch.randn(num_rows, WIDTH, generator=generator))
    segment = row_segment(num_rows, WIDTH, RowType.FP8)
    packed = bytearray(segment.end)
    packed[: num_rows * WIDTH] = rows.view(torch.uint8).numpy().tobytes()
    flat = scales.numpy().tobytes()
    packed[segment.scales_offset : segment.scales_offset + len(flat)] = flat
    return bytes(packed), rows, scales


def table(*parts):
    return b"".join(
        p + bytes(-len(p) % 16) for p in (np.array(n, np.int32).tobytes() for n in parts)
    )


def question(expert, num_rows, *, picks=None, block=1, wider=0):
    """(header, rows, tail) of an EXPERT_IN, or an EXPERT_PICK of `picks`; `wider`: bytes before the scales."""
    packed, rows, scales = block_of(num_rows, block)
    kind, asked, tail = Kind.EXPERT_IN, num_rows, table([expert, num_rows])
    if picks is not None:
        kind, asked = Kind.EXPERT_PICK, len(picks)
        tail = table([expert, asked], [num_rows, *picks])
        at = row_segment(num_rows, WIDTH, RowType.FP8).scales_offset
        packed = packed[:at] + bytes(wider) + packed[at:]
        rows, scales = rows.view(torch.uint8)[picks].view(rows.dtype), scales[picks]
    header = Header(kind, Wire.FP8, LAYER, 1, WIDTH, block, block, asked, 1)
    return header, packed, tail, rows, scales


class Asker:
    """A dialler with a link to a worker."""

    async def open(self, net, *, has_desk=True, later=None):
        """`later`: the stream of the worker."""
        options = {} if later is None else {"seam": later.seam()}
        self.here, self.going = LandedPeer(), None
        self.dialler, self.listener = net.transport(), net.transport(**options)
        self.worker = Worker(self.listener, has_desk=has_desk)
        if later is not None:
            later.graphs = self.worker.bank.graphed._graphs
            self.going = later.go
        address = await self.listener.listen(net.address(), hello(), self.worker)
        self.link = await self.dialler.connect(address, ROUTER, self.here, timeout_s=5)
        await poll_until(lambda: bool(self.worker.links))
        return self

    def post(self, header, rows, tail, wanted=None):
        """The place of its answer."""
        pool = self.dialler.pool
        nbytes = align(2 * header.num_rows * WIDTH) if wanted is None else wanted
        place = pool.acquire_rows(max(1, nbytes)) if nbytes else None
        if place is not None:
            place.block.tensor.fill_(0xEE)
        post(self.link, header, pool, rows, tail, landing=place)
        return place

    async def ask(self, *asked, wanted=None):
        """(header of the answer, its rows, whether it was taken in short)."""
        before = self.here.num_landed
        place = self.post(*asked, wanted=wanted)
        while not (self.here.got or self.here.closed):
            await asyncio.sleep(0.001)
            if self.going is not None:
                self.going()
        (answer,), self.here.got = self.here.got or [None], []
        if place is not None:
            assert place.block.tensor[place.nbytes :].eq(0xEE).all()  # nothing is written behind it
            place.release()
        return answer, self.here.num_landed > before


def rows_in(answer):
    return torch.frombuffer(bytearray(answer[1]), dtype=torch.bfloat16).view(-1, WIDTH)


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 100, 128])
@pytest.mark.parametrize("kind", ["in", "picked", "wider"])
def test_a_question_that_a_graph_is_there_for_needs_no_python(net, num_rows, kind):
    async def main():
        asker = await Asker().open(net)
        worker, order = asker.worker, random.Random(num_rows)
        for turn in range(20):  # more than there are turns
            picks = None if kind == "in" else order.sample(range(200), num_rows)
            of = num_rows if picks is None else 200
            wider = 4096 if kind == "wider" else 0
            number = 5 + turn % 2
            *asked, rows, scales = question(number, of, picks=picks, block=turn, wider=wider)
            answer, in_short = await asker.ask(*asked)
            assert in_short
            assert (answer[0].kind, answer[0].block) == (Kind.EXPERT_OUT, turn)
            assert torch.equal(rows_in(answer), worker.bank.experts[LAYER, number](rows, scales))
        assert worker.heard == 2  # the first of each
        assert worker.counters["calls"] == worker.counters["batches"] == 20
        assert worker.counters["rows"] == 20 * num_rows == sum(worker.bank.rows.values())
        assert worker.counters["compute_us"] > 0
        here, there = asker.link._credits, worker.links[0]._credits
        assert here.next == there.sent
        assert there.next == here.sent
        assert here.available + there.owed == LIMITS.window
        assert there.available + here.owed == LIMITS.window
        await poll_until(lambda: not asker.dialler.pool.rows_outstanding)  # they came back

    run(net, main)
    check_no_block_leaked(net)


def spoiled(order):
    """A question with something wrong about it, or unusual, or nothing; and how many bytes of an answer it wants."""
    n, of = order.choice([1, 5, 8, 60, 128]), 150
    picks = order.choice([None, order.sample(range(of), n)])
    header, packed, tail, *_ = question(
        order.choice([5, 6]), n if picks is None else of, picks=picks
    )
    tail, wanted = bytearray(tail), align(2 * n * WIDTH)

    def put(at, number):
        tail[at : at + 4] = int(number).to_bytes(4, "little", signed=number < 0)

    what = order.randrange(16)
    if what == 0:
        put(0, order.choice([7, -1, 1 << 20]))  # an expert that is not here
    elif what == 1:
        put(4, n + order.choice([-1, 1]))
    elif what == 2 and picks is not None:
        put(20 + 4 * order.randrange(n), order.choice([of, -1, 1 << 30]))
    elif what == 3 and picks is not None:
        put(16, order.choice([0, -1, of - 1, of + 100, 1 << 30]))
    elif what == 4:
        header.width = order.choice([0, WIDTH - 128, WIDTH * 2])
    elif what == 5:
        header.layer = 4
    elif what == 6:
        header.num_rows = order.choice([0, n + 1, 1 << 31])
    elif what == 7:
        header.num_pairs = order.choice([0, 2])
    elif what == 8:
        tail = tail[:-16]
    elif what == 9:
        tail += bytes(16)
    elif what == 10:
        packed = packed[:-16]
    elif what == 11:
        packed += bytes(16)
    elif what == 12:
        wanted = order.choice([0, 16, 4 * n * WIDTH])
    elif what == 13:
        header.kind = order.choice([Kind.DISPATCH, Kind.RELAY])
    elif what == 14:
        header.wire = Wire.BF16
    return (header, packed, bytes(tail)), wanted


@pytest.mark.parametrize("seed", range(12))
def test_wrong_and_unusual_questions_are_answered_as_without_a_desk(net, seed):
    async def main():
        order, seen = random.Random(seed), set()
        with_desk, without = await Asker().open(net), await Asker().open(net, has_desk=False)
        both = with_desk, without
        for _ in range(60):
            asked, wanted = spoiled(order)
            state, answers = order.getstate(), []
            for asker in both:
                order.setstate(state)
                header = Header(**{name: getattr(asked[0], name) for name in Header.__slots__})
                answers.append(await asker.ask(header, *asked[1:], wanted=wanted))
            (one, _), (other, _) = answers
            if one is None or other is None:
                assert one is other is None  # both closed their link
                for asker in both:
                    assert asker.here.closed
                with_desk, without = (
                    await Asker().open(net),
                    await Asker().open(net, has_desk=False),
                )
                both = with_desk, without
                continue
            assert (one[0].kind, one[1:]) == (other[0].kind, other[1:])
            seen.add(one[0].kind)
        assert seen >= {Kind.EXPERT_OUT, Kind.FAILED}

    run(net, main)


def test_what_comes_while_it_computes_and_behind_it_keeps_its_order(net, monkeypatch):
    """Some for the desk, some for Python: every answer comes once, and is right."""
    later = Later(monkeypatch)

    async def main():
        asker = await Asker().open(net, later=later)
        worker = asker.worker
        *asked, _, _ = question(5, 4)
        await asker.ask(*asked)
        order, wanted, places = random.Random(1), {}, []
        for turn in range(40):
            # of one expert: what is joined for several is freed before a step that runs later
            *asked, rows, scales = question(5, order.choice([3, 4, 4, 4, 50]), block=100 + turn)
            wanted[100 + turn] = worker.bank.experts[LAYER, 5](rows, scales)
            places.append(asker.post(*asked))
            if order.random() < 0.6:
                await asyncio.sleep(0.002)
                later.go()
        while len(asker.here.got) < 40:
            await asyncio.sleep(0.002)
            later.go()
        assert 0 < later.by_desk < 40
        assert worker.heard == 41 - later.by_desk
        for answer in asker.here.got:
            assert torch.equal(rows_in(answer), wanted.pop(answer[0].block))
        for place in places:
            place.release()
        assert not worker.desk.num_waiting

    run(net, main)
    check_no_block_leaked(net)


async def taken(net, later):
    """An asker whose second question the desk has, and where it wants the answer."""
    asker = await Asker().open(net, later=later)
    *asked, _, _ = question(5, 4)
    await asker.ask(*asked)
    place = asker.post(*asked)
    await poll_until(lambda: later.by_desk == 1)
    assert asker.worker.heard == 1
    assert asker.worker.desk.num_waiting == 1
    return asker, place


def test_an_answers_credit_is_put_aside(net, monkeypatch):
    later = Later(monkeypatch)

    async def main():
        asker, place = await taken(net, later)
        credits = asker.worker.links[0]._credits
        available = credits.available
        credits.available = 0
        later.go()
        await asker.here.until(lambda: bool(asker.here.got))
        assert credits.available == 0
        credits.available = available
        place.release()
        assert asker.link._credits.available + credits.owed == LIMITS.window
        assert credits.available + asker.link._credits.owed == LIMITS.window

    run(net, main)
    check_no_block_leaked(net)


def test_an_answer_waits_for_room_and_others_do_not_wait_for_it(net, monkeypatch):
    later = Later(monkeypatch)

    async def main():
        asker, place = await taken(net, later)
        other = Asker()
        other.here, other.going, other.dialler = LandedPeer(), None, net.transport()
        address = await asker.listener.listen(net.address(), hello(), asker.worker)
        other.link = await other.dialler.connect(address, ROUTER, other.here, timeout_s=5)
        link, plane = asker.worker.links[0], asker.listener._plane
        for nbytes in (*[100_000] * 5, 23_300):  # all but 112 bytes of the ring
            buffer = asker.listener.pool.acquire(nbytes)
            link.post(Header(Kind.DISPATCH), buffer)
            buffer.release()
        later.go()
        plane.port.poll(*plane.reactor._told)  # the asker has not read yet
        assert asker.worker.desk.num_waiting == 1
        more = other.post(*question(5, 4, block=7)[:3])
        plane.port.poll(*plane.reactor._told)
        later.go()
        plane.port.poll(*plane.reactor._told)
        assert (asker.worker.desk.num_waiting, later.by_desk) == (1, 2)
        await other.here.until(lambda: bool(other.here.got))
        await asker.here.until(lambda: len(asker.here.got) == 7)
        assert asker.worker.desk.num_waiting == 0
        place.release()
        more.release()

    run(net, main)
    check_no_block_leaked(net)


@pytest.mark.parametrize("who", ["link", "worker", "asker"])
def test_whoever_goes_away_meanwhile_leaves_nothing_behind(net, monkeypatch, who):
    later = Later(monkeypatch)

    async def main():
        asker, place = await taken(net, later)
        worker = asker.worker
        if who == "link":
            worker.links[0].close("enough")
            await asker.here.until(lambda: bool(asker.here.closed))
        elif who == "worker":
            await asker.listener.close()
        else:
            await asker.dialler.close()
        sent = worker.links[0]._credits.sent
        later.go()
        if who == "worker":
            assert worker.desk.num_waiting == 0
        else:
            await poll_until(lambda: not worker.desk.num_waiting)
        place.release()
        assert worker.links[0]._credits.sent == sent
        assert worker.counters["failed"] == 0

    run(net, main)


def test_while_it_computes_questions_wait_together(net, monkeypatch):
    later = Later(monkeypatch)

    async def main():
        asker, place = await taken(net, later)
        more = [asker.post(*question(5, 4, block=number)[:3]) for number in (2, 3, 4)]
        await poll_until(lambda: asker.worker.heard == 4)
        assert (asker.worker.desk.num_waiting, later.by_desk) == (1, 1)
        while len(asker.here.got) < 4:
            later.go()
            await asyncio.sleep(0.001)
        for one in (place, *more):
            one.release()
        assert asker.worker.counters["batches"] < 5  # some were computed together

    run(net, main)
    check_no_block_leaked(net)


@pytest.mark.parametrize("why", ["no credit", "another way"])
def test_what_python_must_hear_of_the_desk_does_not_take(net, why):
    async def main():
        asker = await Asker().open(net)
        *asked, _, _ = question(5, 4)
        for _ in range(2):
            await asker.ask(*asked)
        assert asker.worker.heard == 1
        credits = asker.worker.links[0]._credits
        if why == "no credit":  # answers may wait for that which a question brings
            available, credits.available = credits.available, 0
            place = asker.post(*asked)
            await poll_until(lambda: asker.worker.heard == 2)
            credits.available = available
            asker.worker.links[0]._flush()
        else:  # one by UCX overtakes it
            link = asker.link
            link._credits.sent += 1
            link._to, through = link._endpoint.handle, link._to
            place = asker.post(*question(6, 4)[:3])
            await poll_until(lambda: bool(asker.worker.links[0]._arrivals))
            link._credits.sent -= 2
            link._to = through
            first = asker.post(*asked)
            await asker.here.until(lambda: len(asker.here.got) == 2)
            assert asker.worker.heard == 3
            first.release()
            link._credits.sent += 1
        await asker.here.until(lambda: bool(asker.here.got))
        place.release()

    run(net, main, leak_free=False)


def test_a_graph_that_cannot_be_launched_is_left_to_python(net, monkeypatch):
    later = Later(monkeypatch)
    later.status = 700

    async def main():
        asker = await Asker().open(net, later=later)
        for _ in range(3):
            *asked, rows, scales = question(5, 4)
            answer, _ = await asker.ask(*asked)
            assert torch.equal(rows_in(answer), asker.worker.bank.experts[LAYER, 5](rows, scales))
        assert asker.worker.heard == 3
        assert later.by_desk == 2

    run(net, main)
    check_no_block_leaked(net)


def test_an_expert_that_is_given_up_is_not_computed(net):
    async def main():
        asker = await Asker().open(net)
        *asked, _, _ = question(5, 4)
        for _ in range(2):
            await asker.ask(*asked)
        assert asker.worker.heard == 1
        asker.worker.bank.drop((LAYER, 5))
        answer, _ = await asker.ask(*asked)
        assert answer[0].kind is Kind.FAILED
        asker.worker.bank.add((LAYER, 5), expert(9), "h")
        *asked, rows, scales = question(5, 4)
        for _ in range(2):
            answer, _ = await asker.ask(*asked)
            assert torch.equal(rows_in(answer), asker.worker.bank.experts[LAYER, 5](rows, scales))
        assert asker.worker.heard == 3

    run(net, main)
    check_no_block_leaked(net)


def test_whoever_raises_when_told_of_an_answer_harms_nobody(net, monkeypatch):
    async def main():
        monkeypatch.setattr(Worker, "_answered", lambda *_: 1 / 0)
        asker = await Asker().open(net)
        *asked, _, _ = question(5, 4)
        for _ in range(3):
            answer, _ = await asker.ask(*asked)
            assert answer[0].kind == Kind.EXPERT_OUT
        assert asker.worker.heard == 1

    run(net, main)
