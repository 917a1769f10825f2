"""Answers whose rows are written where the asker wants them: a header says so, and mostly nothing else is read."""

import asyncio
import ctypes
import random

import pytest

from common.errors import WireError
from common.transport.dial import keep_connected
from common.transport.link import LinkState
from common.transport.port import CANCELED, IN_PROGRESS
from common.transport.seam import Seam
from common.waiting import poll_until
from common.wire.header import Header, Kind
from tests.contract.harness import LIMITS, ROUTER, hello, run
from tests.contract.rows import (
    HoldingPeer,
    LandedPeer,
    ManualEvent,
    ReachingUcxNet,
    RowsPeer,
    asked,
    check_no_block_leaked,
    linked,
    post,
)


@pytest.mark.parametrize("shortly", [False, True])
@pytest.mark.parametrize("kind", [RowsPeer, LandedPeer])
def test_rows_of_an_answer_are_written_where_they_are_wanted(tmp_path, kind, shortly):
    net = ReachingUcxNet(tmp_path)

    async def main():
        here, there = kind(), HoldingPeer()
        link, dialler, listener = await linked(net, here, there)
        place = dialler.pool.acquire_rows(4096)
        for _ in range(3):  # the same places again
            post(link, Header(Kind.EXPERT_IN), dialler.pool, bytes(100), b"", landing=place)
            await there.until(lambda: bool(there.got))
            ((header, payload),) = there.got
            there.got.clear()
            assert payload.landing.address == place.address
            payload.landing.tensor.fill_(7)
            reply = header.derive(Kind.EXPERT_OUT, target=0, payload_nbytes=0)
            answer = listener.pool.acquire_with(payload.landing.retain())
            payload.release()
            if shortly:
                assert there.links[0].post_landed(reply, answer.rows)
            else:
                there.links[0].post(reply, answer)
            answer.release()
            await here.until(lambda: bool(here.got))
            ((header, rows, _),) = here.got
            assert (rows, here.places.pop()[0]) == (b"\7" * 4096, place.block)
            here.got.clear()
            place.tensor.zero_()
        if kind is LandedPeer:
            assert (here.num_landed, link._credits.owed, link._credits.available) == (3, 1, 8)
        else:
            assert header.landed == 1
        assert len(link._neighbour._known) == 0
        assert len(there.links[0]._neighbour._known) == 2
        place.release()

    run(net, main)
    check_no_block_leaked(net)


@pytest.mark.parametrize(
    ("kind", "spoil", "sentence"),
    [
        (LandedPeer, lambda *_: 5, "answer 5, which nobody waits for"),
        (RowsPeer, lambda *_: 0, "rows that landed, though nobody waits for them"),
        (LandedPeer, lambda *_: 0, "rows that landed, though nobody waits for them"),
        (LandedPeer, lambda answer, here, there: setattr(here._credits, "_unreturned", 8) or answer,
         "more messages than its window of 8"),
        (LandedPeer, lambda answer, here, there: setattr(there._credits, "owed", 9) or answer,
         "8 more credits than it was sent messages"),
    ], ids=["number", "none", "none in short", "window", "credits"],
)  # fmt: skip
def test_what_is_wrong_about_an_answer_that_landed_closes_the_link(tmp_path, kind, spoil, sentence):
    net = ReachingUcxNet(tmp_path)

    async def main():
        here = kind()
        link, there, ((header, answer),) = await asked(net, here)
        header.answer = spoil(header.answer, link, there)
        there.post(header, answer)
        answer.release()
        await here.until(lambda: bool(here.closed))
        assert sentence in str(here.closed[0][1])
        assert here.got == []

    run(net, main, leak_free=False)


def test_an_answer_that_landed_waits_for_what_it_overtook(tmp_path):
    net = ReachingUcxNet(tmp_path)

    async def main():
        here = LandedPeer()
        _, there, ((header, answer),) = await asked(net, here)
        there._credits.sent += 1
        there.post(header, answer)
        answer.release()
        await asyncio.sleep(0.05)
        assert here.got == []
        there._credits.sent -= 2
        there.post(Header(Kind.DISPATCH))
        await here.until(lambda: len(here.got) == 2)
        assert here.got[0][0].kind is Kind.DISPATCH
        assert (here.got[1][0].kind, here.num_landed) == (Kind.EXPERT_OUT, 0)

    run(net, main)
    check_no_block_leaked(net)


def test_answers_that_landed_are_told_of_before_what_came_behind_them(tmp_path):
    net = ReachingUcxNet(tmp_path)

    async def main():
        here = LandedPeer()
        _, there, answers = await asked(net, here, 3)
        for header, answer in answers:  # all of it is there at the next poll
            there.post(header, answer)
            answer.release()
            there.post(Header(Kind.DISPATCH, block=header.block))
        await here.until(lambda: len(here.got) == 6)
        assert [got[0].block for got in here.got] == [0, 0, 1, 1, 2, 2]
        assert [got[0].kind == Kind.EXPERT_OUT for got in here.got] == [True, False] * 3
        assert here.num_landed == 3

    run(net, main)
    check_no_block_leaked(net)


