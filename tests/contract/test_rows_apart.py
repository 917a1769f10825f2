"""Rows in device memory, over both transports: they arrive with their message, where they are wanted, or not at all.

The device is the CPU, whatever ATOLL_TEST_DEVICE says: all peers are in one process. The form on the wire is the same.
`test_volleys` has processes that share a device.
"""

import asyncio
import ctypes
import errno
import os
import random
import struct
import subprocess

import pytest
import torch

from common.errors import AtollError, ConfigError, LinkClosed, Overloaded, WireError
from common.transport import ucx_plane
from common.transport.buffers import BufferPool
from common.transport.device import DevicePool, synchronise
from common.transport.dial import keep_connected
from common.transport.link import LinkLimits, LinkState
from common.transport.neighbour import Neighbour
from common.transport.port import CANCELED, IN_PROGRESS
from common.transport.seam import Seam
from common.transport.ucx import UcxTransport
from common.transport.ucx_arrivals import _Arrival
from common.transport.ucx_link import UcxLink
from common.waiting import poll_until
from common.wire.header import Header, Kind
from tests.contract.harness import LIMITS, ROUTER, DeviceUcxNet, InprocNet, Peer, hello, run


class ReachingPort:
    """A port to whom rows offered in the host memory of this process are in reach, as those of a device are."""

    def __init__(self, port):
        self._port = port

    def __getattr__(self, name):
        return getattr(self._port, name)

    def reach_rows(self, offer):
        if offer & 1 == 0:  # UCX's own
            return 0, 0, 0
        place = struct.Struct("QQI256x4x")
        (rows, _, _), (landing, wanted, _) = place.iter_unpack(
            ctypes.string_at(offer - 1 + 16, 2 * place.size)
        )
        return rows, landing if wanted else 0, wanted

    def return_rows(self, offer):
        self._port.discard_rows(offer)


class ReachingUcxNet(DeviceUcxNet):
    """Rows and landings are used where they are."""

    def transport(self, limits=LIMITS, **options) -> UcxTransport:
        made = super().transport(limits, **options)
        start = made._start

        def reaching():
            plane = start()
            plane.port = (
                ReachingPort(plane.port) if not isinstance(plane.port, ReachingPort) else plane.port
            )
            return plane

        made._start = reaching
        return made


class DeviceInprocNet(InprocNet):
    def transport(self, limits=LIMITS, **options):
        made = self._fabric.transport(
            link_limits=limits, pool=options.get("pool", DevicePool("cpu"))
        )
        self.transports.append(made)
        return made


NETS = {"inproc": DeviceInprocNet, "ucx": DeviceUcxNet, "reaching": ReachingUcxNet}


@pytest.fixture(params=NETS.values(), ids=NETS)
def net(request, tmp_path):
    return request.param(tmp_path)


def test_without_a_compiler_rows_apart_are_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("common.transport.port._compiled", None)
    net = DeviceUcxNet(tmp_path)

    async def main():
        with pytest.raises(ConfigError, match="need the compiled port"):
            await net.transport().listen(net.address(), ROUTER, RowsPeer())

    run(net, main)


class RowsPeer(Peer):
    """Keeps (header, rows, tables) of everything; `answer` makes answers to requests."""

    def __init__(self, answer=None):
        super().__init__()
        self.got, self.places, self.answer = [], [], answer

    def on_message(self, link, header, payload):
        rows = tables = b""
        if payload is not None:
            tables = payload.array.tobytes()
            if payload.rows is not None:
                rows = payload.rows.tensor.cpu().numpy().tobytes()
                self.places.append((payload.rows.block, payload.rows.offset))
        self.got.append((header, rows, tables))
        if self.answer is not None and header.kind is Kind.EXPERT_IN:
            self.answer(link, header, rows)
        if payload is not None:
            payload.release()
        self._note("message", link)


class LandedPeer(RowsPeer):
    """Takes answers in short whose rows landed; `num_landed` of them."""

    num_landed = 0

    def on_landed(self, link, answer, landing):
        self.num_landed += 1
        self.places.append((landing.block, landing.offset))
        self.got.append((answer, landing.tensor.cpu().numpy().tobytes(), b""))
        self._note("message", link)


def check_no_block_leaked(net):
    pools = [transport.pool for transport in net.transports]
    assert [p.rows_outstanding for p in pools if isinstance(p, DevicePool)] == [0] * len(pools)


