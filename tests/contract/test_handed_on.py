"""Rows of a neighbour that are handed on: whoever is asked reads them where they are, or gets a copy."""

import zlib
from contextlib import AsyncExitStack

import pytest
import torch

from common.transport.link import LinkLimits
from common.transport.outbox import Outbox
from common.transport.seam import WRITTEN
from common.transport.volley import Volley
from common.waiting import poll_until
from common.wire.header import Header, Kind
from tests.contract.child import OFFERED
from tests.contract.harness import DEVICE, LIMITS, ROUTER, DeviceUcxNet, hello, run
from tests.contract.rows import (
    ReachingUcxNet,
    RowsPeer,
    check_no_block_leaked,
    post,
)
from tests.contract.test_death import kill
from tests.contract.test_volleys import REQUEST, processes

ROWS = bytes(range(160)) * 20


class Keeper(RowsPeer):
    """Keeps payloads."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def on_message(self, link, header, payload):
        self.kept.append(payload.retain())
        super().on_message(link, header, payload)


class Handed(Volley):
    """Rows of a payload, whole; copied for a message that goes by itself."""

    def __init__(self, payload, pool):
        rows = payload.rows
        super().__init__(REQUEST, Kind.EXPERT_PICK, pool, rows.block.retain(), WRITTEN)
        self.source, self.num_copies = rows, 0

    @property
    def kind_alone(self):
        return Kind.EXPERT_IN

    def alone(self, part):
        self.num_copies += 1
        rows = self.pool.acquire_rows(part.nbytes)
        rows.tensor.copy_(self.source.tensor)
        rows.fence = WRITTEN
        return rows, b"a copy"

    def ask(self, outboxes, landings=None):
        """Of each, with a number."""
        nbytes, questions, self.landings = self.source.nbytes, [], landings
        for number in range(len(outboxes)):
            tail = b"%8d" % number
            where = (0, 0) if landings is None else (number * nbytes, nbytes)
            questions.append((number, 0, 1, zlib.crc32(tail), 0, nbytes, tail, *where))
        self.post(outboxes, questions, 0)
        self.leave()


class Way:
    """An origin that offers rows, a middle that has them, and a reader whom the middle dials."""

    def __init__(self, net, readers_net=None, window=8):
        self.net, self.readers_net = net, readers_net or net
        self.limits = LinkLimits(window=window, max_queued=16, max_payload_nbytes=16 << 20)
        self.near, self.middle, self.reader = RowsPeer(), Keeper(), RowsPeer()

    async def open(self):
        transports = [self.net.transport(LIMITS), self.net.transport(self.limits)]
        self.origin, self.transport = transports
        address = await self.transport.listen(self.net.address(), ROUTER, self.middle)
        link = await self.origin.connect(address, hello(), self.near, timeout_s=5)
        self.listener = self.readers_net.transport(self.limits)
        self.readers_at = await self.listener.listen(self.net.address(), ROUTER, self.reader)
        self.outbox = Outbox("reader")
        await self.dial()
        post(link, Header(Kind.DISPATCH), self.origin.pool, ROWS, b"")
        await self.middle.until(lambda: bool(self.middle.kept))
        (payload,) = self.middle.kept
        assert payload.rows.block.offer
        self.handed = Handed(payload, self.transport.pool)

    async def dial(self):
        self.link = await self.transport.connect(self.readers_at, hello(), self.middle, timeout_s=5)
        self.outbox.opened(self.link)

    def settle(self):
        self.outbox.clear()
        for payload in self.middle.kept:
            payload.release()

    async def returned(self):
        """The origin has its rows back."""
        await poll_until(lambda: self.origin.pool.rows_outstanding == 0)


def test_rows_are_read_where_they_were_written_and_come_back_when_all_have_read_them(tmp_path):
    net = ReachingUcxNet(tmp_path)

    async def main():
        way = Way(net)
        await way.open()
        way.handed.ask([way.outbox] * 5)
        await way.reader.until(lambda: len(way.reader.got) == 5)
        assert way.handed.num_copies == 0
        address = way.handed.source.address
        assert {block.address for block, _ in way.reader.places} == {address}, "not a copy"
        assert [(h.kind, h.block, rows, tail) for h, rows, tail in way.reader.got] == [
            (Kind.EXPERT_PICK, n, ROWS, b"%8d" % n) for n in range(5)
        ]
        assert way.origin.pool.rows_outstanding == 1, "the middle holds them"
        way.settle()
        await way.returned()

    run(net, main)
    check_no_block_leaked(net)


def test_without_room_for_all_the_others_are_copied(tmp_path):
    """A reader that takes its time holds every slot of the link."""
    net = ReachingUcxNet(tmp_path)

    async def main():
        way = Way(net, window=600)
        way.reader = Keeper()
        await way.open()
        way.handed.ask([way.outbox] * 300)
        await way.reader.until(lambda: len(way.reader.got) == 300)
        kinds = [header.kind for header, _, _ in way.reader.got]
        assert kinds == [Kind.EXPERT_PICK] * 256 + [Kind.EXPERT_IN] * 44
        assert way.handed.num_copies == 44
        assert {rows for _, rows, _ in way.reader.got} == {ROWS}
        assert [header.block for header, _, _ in way.reader.got] == list(range(300))
        for payload in way.reader.kept:
            payload.release()
        way.settle()
        await way.returned()

    run(net, main)
    check_no_block_leaked(net)


def test_one_that_is_held_for_long_is_in_nobodys_way(tmp_path):
    """Others go on through the other slots, however often."""
    net = ReachingUcxNet(tmp_path)

    async def main():
        way = Way(net, window=600)
        await way.open()
        slow = Keeper()
        on_message, way.reader.on_message = way.reader.on_message, slow.on_message
        way.handed.ask([way.outbox])
        await slow.until(lambda: len(slow.kept) == 1)
        way.outbox.clear()
        way.reader.on_message = on_message
        for done in range(100, 701, 100):
            handed = Handed(way.middle.kept[0], way.transport.pool)
            handed.ask([way.outbox] * 100)
            await way.reader.until(lambda done=done: len(way.reader.got) == done)
            assert handed.num_copies == 0
            way.outbox.clear()
        slow.kept[0].release()
        way.settle()
        await way.returned()

    run(net, main)
    check_no_block_leaked(net)


def test_a_reader_that_does_not_reach_them_gets_copies_from_then_on(tmp_path):
    net = ReachingUcxNet(tmp_path)
    readers_net = DeviceUcxNet(tmp_path)  # as a process without the right card
    readers_net.transports = net.transports

    async def main():
        way = Way(net, readers_net)
        await way.open()
        way.link._reaches_here = True  # as where UCX copies between cards
        way.handed.ask([way.outbox])
        await way.middle.until(lambda: bool(way.middle.closed))
        way.outbox.closed(way.link)
        assert not way.reader.got
        await way.dial()
        await way.reader.until(lambda: len(way.reader.got) == 1)
        way.outbox.clear()
        again = Handed(way.middle.kept[0], way.transport.pool)
        again.ask([way.outbox])
        await way.reader.until(lambda: len(way.reader.got) == 2)
        for header, rows, tail in way.reader.got:
            assert (header.kind, rows, tail) == (Kind.EXPERT_IN, ROWS, b"a copy")
        assert len(way.middle.closed) == 1, "the second was not tried"
        way.settle()
        await way.returned()

    run(net, main)
    check_no_block_leaked(net)


def test_a_copy_waits_for_credit_as_any_message(tmp_path):
    net = ReachingUcxNet(tmp_path)

    async def main():
        way = Way(net, window=2)
        await way.open()
        way.handed.ask([way.outbox] * 5)
        await way.reader.until(lambda: len(way.reader.got) == 5)
        assert [header.block for header, _, _ in way.reader.got] == list(range(5))
        assert {rows for _, rows, _ in way.reader.got} == {ROWS}
        assert way.handed.num_copies == 3
        way.settle()
        await way.returned()

    run(net, main)
    check_no_block_leaked(net)


@pytest.mark.parametrize("killed", [False, True])
def test_three_processes(shared, killed):
    """One offers, we hand on, two read; one of these is killed."""

    async def main():
        async with AsyncExitStack() as stack:
            kinds = ("offer", "hold" if killed else "invert", "invert")
            (_, doomed, _), addresses = await processes(stack, shared, *kinds)
            here, transport = Keeper(), shared.transport()
            links = [await transport.connect(a, hello(), here, timeout_s=5) for a in addresses]
            await here.until(lambda: bool(here.kept))
            (payload,) = here.kept
            nbytes = payload.rows.nbytes
            assert nbytes == len(OFFERED)
            assert (payload.rows.block.offer != 0) == (DEVICE != "cpu")
            outboxes = [Outbox("one"), Outbox("two")]
            for outbox, link in zip(outboxes, links[1:], strict=True):
                outbox.opened(link)
            landing = transport.pool.take(2 * nbytes)
            handed = Handed(payload, transport.pool)
            handed.ask(outboxes, landing)
            await here.until(lambda: len(here.got) == (2 if killed else 3))
            assert handed.num_copies == 0
            if killed:
                await kill(doomed, here)
            inverse = torch.tensor([b ^ 0xFF for b in OFFERED], dtype=torch.uint8)
            for header, _, _ in here.got[1:]:
                start = header.block * nbytes
                assert torch.equal(landing.tensor[start : start + nbytes].cpu(), inverse)
            for outbox in outboxes:
                outbox.clear()
            landing.release()
            for kept in here.kept:
                kept.release()
            for link in links:
                link.close("enough")

    run(shared, main, leak_free=not killed)
