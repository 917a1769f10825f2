"""Rows in device memory, over both transports: they arrive with their message, where they are wanted, or not at all.

The device is the CPU unless ATOLL_TEST_DEVICE names another: the form on the wire is the same.
"""

import asyncio
import os
import subprocess

import pytest
import torch

from common.errors import ConfigError
from common.transport import ucx_plane
from common.transport.buffers import BufferPool
from common.transport.device import DevicePool, open_seam, synchronise
from common.transport.port import CANCELED
from common.transport.seam import Seam
from common.transport.ucx import UcxTransport
from common.transport.ucx_link import UcxLink, _Arrival
from common.waiting import poll_until
from common.wire.header import Header, Kind
from tests.contract.harness import LIMITS, ROUTER, InprocNet, Peer, UcxNet, hello, run

DEVICE = os.environ.get("ATOLL_TEST_DEVICE", "cpu")


class DeviceUcxNet(UcxNet):
    def transport(self, limits=LIMITS, **options) -> UcxTransport:
        options = {"pool": DevicePool(DEVICE), "seam": open_seam(DEVICE)} | options
        return super().transport(limits, **options)


class DeviceInprocNet(InprocNet):
    def transport(self, limits=LIMITS, **options):
        made = self._fabric.transport(
            link_limits=limits, pool=options.get("pool", DevicePool("cpu"))
        )
        self.transports.append(made)
        return made


@pytest.fixture(params=[DeviceInprocNet, DeviceUcxNet], ids=["inproc", "ucx"])
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
            buffer = payload_of(dialler.pool, rows, tables)
            link.post(Header(Kind.EXPERT_OUT, block=block), buffer)
            buffer.release()
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
        buffer = payload_of(dialler.pool, bytes(5000), b"")
        link.post(Header(Kind.EXPERT_IN), buffer, landing=place)
        place.release()
        buffer.release()
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
            buffer = payload_of(dialler.pool, bytes(100), b"")
            link.post(Header(Kind.EXPERT_IN), buffer, landing=place)
            place.release()
            buffer.release()
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
        buffer = payload_of(dialler.pool, bytes(100), b"")
        link.post(Header(Kind.EXPERT_OUT, answer=7), buffer)
        buffer.release()
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
        buffer = payload_of(dialler.pool, bytes(100), b"")
        link.post(Header(Kind.EXPERT_IN), buffer)
        buffer.release()
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

        def cut(rows, tag, head, head_nbytes):
            send(rows.block.rows(0, rows.nbytes - 1), tag, head, head_nbytes)
            rows.release()

        link._send_rows = cut
        buffer = payload_of(dialler.pool, b"r" * 100_000, b"t" * num_tables)
        link.post(Header(Kind.EXPERT_IN, num_rows=1), buffer)
        buffer.release()
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
        tag = kind << 56 | link._tag_base | number
        link._send_rows(rows, tag, head.address, 128)
        await there.until(lambda: bool(there.closed))
        assert sentence in str(there.closed[0][1])
        head.release()

    run(net, main)
    check_no_block_leaked(net)


def test_a_link_that_closes_gives_all_memory_back(net):
    async def main():
        here, there = RowsPeer(), RowsPeer()
        link, dialler, _ = await linked(net, here, there)
        for _ in range(LIMITS.window + 3):  # the last ones wait for credit
            place = dialler.pool.acquire_rows(100_000)
            buffer = payload_of(dialler.pool, bytes(1 << 20), b"tables")
            link.post(Header(Kind.EXPERT_IN), buffer, landing=place)
            place.release()
            buffer.release()
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