def payload_of(pool, rows: bytes, tables: bytes):
    buffer = pool.acquire(len(rows) + len(tables), rows_nbytes=len(rows))
    if rows:
        buffer.rows.tensor.copy_(torch.frombuffer(bytearray(rows), dtype=torch.uint8))
        synchronise(pool.device)
    if tables:
        buffer.view[128 : 128 + len(tables)] = tables
    return buffer


def post(link, header, pool, rows: bytes, tables: bytes, landing=None):
    """One message, whose payload is the link's from now on."""
    buffer = payload_of(pool, rows, tables)
    link.post(header, buffer, landing=landing)
    buffer.release()


async def linked(net, here, there, **options):
    dialler, listener = net.transport(**options), net.transport()
    address = await listener.listen(net.address(), ROUTER, there)
    link = await dialler.connect(address, hello(), here, timeout_s=5)
    await there.until(lambda: bool(there.links))
    return link, dialler, listener


def test_rows_and_tables_arrive_together_and_in_order(net):
    sizes = [(1 << 20, 64), (0, 10), (1, 0), (300_000, 20_000), (0, 0), (5 << 20, 3), (77, 70_000)]
    bodies = [(bytes([i + 1]) * a, bytes([i + 101]) * b) for i, (a, b) in enumerate(sizes * 3)]

    async def main():
        there = RowsPeer()
        link, dialler, _ = await linked(net, RowsPeer(), there)
        for block, (rows, tables) in enumerate(
            bodies
        ):  # more than the window: some wait for credit
            post(link, Header(Kind.EXPERT_OUT, block=block), dialler.pool, rows, tables)
            await asyncio.sleep(0)
        await there.until(lambda: len(there.got) == len(bodies))
        for block, (header, rows, tables) in enumerate(there.got):
            assert (header.block, header.rows_nbytes) == (block, len(rows))
            assert header.payload_nbytes == len(rows) + len(tables)
            assert (rows, tables) == bodies[block]

    run(net, main)
    check_no_block_leaked(net)


def answering(pool_of, nbytes=None, kind=Kind.EXPERT_OUT):
    def answer(link, header, rows):
        body = bytes(b ^ 0xFF for b in rows)[:nbytes]
        buffer = payload_of(
            pool_of(), body if kind is Kind.EXPERT_OUT else b"", b"" if body else b"x"
        )
        link.post(header.derive(kind, target=0, payload_nbytes=0), buffer)
        buffer.release()

    return answer


def test_rows_of_answers_land_where_the_asker_wants_them(net):
    async def main():
        here, pools = RowsPeer(), []
        there = RowsPeer(answering(lambda: pools[1]))
        link, dialler, listener = await linked(net, here, there)
        pools += [dialler.pool, listener.pool]
        arena = dialler.pool.take(8 * 40_000)
        for block in range(8):  # one behind the other in one stretch of memory
            buffer = payload_of(dialler.pool, bytes([block]) * 40_000, b"tables")
            place = arena.rows(block * 40_000, 40_000)
            link.post(Header(Kind.EXPERT_IN, block=block), buffer, landing=place)
            place.release()
            buffer.release()
        await here.until(lambda: len(here.got) == 8)
        assert here.places == [(arena, block * 40_000) for block in range(8)]
        landed = arena.tensor[: 8 * 40_000].view(8, 40_000).cpu()
        assert landed.eq(255 - torch.arange(8, dtype=torch.uint8)[:, None]).all()
        arena.release()

    run(net, main)
    check_no_block_leaked(net)


@pytest.mark.parametrize("nbytes", [100, None], ids=["shorter", "longer"])
def test_an_answer_of_another_size_closes_the_link(net, nbytes):
    async def main():
        here, pools = RowsPeer(), []
        link, dialler, listener = await linked(
            net, here, RowsPeer(answering(lambda: pools[0], nbytes))
        )
        pools.append(listener.pool)
        place = dialler.pool.acquire_rows(4096)
        post(link, Header(Kind.EXPERT_IN), dialler.pool, bytes(5000), b"", landing=place)
        place.release()
        await here.until(lambda: bool(here.closed))
        assert "4096 are wanted" in str(here.closed[0][1])

    run(net, main, leak_free=False)  # what UCX still held at the end is given back by close()


