"""Peers of one host: rows are read where they are, messages come through memory, or all goes by UCX."""

import asyncio
import ctypes
import errno
import os
import random
import struct
import subprocess

import pytest

from common.errors import AtollError, LinkClosed
from common.transport import ucx_plane
from common.transport.link import LinkLimits
from common.transport.neighbour import Neighbour
from common.transport.port import CANCELED
from common.transport.ucx_arrivals import _Arrival
from common.transport.ucx_link import UcxLink
from common.waiting import poll_until
from common.wire.header import Header, Kind
from tests.contract.harness import ROUTER, DeviceUcxNet, hello, run
from tests.contract.rows import (
    HoldingPeer,
    ReachingUcxNet,
    RowsPeer,
    check_no_block_leaked,
    linked,
    payload_of,
    post,
)


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


async def check_all_goes_by_ucx(link, dialler, there):
    post(link, Header(Kind.EXPERT_OUT), dialler.pool, b"r" * 70_000, b"t")
    await there.until(lambda: bool(there.got))
    assert there.got[0][1:] == (b"r" * 70_000, b"t")
    assert not link._is_met


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
        await check_all_goes_by_ucx(link, dialler, there)

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
        await check_all_goes_by_ucx(link, dialler, there)

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
