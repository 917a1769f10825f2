"""Rows in device memory, over both transports: they arrive with their message, where they are wanted, or not at all."""

import asyncio

import pytest
import torch

from common.errors import ConfigError, Overloaded
from common.transport.buffers import BufferPool
from common.transport.seam import Seam
from common.waiting import poll_until
from common.wire.header import Header, Kind
from tests.contract.harness import LIMITS, ROUTER, DeviceUcxNet, hello, run
from tests.contract.rows import (
    NETS,
    ManualEvent,
    RowsPeer,
    answering,
    check_no_block_leaked,
    linked,
    payload_of,
    post,
)


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