def test_a_failure_needs_no_rows(net):
    async def main():
        here, pools = RowsPeer(), []
        there = RowsPeer(answering(lambda: pools[0], 0, Kind.FAILED))
        link, dialler, listener = await linked(net, here, there)
        pools.append(listener.pool)
        for _ in range(2):
            place = dialler.pool.acquire_rows(4096)
            post(link, Header(Kind.EXPERT_IN), dialler.pool, bytes(100), b"", landing=place)
            place.release()
        await here.until(lambda: len(here.got) == 2)
        assert [(h.kind, rows, tables) for h, rows, tables in here.got] == [
            (Kind.FAILED, b"", b"x")
        ] * 2

    run(net, main)
    check_no_block_leaked(net)


def test_an_answer_to_nothing_closes_the_link(net):
    async def main():
        here, there = RowsPeer(), RowsPeer()
        link, dialler, _ = await linked(net, here, there)
        post(link, Header(Kind.EXPERT_OUT, answer=7), dialler.pool, bytes(100), b"")
        await there.until(lambda: bool(there.closed))
        assert "answer 7, which nobody waits for" in str(there.closed[0][1])

    run(net, main, leak_free=False)


def test_the_same_rows_can_be_sent_again_while_they_are_on_their_way(net):
    async def main():
        there = RowsPeer()
        link, dialler, _ = await linked(net, RowsPeer(), there)
        buffer = payload_of(dialler.pool, b"r" * (1 << 20), b"t" * 50_000)
        for attempt in range(5):
            link.post(Header(Kind.EXPERT_IN, attempt=attempt), buffer)
        buffer.release()
        await there.until(lambda: len(there.got) == 5)
        assert [h.attempt for h, _, _ in there.got] == list(range(5))
        assert {(rows, tables) for _, rows, tables in there.got} == {
            (b"r" * (1 << 20), b"t" * 50_000)
        }

    run(net, main)
    check_no_block_leaked(net)


def test_rows_to_a_process_without_device_buffers_close_the_link(net):
    async def main():
        here, there = RowsPeer(), RowsPeer()
        dialler, listener = net.transport(), net.transport(pool=BufferPool())
        address = await listener.listen(net.address(), ROUTER, there)
        link = await dialler.connect(address, hello(), here, timeout_s=5)
        await there.until(lambda: bool(there.links))
        post(link, Header(Kind.EXPERT_IN), dialler.pool, bytes(100), b"")
        await there.until(lambda: bool(there.closed))
        assert "to a process without device buffers" in str(there.closed[0][1])

    run(net, main, leak_free=False)


@pytest.mark.parametrize("num_tables", [16, 70_000], ids=["together", "apart"])
def test_rows_shorter_than_their_header_says_close_the_link(tmp_path, num_tables):
    net = DeviceUcxNet(tmp_path)

    async def main():
        here, there = RowsPeer(), RowsPeer()
        link, dialler, _ = await linked(net, here, there)
        send = link._send_rows

        def cut(rows, *others):
            send(rows.block.rows(0, rows.nbytes - 1), *others)
            rows.release()

        link._send_rows = cut
        post(
            link,
            Header(Kind.EXPERT_IN, num_rows=1),
            dialler.pool,
            b"r" * 100_000,
            b"t" * num_tables,
        )
        await there.until(lambda: bool(there.closed))
        assert "99999 bytes of rows, the header says 100000" in str(there.closed[0][1])
        assert not there.got

    run(net, main)
    check_no_block_leaked(net)


@pytest.mark.parametrize(
    ("kind", "number", "sentence"),
    [
        (2, 1 << 20, "message 1048576 of kind 2"),
        (3, 1 << 20, "message 1048576 of kind 3"),
        (4, 0, "message 0 of kind 4"),
    ],
    ids=["far ahead", "rows far ahead", "unknown"],
)
def test_rows_that_no_correct_peer_announces_close_the_link(tmp_path, kind, number, sentence):
    net = DeviceUcxNet(tmp_path)

    async def main():
        here, there = RowsPeer(), RowsPeer()
        link, dialler, _ = await linked(net, here, there)
        rows = dialler.pool.acquire_rows(100_000)
        head = dialler.pool.acquire(0)
        tag = kind << 56 | link._credits.tag | number
        link._send_rows(rows, tag, head.address, 128, None)
        await there.until(lambda: bool(there.closed))
        assert sentence in str(there.closed[0][1])
        head.release()

    run(net, main)
    check_no_block_leaked(net)