def test_what_overtook_an_answer_that_landed_is_delivered_behind_it(tmp_path):
    net = ReachingUcxNet(tmp_path)

    async def main():
        here = LandedPeer()
        link, there, ((header, answer),) = await asked(net, here)
        there._credits.sent += 1
        there._to, through = there._endpoint.handle, there._to
        there.post(Header(Kind.DISPATCH))  # by UCX
        await poll_until(lambda: bool(link._arrivals))
        there._credits.sent -= 2
        there._to = through
        there.post(header, answer)
        answer.release()
        await here.until(lambda: len(here.got) == 2)
        assert [got[0].kind for got in here.got] == [Kind.EXPERT_OUT, Kind.DISPATCH]
        assert here.num_landed == 0  # who reads all of it looks for what waits

    run(net, main)
    check_no_block_leaked(net)


def test_what_overtook_the_control_socket_is_not_forgotten(tmp_path):
    net = ReachingUcxNet(tmp_path)

    async def main():
        link, *_ = await linked(net, LandedPeer(), LandedPeer())
        assert link._credits.by_ring
        assert link._credits.takes_landed
        link._credits.by_ring = False
        link._set_windows(5)
        assert not link._credits.by_ring

    run(net, main)


def test_credits_of_answers_that_landed_come_back_though_nothing_goes_that_way(tmp_path):
    net = ReachingUcxNet(tmp_path)

    async def main():
        here = LandedPeer()
        _, there, answers = await asked(net, here, LIMITS.window)
        for header, answer in answers:
            there.post(header, answer)
            answer.release()
        await here.until(lambda: here.num_landed == LIMITS.window)
        await poll_until(lambda: there._credits.available >= LIMITS.window // 2)

    run(net, main)
    check_no_block_leaked(net)


def test_whoever_raises_at_an_answer_that_landed_loses_the_link(tmp_path):
    net = ReachingUcxNet(tmp_path)

    class Raising(LandedPeer):
        def on_landed(self, link, answer, landing):
            raise ValueError("not like this")

    async def main():
        here = Raising()
        _, there, ((header, answer),) = await asked(net, here)
        there.post(header, answer)
        answer.release()
        await here.until(lambda: bool(here.closed))
        assert "failed: ValueError" in str(here.closed[0][1])
        await poll_until(lambda: there.state is LinkState.CLOSED)

    run(net, main)
    check_no_block_leaked(net)


@pytest.mark.parametrize("kind", [RowsPeer, LandedPeer])
def test_a_link_that_closes_as_the_device_is_looked_at_delivers_nothing_more(tmp_path, kind):
    """Two answers came together; what was launched at the first closes the link before the second is handled."""
    net, seam = ReachingUcxNet(tmp_path), Seam(ManualEvent)

    class Closing(kind):
        def _note(self, what, link):
            if what == "message":
                ManualEvent.passed = False
                seam.fence().then(lambda: link.close("enough"))
                ManualEvent.passed = True
            super()._note(what, link)

    async def main():
        here = Closing()
        _, there, answers = await asked(net, here, 2, seam=seam)
        for header, answer in answers:
            there.post(header, answer)
            answer.release()
        await here.until(lambda: bool(here.closed))
        assert len(here.got) == 1
        await poll_until(lambda: there.state is LinkState.CLOSED)

    run(net, main)
    check_no_block_leaked(net)


def test_a_link_that_is_kept_connected_takes_answers_in_short_too(tmp_path):
    net = ReachingUcxNet(tmp_path)

    async def main():
        here, there = LandedPeer(), HoldingPeer()
        dialler, listener = net.transport(), net.transport()
        address = await listener.listen(net.address(), ROUTER, there)
        task = asyncio.create_task(keep_connected(dialler, address, hello, here))
        await here.until(lambda: bool(here.links))
        place = dialler.pool.acquire_rows(4096)
        post(here.links[0], Header(Kind.EXPERT_IN), dialler.pool, bytes(100), b"", landing=place)
        await there.until(lambda: bool(there.got))
        ((header, payload),) = there.got
        reply = header.derive(Kind.EXPERT_OUT, target=0, payload_nbytes=0)
        assert there.links[0].post_landed(reply, payload.landing)
        payload.release()
        await here.until(lambda: bool(here.got))
        assert here.num_landed == 1
        place.release()
        task.cancel()

    run(net, main)
    check_no_block_leaked(net)


def test_an_answer_that_has_landed_keeps_order_and_credits_with_others(tmp_path):
    net = ReachingUcxNet(tmp_path)

    async def main():
        here = LandedPeer()
        link, there, answers = await asked(net, here, 6)
        for number, (header, answer) in enumerate(answers):
            if number % 2:
                assert there.post_landed(header, answer.rows)
            else:
                there.post(header, answer)
            answer.release()
        await here.until(lambda: len(here.got) == 6)
        assert [answer.block for answer, *_ in here.got] == list(range(6))
        assert there._credits.available + link._credits.owed == LIMITS.window
        assert link._credits.available + there._credits.owed == LIMITS.window

    run(net, main)
    check_no_block_leaked(net)


def test_what_cannot_leave_as_a_header_alone_changes_nothing(tmp_path):
    net = ReachingUcxNet(tmp_path)

    async def main():
        here = LandedPeer()
        _, there, ((header, answer),) = await asked(net, here)
        credits, sent = there._credits, there._credits.sent
        before = credits.available, credits.owed
        own = there._pool.acquire_rows(4096)
        assert not there.post_landed(header, own), "rows that the peer did not want there"
        own.release()
        header.width = -1
        with pytest.raises(WireError, match="out of range"):
            there.post_landed(header, answer.rows)
        header.width = 0
        credits.available = 0
        assert not there.post_landed(header, answer.rows), "no credit"
        credits.available = before[0]
        there._queue.append(None)
        assert not there.post_landed(header, answer.rows), "others wait"
        there._queue.clear()
        assert (credits.available, credits.owed, there._credits.sent) == (*before, sent)
        assert there.post_landed(header, answer.rows)
        await here.until(lambda: here.num_landed == 1)
        there.close("enough")
        assert not there.post_landed(header, answer.rows), "closed"
        answer.release()

    run(net, main)
    check_no_block_leaked(net)


def test_a_header_that_ucx_has_yet_to_read_is_left_alone(tmp_path):
    """There is no room among the neighbour's records."""
    net = ReachingUcxNet(tmp_path)

    async def main():
        here = LandedPeer()
        _, there, answers = await asked(net, here, 2)
        port, ended = there._port, []

        class Full:
            """Sends by UCX, which takes its time."""

            def __getattr__(self, name):
                return getattr(port, name)

            def send(self, to, address, nbytes, tag, call):
                ended.append((address, call))
                return IN_PROGRESS

        there._port = Full()
        assert all(there.post_landed(header, answer.rows) for header, answer in answers)
        assert len({address for address, _ in ended}) == 2
        there._port = port
        ended[0][1](0)
        assert there.state is LinkState.OPEN
        ended[1][1](CANCELED)
        assert there.state is LinkState.CLOSED
        for _, answer in answers:
            answer.release()

    run(net, main, leak_free=False)


def changed(order, header):
    """An answer's header with something else in it, or broken bytes."""
    name = order.choice(["kind", "landed", "payload_nbytes", "rows_nbytes", "answer", "magic", ""])
    if name == "kind":
        header.kind = order.choice([kind for kind in Kind if kind is not Kind.CREDIT])
    elif name == "landed":
        header.landed = 2
    elif name in ("payload_nbytes", "rows_nbytes", "answer"):
        setattr(header, name, getattr(header, name) + order.choice([-1, 1, 16]))
    for other in ("queue_us", "compute_us", "combine_us", "layer", "block", "credits"):
        setattr(header, other, order.randrange(1 << 16) if other != "credits" else 0)
    message = bytearray(128)
    header.pack_into(message)
    if name == "magic":
        message[order.choice([0, 1, 2])] ^= 1
    return message, name


@pytest.mark.parametrize("seed", range(4))
def test_what_is_told_of_in_short_is_what_the_header_says(tmp_path, seed):
    """Whatever else it says is left to whoever reads all of it, and a wrong one closes the link."""
    net, order, seen = ReachingUcxNet(tmp_path), random.Random(seed), set()

    async def main():
        for _ in range(30):
            here = LandedPeer()
            link, there, ((header, answer),) = await asked(net, here)
            answer.release()
            header.kind = order.choice([Kind.EXPERT_OUT, Kind.PARTIAL, Kind.COMBINED])
            header.rows_nbytes = header.payload_nbytes = 4096
            header.landed = 1
            message, name = changed(order, header)
            memory = (ctypes.c_char * 128).from_buffer(message)
            tag = 1 << 56 | there._credits.tag | there._credits.sent
            there._credits.sent += 1
            there._port.send(there._to, ctypes.addressof(memory), 128, tag, lambda _: None)
            await here.until(lambda here=here: bool(here.got or here.closed))
            in_short = here.num_landed == 1
            fits = header.landed == 1 and header.rows_nbytes == header.payload_nbytes
            fits = fits and header.kind in (Kind.EXPERT_OUT, Kind.PARTIAL, Kind.COMBINED)
            right = fits and name not in ("magic", "answer", "payload_nbytes", "rows_nbytes")
            assert in_short == right
            if in_short:
                said = here.got[0][0]._asdict()
                assert all(value == getattr(header, name) for name, value in said.items())
            seen.add((in_short, bool(here.closed)))
            link.close("enough")
        assert seen >= {(True, False), (False, True)}

    run(net, main, leak_free=False)