class HoldingPeer(RowsPeer):
    """Keeps payloads."""

    def on_message(self, link, header, payload):
        self.got.append((header, payload))
        self._note("message", link)


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed"])
def test_rows_in_reach_are_read_where_they_are_and_kept_until_then(tmp_path, closed):
    net = ReachingUcxNet(tmp_path)

    async def main():
        here, there = RowsPeer(), HoldingPeer()
        link, dialler, listener = await linked(net, here, there)
        buffer = payload_of(dialler.pool, b"r" * 100_000, b"t")
        address = buffer.rows.address
        link.post(Header(Kind.EXPERT_IN), buffer)
        buffer.release()
        await there.until(lambda: len(there.got) == 1)
        ((_, payload),) = there.got
        assert payload.rows.address == address
        assert payload.rows.block.owner is there.links[0]
        assert dialler.pool.rows_outstanding == 1
        assert listener.pool.rows_outstanding == 0
        with pytest.raises(LinkClosed, match="for a link that is gone"):
            link.post(Header(Kind.EXPERT_IN), payload)
        if closed:
            link.close("enough")
            await there.until(lambda: bool(there.closed))
        assert payload.rows.tensor.eq(ord("r")).all()
        payload.release()
        await poll_until(lambda: not dialler.pool.rows_outstanding)

    run(net, main)


def test_a_slot_that_names_other_memory_is_named_anew(tmp_path):
    """The first free slot is used again, and what it says already is not written again: only that."""
    net, slots, key_at = ReachingUcxNet(tmp_path), set(), 16 + struct.calcsize("QQI")

    async def main():
        here, there = RowsPeer(), HoldingPeer()
        link, dialler, _ = await linked(net, here, there)
        keys = []
        for turn in range(3):
            post(link, Header(Kind.EXPERT_IN), dialler.pool, b"r" * 100_000, b"t")
            await there.until(lambda: bool(there.got))
            ((_, payload),), there.got = there.got, []
            slot = payload.rows.block.offer - 1
            slots.add(slot)
            nbytes = ctypes.c_uint32.from_address(slot + key_at - 4).value
            keys.append(ctypes.string_at(slot + key_at, nbytes))
            if turn == 1:  # as that of another block would be
                ctypes.memset(slot + key_at, 0xA5, nbytes)
            payload.release()
            await poll_until(lambda: not dialler.pool.rows_outstanding)
        assert len(slots) == 1
        assert len(set(keys)) == 1
        assert len(keys[0]) > 8

    run(net, main)
    check_no_block_leaked(net)


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


async def asked(net, here, num=1, **options):
    """A link, its other end, and there the answers to `num` questions, with rows where they are wanted.

    The answers (header, buffer) are still to be posted and released.
    """
    there = HoldingPeer()
    link, dialler, listener = await linked(net, here, there, **options)
    for block in range(num):
        place = dialler.pool.acquire_rows(4096)
        post(
            link, Header(Kind.EXPERT_IN, block=block), dialler.pool, bytes(100), b"", landing=place
        )
        place.release()
    await there.until(lambda: len(there.got) == num)
    answers = []
    for header, payload in there.got:
        reply = header.derive(Kind.EXPERT_OUT, target=0, payload_nbytes=0)
        answers.append((reply, listener.pool.acquire_with(payload.landing.retain())))
        payload.release()
    return link, there.links[0], answers


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


def test_a_full_queue_gives_the_landing_back(net):
    async def main():
        here, there = RowsPeer(), RowsPeer()
        link, dialler, _ = await linked(net, here, there)
        place = dialler.pool.acquire_rows(4096)
        for _ in range(LIMITS.window + LIMITS.max_queued):
            link.post(Header(Kind.EXPERT_IN), landing=place)
        held = place.block._count
        with pytest.raises(Overloaded, match="the limit is 16"):
            link.post(Header(Kind.EXPERT_IN), landing=place)
        assert place.block._count == held
        link.close("enough")
        place.release()

    run(net, main, leak_free=False)
    check_no_block_leaked(net)


def test_a_link_that_closes_gives_all_memory_back(net):
    async def main():
        here, there = RowsPeer(), RowsPeer()
        link, dialler, _ = await linked(net, here, there)
        for _ in range(LIMITS.window + 3):  # the last ones wait for credit
            place = dialler.pool.acquire_rows(100_000)
            post(
                link, Header(Kind.EXPERT_IN), dialler.pool, bytes(1 << 20), b"tables", landing=place
            )
            place.release()
        link.close("enough")
        await here.until(lambda: bool(here.closed))
        await there.until(lambda: bool(there.closed))

    run(net, main)
    check_no_block_leaked(net)


@pytest.mark.parametrize("way", ["in", "out"])
def test_memory_that_a_living_process_may_touch_is_not_used_again(tmp_path, monkeypatch, way):
    """As over CUDA IPC: the peer has been told where to write or read, and only its end is a promise not to."""
    net = DeviceUcxNet(tmp_path)
    monkeypatch.setattr(UcxLink, "carriers", lambda link: ("cuda_ipc/cuda",))
    monkeypatch.setattr(ucx_plane, "_LOOK_S", 0.02)
    gone = subprocess.Popen(["true"])
    gone.wait()

    async def main():
        here, there = RowsPeer(), RowsPeer()
        _, _, listener = await linked(net, here, there)
        (far,) = there.links
        lost = listener.pool.acquire_rows(100_000)
        if way == "in":
            far._rows_in(_Arrival(listener.pool.acquire(0)), lost, CANCELED)
        else:
            far._rows_sent(lost, CANCELED)
        await here.until(lambda: bool(here.closed))
        await asyncio.sleep(0.1)
        assert listener.pool.rows_outstanding == 1, "this process lives, and is the peer"
        plane = listener._plane
        plane._retired = [(rows, gone.pid) for rows, _ in plane._retired]
        await poll_until(lambda: not listener.pool.rows_outstanding)
        assert plane._retired_timer is None

    run(net, main, leak_free=False)


class ManualEvent:
    """A CUDA event that is passed when the test says so."""

    passed = False

    def record(self):
        pass

    def query(self):
        return ManualEvent.passed


def test_rows_wait_for_their_fence_and_what_is_behind_them_too(tmp_path):
    net = DeviceUcxNet(tmp_path)

    async def main():
        ManualEvent.passed = False
        here, there = RowsPeer(), RowsPeer()
        seam = Seam(ManualEvent)
        link, dialler, _ = await linked(net, here, there, seam=seam)
        fenced = payload_of(dialler.pool, b"not yet", b"")
        fenced.rows.fence = seam.fence()
        free = payload_of(dialler.pool, b"at once", b"")
        for buffer in (fenced, free):
            link.post(Header(Kind.EXPERT_IN), buffer)
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert seam.is_open, "the fence is open"
        assert not there.got
        fenced.rows.tensor.copy_(torch.frombuffer(bytearray(b"written"), dtype=torch.uint8))
        ManualEvent.passed = True
        await there.until(lambda: len(there.got) == 2)
        assert [rows for _, rows, _ in there.got] == [b"written", b"at once"]
        fenced.release()
        free.release()

    run(net, main)
    check_no_block_leaked(net)


@pytest.mark.parametrize("rows", [b"", b"apart"], ids=["alone", "with rows"])
def test_messages_that_came_together_do_not_keep_what_the_device_has_written(tmp_path, rows):
    net, seen = DeviceUcxNet(tmp_path), []

    class Slow(RowsPeer):
        """Launches something at each message, which is done before the next is handled."""

        def on_message(self, link, header, payload):
            seen.append(header.block)
            ManualEvent.passed = False
            self.seam.fence().then(lambda: seen.append("written"))
            ManualEvent.passed = True
            super().on_message(link, header, payload)

    async def main():
        here, there = Slow(), RowsPeer()
        here.seam = Seam(ManualEvent)
        _, _, listener = await linked(net, here, there, seam=here.seam)
        for block in range(3):  # nobody reads before the last is posted
            post(there.links[0], Header(Kind.EXPERT_OUT, block=block), listener.pool, rows, b"tail")
        await here.until(lambda: len(here.got) == 3)
        async with asyncio.timeout(5):
            await poll_until(lambda: not here.seam.is_open)
        assert seen == [0, "written", 1, "written", 2, "written"]

    run(net, main)
    check_no_block_leaked(net)


def test_a_fence_that_is_passed_after_its_link_closed_sends_nothing(tmp_path):
    net = DeviceUcxNet(tmp_path)

    async def main():
        ManualEvent.passed = False
        here, there = RowsPeer(), RowsPeer()
        seam = Seam(ManualEvent)
        link, dialler, _ = await linked(net, here, there, seam=seam)
        buffer = payload_of(dialler.pool, b"late", b"")
        buffer.rows.fence = seam.fence()
        link.post(Header(Kind.EXPERT_IN), buffer)
        buffer.release()
        link.close("enough")
        await here.until(lambda: bool(here.closed))
        ManualEvent.passed = True
        async with asyncio.timeout(5):
            await poll_until(lambda: not seam.is_open)

    run(net, main)
    check_no_block_leaked(net)


def test_a_record_that_no_port_writes_closes_its_link(tmp_path):
    net = DeviceUcxNet(tmp_path)

    async def main():
        here, there = RowsPeer(), RowsPeer()
        link, _, _ = await linked(net, here, there)
        inbox = there.links[0]._neighbour._file
        os.pwrite(inbox, struct.pack("Q", 1 << 40), 64)  # so many bytes are written, it says
        link.post(Header(Kind.EXPERT_IN, num_rows=1))
        await there.until(lambda: bool(there.closed))
        assert "message 0 of kind 0" in str(there.closed[0][1])

    run(net, main, leak_free=False)


def test_more_than_an_inbox_holds_comes_in_order(tmp_path):
    """What finds no room there goes by UCX."""
    net = DeviceUcxNet(tmp_path)
    sizes = [(r, t) for r in (0, 70_000) for t in (10, 60_000, 100_000, 400_000)] * 5

    async def main():
        there = RowsPeer()
        limits = LinkLimits(window=64, max_queued=64, max_payload_nbytes=16 << 20)
        dialler, listener = net.transport(limits), net.transport(limits)
        address = await listener.listen(net.address(), ROUTER, there)
        link = await dialler.connect(address, hello(), RowsPeer(), timeout_s=5)
        for block, (rows, tables) in enumerate(sizes):  # nobody reads before the last is posted
            post(
                link,
                Header(Kind.EXPERT_OUT, block=block),
                dialler.pool,
                bytes([block + 1]) * rows,
                bytes([block]) * tables,
            )
        await there.until(lambda: len(there.got) == len(sizes))
        for block, (header, rows, tables) in enumerate(there.got):
            assert header.block == block
            assert (rows, tables) == (
                bytes([block + 1]) * sizes[block][0],
                bytes([block]) * sizes[block][1],
            )

    run(net, main)
    check_no_block_leaked(net)


@pytest.mark.parametrize(
    "offer",
    [None, {}, {"pid": 1, "file": "x", "proof": ""}, [1]],
    ids=["none", "empty", "odd", "list"],
)
def test_a_peer_that_offers_no_memory_or_nonsense(tmp_path, monkeypatch, offer):
    """Without an offer all goes by UCX; nonsense is refused."""
    net = DeviceUcxNet(tmp_path)
    monkeypatch.setattr(Neighbour, "offer", lambda neighbour: offer)

    async def main():
        here, there = RowsPeer(), RowsPeer()
        dialler, listener = net.transport(), net.transport()
        address = await listener.listen(net.address(), ROUTER, there)
        if isinstance(offer, dict):
            with pytest.raises(AtollError):
                await dialler.connect(address, hello(), here, timeout_s=5)
            return
        link = await dialler.connect(address, hello(), here, timeout_s=5)
        post(link, Header(Kind.EXPERT_OUT), dialler.pool, b"r" * 70_000, b"t")
        await there.until(lambda: bool(there.got))
        assert there.got[0][1:] == (b"r" * 70_000, b"t")
        assert not link._is_met

    run(net, main)
    check_no_block_leaked(net)


def test_without_memory_to_share_all_goes_by_ucx(tmp_path, monkeypatch, caplog):
    net = DeviceUcxNet(tmp_path)

    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)

    async def main():
        here, there = RowsPeer(), RowsPeer()
        link, dialler, _ = await linked(net, here, there)
        post(link, Header(Kind.EXPERT_OUT), dialler.pool, b"r" * 70_000, b"t")
        await there.until(lambda: bool(there.got))
        assert there.got[0][1:] == (b"r" * 70_000, b"t")
        assert not link._is_met

    run(net, main)
    check_no_block_leaked(net)
    assert "reached by UCX alone: [Errno 24] Too many open files" in caplog.text


def test_one_side_alone_may_reach_the_other(tmp_path, monkeypatch):
    net = DeviceUcxNet(tmp_path)
    offer = Neighbour.offer
    offered = []

    def first(neighbour):
        offered.append(neighbour)
        return offer(neighbour) if len(offered) == 1 else None

    monkeypatch.setattr(Neighbour, "offer", first)

    async def main():
        here, there = RowsPeer(), RowsPeer()
        link, dialler, listener = await linked(net, here, there)
        (far,) = there.links
        assert (link._is_met, far._is_met) == (False, True)
        for sender, pool, peer in ((link, dialler.pool, there), (far, listener.pool, here)):
            for block in range(3):
                post(sender, Header(Kind.EXPERT_OUT, block=block), pool, b"r" * 70_000, b"t")
            await peer.until(lambda peer=peer: len(peer.got) == 3)
            assert {(rows, tables) for _, rows, tables in peer.got} == {(b"r" * 70_000, b"t")}

    run(net, main)
    check_no_block_leaked(net)


@pytest.mark.parametrize(
    "change", [{"proof": "00" * 16}, {"pid": 1 << 22}, {"file": 0}, {"file": 1 << 30}]
)
def test_memory_that_is_not_what_the_peer_meant_is_not_used(tmp_path, monkeypatch, change):
    net = DeviceUcxNet(tmp_path)
    offer = Neighbour.offer
    monkeypatch.setattr(Neighbour, "offer", lambda neighbour: offer(neighbour) | change)

    async def main():
        here, there = RowsPeer(), RowsPeer()
        link, dialler, _ = await linked(net, here, there)
        assert not link._is_met
        assert not there.links[0]._is_met
        post(link, Header(Kind.EXPERT_OUT), dialler.pool, b"r" * 70_000, b"t")
        await there.until(lambda: bool(there.got))

    run(net, main)
    check_no_block_leaked(net)


@pytest.mark.parametrize("kind", [DeviceUcxNet, ReachingUcxNet], ids=["fetched", "reached"])
def test_a_long_run_of_messages_of_all_sizes_held_for_a_while(tmp_path, kind):
    """Through the inbox many times over, all its slots used again, with what finds no room going by UCX between."""
    net, draw = kind(tmp_path), random.Random(7)
    sizes = [
        (draw.choice((0, 1, 100, 5000, 90_000)), draw.choice((0, 1, 3000, 60_000, 140_000)))
        for _ in range(700)
    ]

    class Holding(HoldingPeer):
        def on_message(self, link, header, payload):
            rows, tables = sizes[header.block]
            assert header.block == self.num, "out of order"
            self.num += 1
            byte = header.block % 251
            if payload is None:
                assert rows == tables == 0
            else:
                assert payload.array.tobytes() == bytes([byte]) * tables
                assert payload.rows_nbytes == rows
                self.held.append((payload, byte))
            while len(self.held) > draw.randrange(12):
                self.give_back(self.held.pop(draw.randrange(len(self.held))))
            self._note("message", link)

        def give_back(self, held):
            payload, byte = held
            if payload.rows is not None:  # not before now: they are still what they were
                assert payload.rows.tensor.eq(byte).all()
            payload.release()

    async def main():
        here, there = RowsPeer(), Holding()
        there.num, there.held = 0, []
        limits = LinkLimits(window=32, max_queued=64, max_payload_nbytes=16 << 20)
        dialler, listener = net.transport(limits), net.transport(limits)
        address = await listener.listen(net.address(), ROUTER, there)
        link = await dialler.connect(address, hello(), here, timeout_s=5)
        for block, (rows, tables) in enumerate(sizes):
            byte = bytes([block % 251])
            post(
                link, Header(Kind.EXPERT_OUT, block=block), dialler.pool, byte * rows, byte * tables
            )
            if len(link._queue) > 30 or draw.random() < 0.2:
                await there.until(lambda: there.num >= block - draw.randrange(20))  # noqa: B023
        await there.until(lambda: there.num == len(sizes))
        for held in there.held:
            there.give_back(held)
        await poll_until(lambda: not dialler.pool.rows_outstanding)

    run(net, main)
    check_no_block_leaked(net)


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
