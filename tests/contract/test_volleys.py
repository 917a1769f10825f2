"""Messages that leave together: what arrives is what each by itself would bring, and nothing is lost or leaks."""

import asyncio
import random
import zlib
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
import torch

from common.errors import Overloaded
from common.transport.link import LinkLimits, LinkState
from common.transport.outbox import Outbox
from common.transport.port import CANCELED
from common.transport.seam import Fence, Seam
from common.transport.volley import Volley
from common.waiting import poll_until
from common.wire.header import Header, Kind, Wire
from tests.contract.harness import DEVICE, LIMITS, ROUTER, DeviceUcxNet, hello, run
from tests.contract.rows import (
    NETS,
    LandedPeer,
    ManualEvent,
    RowsPeer,
    answering,
    check_no_block_leaked,
)
from tests.contract.test_death import child, kill
from tests.device import synchronise

REQUEST = Header(
    Kind.DISPATCH, Wire.BF16, 7, 3, 1024, 1 << 50, 1 << 40, 128, 1024, attempt=2, microbatch=1
)
WRITTEN = Fence(passed=True)


@pytest.fixture(params=NETS.values(), ids=NETS)
def net(request, tmp_path):
    return request.param(tmp_path)


class Fleet:
    """A dialler with a link and an outbox to each of some listeners."""

    def __init__(self, net, there, kind=RowsPeer):
        self.net, self.there, self.here = net, there, kind()

    async def open(self, limits=LIMITS, **options):
        self.listeners = [self.net.transport(limits) for _ in self.there]
        addresses = []
        for listener, peer in zip(self.listeners, self.there, strict=True):
            addresses.append(await listener.listen(self.net.address(), ROUTER, peer))
        await self.dial(addresses, limits, **options)
        for peer in self.there:
            await peer.until(lambda peer=peer: bool(peer.links))

    async def dial(self, addresses, limits=LIMITS, **options):
        self.dialler = self.net.transport(limits, **options)
        self.links, self.outboxes = [], []
        for number, address in enumerate(addresses):
            link = await self.dialler.connect(address, hello(), self.here, timeout_s=5)
            self.outboxes.append(Outbox(f"expert-{number}"))
            self.outboxes[-1].opened(link)
            self.links.append(link)

    def ask(self, bodies, *, fence=WRITTEN, landed=False):
        """bodies: (who, rows, tail). The block, and that of answers, which are wanted (`landed`) at the same place."""
        pool = self.dialler.pool
        nbytes = sum(len(rows) for _, rows, _ in bodies)
        block, landings = pool.take(nbytes), pool.take(nbytes)
        volley, questions, place = (
            Volley(REQUEST, Kind.EXPERT_IN, pool, block, fence, landings),
            [],
            0,
        )
        for number, (who, rows, tail) in enumerate(bodies):
            block.tensor[place : place + len(rows)].copy_(
                torch.frombuffer(bytearray(rows), dtype=torch.uint8)
            )
            counts, wanted = (len(rows), zlib.crc32(tail)), len(rows) if landed else 0
            questions.append((900 + number, who, *counts, place, len(rows), tail, place, wanted))
            place += len(rows)
        synchronise(pool.device)
        try:
            volley.post([self.outboxes[who] for who, _, _ in bodies], questions, 0)
        finally:
            volley.leave()
        return block, landings

    def settle(self):
        for outbox in self.outboxes:
            outbox.clear()


async def unwritten(net, num):
    """A fleet of `num` peers, and fences that are passed when `ManualEvent` says so."""
    ManualEvent.passed = False
    fleet, seam = Fleet(net, [RowsPeer() for _ in range(num)]), Seam(ManualEvent)
    await fleet.open(seam=seam)
    return fleet, seam


def expected(number, who, rows, tail):
    return replace(
        REQUEST, kind=Kind.EXPERT_IN, block=900 + number, target=who, num_rows=len(rows), num_pairs=zlib.crc32(tail),
        payload_nbytes=len(rows) + len(tail), rows_nbytes=len(rows),
    )  # fmt: skip


def check_got(peer, who, bodies):
    mine = [(n, rows, tail) for n, (w, rows, tail) in enumerate(bodies) if w == who]
    assert len(peer.got) == len(mine)
    got = sorted(peer.got, key=lambda one: one[0].block)  # longer ones go by themselves
    for (header, rows, tables), (number, want_rows, want_tail) in zip(got, mine, strict=True):
        assert (rows, tables) == (want_rows, want_tail)
        want = expected(number, who, want_rows, want_tail)
        assert replace(header, answer=0, credits=0) == want


def random_bodies(rng, num, peers):
    return [
        (rng.randrange(peers), *(rng.randbytes(rng.choice(n)) for n in ([16, 4096, 100_000], [0, 8, 40_000])))
        for _ in range(num)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_each_arrives_as_if_posted_by_itself(net, seed):
    rng = random.Random(seed)
    bodies = random_bodies(rng, 30, 3)  # more than a window: some go by themselves

    async def main():
        there = [RowsPeer() for _ in range(3)]
        fleet = Fleet(net, there)
        await fleet.open()
        _, landings = fleet.ask(bodies)
        for who, peer in enumerate(there):
            await peer.until(lambda w=who, p=peer: len(p.got) == sum(b[0] == w for b in bodies))
            check_got(peer, who, bodies)
        fleet.settle()
        landings.release()

    run(net, main)
    check_no_block_leaked(net)


def test_answers_land_where_each_is_wanted(net):
    async def main():
        pools = []
        there = [RowsPeer(answering(lambda w=w: pools[w])) for w in range(2)]
        fleet = Fleet(net, there)
        await fleet.open()
        pools += [listener.pool for listener in fleet.listeners]
        bodies = [(n % 2, bytes([n]) * 40_000, b"tail-of8") for n in range(8)]
        _, landings = fleet.ask(bodies, landed=True)
        await fleet.here.until(lambda: len(fleet.here.got) == 8)
        assert sorted(offset for _, offset in fleet.here.places) == [n * 40_000 for n in range(8)]
        assert {block for block, _ in fleet.here.places} == {landings}
        landed = landings.tensor[: 8 * 40_000].view(8, 40_000).cpu()
        assert landed.eq(255 - torch.arange(8, dtype=torch.uint8)[:, None]).all()
        assert {header.block for header, _, _ in fleet.here.got} == set(range(900, 908))
        fleet.settle()
        landings.release()

    run(net, main)
    check_no_block_leaked(net)


async def processes(stack, net, *kinds):
    """Peers in processes of their own, and where they listen."""
    addresses = [net.address() for _ in kinds]
    children = [child(a, kind, net.device) for a, kind in zip(addresses, kinds, strict=True)]
    return await asyncio.gather(*map(stack.enter_async_context, children)), addresses


def answers_of(fleet, bodies):
    """Of those that are in: (number, whether it is where it was wanted, whether it is right)."""
    places = [sum(len(rows) for _, rows, _ in bodies[:n]) for n in range(len(bodies))]
    for (header, rows, _), (_, offset) in zip(fleet.here.got, fleet.here.places, strict=True):
        number = header.block - 900
        inverse = bytes(b ^ 0xFF for b in bodies[number][1])
        yield number, offset == places[number], rows == inverse


@pytest.mark.parametrize("kind", [RowsPeer, LandedPeer])
def test_processes_on_the_device_read_the_block_and_write_where_they_are_asked_to(shared, kind):
    net, bodies = shared, random_bodies(random.Random(5), 20, 2)

    async def main():
        async with AsyncExitStack() as stack:
            _, addresses = await processes(stack, net, "invert", "invert")
            fleet = Fleet(net, [], kind)
            await fleet.dial(addresses)
            assert all(link._is_met for link in fleet.links)
            _, landings = fleet.ask(bodies, landed=True)
            await fleet.here.until(lambda: len(fleet.here.got) == len(bodies))
            assert sorted(answers_of(fleet, bodies)) == [
                (n, True, True) for n in range(len(bodies))
            ]
            assert all(place is landings for place, _ in fleet.here.places)
            if kind is LandedPeer and DEVICE != "cpu":  # whose memory a process does not reach
                assert fleet.here.num_landed == len(bodies)
            fleet.settle()
            landings.release()
            for link in fleet.links:
                link.close("enough")

    run(net, main)
    check_no_block_leaked(net)


@pytest.mark.parametrize("kind", [RowsPeer, LandedPeer])
def test_a_killed_process_takes_nobody_along_and_its_memory_comes_back(shared, kind):
    net = shared
    bodies = [(n % 2, bytes([n]) * 40_000, b"tail-of8") for n in range(8)]

    async def main():
        async with AsyncExitStack() as stack:
            (doomed, _), addresses = await processes(stack, net, "hold", "invert")
            fleet = Fleet(net, [], kind)
            await fleet.dial(addresses)
            _, landings = fleet.ask(bodies, landed=True)
            await fleet.here.until(lambda: len(fleet.here.got) == 4)
            await kill(doomed, fleet.here)
            assert sorted(answers_of(fleet, bodies)) == [(n, True, True) for n in (1, 3, 5, 7)]
            fleet.settle()
            landings.release()
            await poll_until(lambda: fleet.dialler.pool.rows_outstanding == 0)

    run(net, main)


def test_all_wait_for_the_block_and_other_messages_for_them(tmp_path):
    net = DeviceUcxNet(tmp_path)

    async def main():
        fleet, seam = await unwritten(net, 2)
        there = fleet.there
        bodies = [(0, b"0" * 160, b""), (1, b"1" * 160, b"abcdefgh"), (0, b"2" * 160, b"")]
        block, landings = fleet.ask(bodies, fence=seam.fence())
        fleet.links[0].post(Header(Kind.DISPATCH, block=5))
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert not there[0].got
        assert not there[1].got
        block.tensor[:160] = ord("w")
        ManualEvent.passed = True
        await there[0].until(lambda: len(there[0].got) == 3)
        await there[1].until(lambda: len(there[1].got) == 1)
        assert [rows for _, rows, _ in there[0].got] == [b"w" * 160, b"2" * 160, b""]
        assert there[1].got[0][1:] == (b"1" * 160, b"abcdefgh")
        fleet.settle()
        landings.release()

    run(net, main)
    check_no_block_leaked(net)


def test_a_link_that_closes_before_the_block_is_written_takes_nothing_along(tmp_path):
    net = DeviceUcxNet(tmp_path)

    async def main():
        fleet, seam = await unwritten(net, 2)
        there = fleet.there
        bodies = [(w, bytes([w]) * 1600, b"12345678") for w in (0, 1, 0, 1)]
        _, landings = fleet.ask(bodies, fence=seam.fence(), landed=True)
        fleet.links[0].close("enough")
        fleet.outboxes[0].closed(fleet.links[0])
        await fleet.here.until(lambda: bool(fleet.here.closed))
        ManualEvent.passed = True
        await there[1].until(lambda: len(there[1].got) == 2)
        assert [(h.block, rows) for h, rows, _ in there[1].got] == [
            (901, b"\1" * 1600), (903, b"\1" * 1600),
        ]  # fmt: skip
        # the other target is back: its messages go again, by themselves, with the next attempt
        again = RowsPeer()
        address = await fleet.listeners[0].listen(net.address(), ROUTER, again)
        fleet.outboxes[0].opened(
            await fleet.dialler.connect(address, hello(), fleet.here, timeout_s=5)
        )
        await again.until(lambda: len(again.got) == 2)
        assert [(h.block, h.attempt, rows, tail) for h, rows, tail in again.got] == [
            (n, REQUEST.attempt + 1, b"\0" * 1600, b"12345678") for n in (900, 902)
        ]
        fleet.settle()
        landings.release()

    run(net, main)
    check_no_block_leaked(net)


def test_when_every_link_has_closed_nothing_is_asked_of_the_port(tmp_path, caplog):
    net = DeviceUcxNet(tmp_path)

    async def main():
        fleet, seam = await unwritten(net, 2)
        bodies = [(w, bytes([w]) * 1600, b"12345678") for w in (0, 1)]
        _, landings = fleet.ask(bodies, fence=seam.fence(), landed=True)
        for link in fleet.links:
            link.close("enough")
            link._port = None
        await fleet.here.until(lambda: len(fleet.here.closed) == 2)
        fleet.settle()
        assert fleet.dialler.pool.rows_outstanding == 2, "the volley and the test"
        ManualEvent.passed = True
        await poll_until(lambda: fleet.dialler.pool.rows_outstanding == 1)
        assert "raised" not in caplog.text
        landings.release()

    run(net, main)
    check_no_block_leaked(net)


def test_what_is_settled_while_the_block_is_written_keeps_its_rows_till_they_are_sent(tmp_path):
    net = DeviceUcxNet(tmp_path)

    async def main():
        fleet, seam = await unwritten(net, 1)
        (peer,) = fleet.there
        block, landings = fleet.ask([(0, b"x" * 1600, b"")], fence=seam.fence())
        fleet.settle()
        assert fleet.dialler.pool.take(1600) is not block, "its message is still to be sent"
        ManualEvent.passed = True
        await peer.until(lambda: len(peer.got) == 1)
        assert peer.got[0][1] == b"x" * 1600
        landings.release()

    run(net, main, leak_free=False)


def test_more_than_the_slots_of_a_neighbour_go_by_ucx(tmp_path):
    net = DeviceUcxNet(tmp_path)

    async def main():
        peer = RowsPeer()
        fleet = Fleet(net, [peer])
        await fleet.open(LinkLimits(window=600))
        bodies = [(0, n.to_bytes(4, "little") * 40, b"12345678") for n in range(500)]
        _, landings = fleet.ask(bodies)
        await peer.until(lambda: len(peer.got) == 500)
        check_got(peer, 0, bodies)
        fleet.settle()
        landings.release()

    run(net, main)
    check_no_block_leaked(net)


def test_eight_messages_leave_before_the_rest_is_posted_if_the_block_is_written(shared):
    written = [False]

    async def main():
        peer = RowsPeer()
        fleet = Fleet(shared, [peer])
        await fleet.open(LinkLimits(window=32))
        pool = fleet.dialler.pool
        block = pool.take(30 * 160)
        volley = Volley(
            REQUEST, Kind.EXPERT_IN, pool, block, Fence(passed=False, query=lambda: written[0])
        )

        def post(numbers):
            questions = [(900 + n, 0, 160, 1, 160 * n, 160, b"12345678", 0, 0) for n in numbers]
            volley.post(fleet.outboxes * len(questions), questions, 0)

        post(range(9))
        await asyncio.sleep(0.05)
        assert not peer.got, "the block is not written"
        written[0] = True
        post(range(9, 18))
        await peer.until(lambda: len(peer.got) == 18)
        assert not volley.fence.passed, "nobody polled"
        written[0] = False
        post(range(18, 20))
        volley.leave()
        await asyncio.sleep(0.05)
        assert len(peer.got) == 18, "the rest waits for the block"
        for call in volley.fence.calls:
            call()
        await peer.until(lambda: len(peer.got) == 20)
        assert [header.block for header, _, _ in peer.got] == list(range(900, 920))
        fleet.settle()

    run(shared, main)
    check_no_block_leaked(shared)


def test_a_link_that_closes_as_it_is_sent_to_keeps_no_landing(shared, monkeypatch):
    """The port says at once that a message was not sent."""

    async def main():
        fleet = Fleet(shared, [RowsPeer()])
        await fleet.open()
        (link,) = fleet.links

        class Failing:
            def __getattr__(self, name):
                return getattr(port, name)

            def send_together(self, *args):
                return [CANCELED] * len(args[-1])

        port, link._port = link._port, Failing()
        _, landings = fleet.ask([(0, b"x" * 160, b"12345678")] * 2, landed=True)
        assert link.state is LinkState.CLOSED
        await fleet.here.until(lambda: bool(fleet.here.closed))
        fleet.settle()
        landings.release()
        # a peer that reaches our memory might still be about to use it
        retired = {getattr(rows, "block", rows) for rows, _ in fleet.dialler._plane._retired}
        assert fleet.dialler.pool.rows_outstanding == len(retired)

    run(shared, main, leak_free=False)


def test_a_full_queue_refuses_a_message_and_the_others_go(net):
    async def main():
        peer = RowsPeer()
        fleet = Fleet(net, [peer])
        await fleet.open(LinkLimits(window=2, max_queued=1))
        bodies = [(0, bytes([n]) * 160, b"12345678") for n in range(4)]
        with pytest.raises(Overloaded, match="1 messages wait for"):
            fleet.ask(bodies)
        await peer.until(lambda: len(peer.got) == 3)
        assert [header.block for header, _, _ in peer.got] == [900, 901, 902]
        assert len(fleet.outboxes[0]) == 3, "the one that was refused is not kept"
        fleet.settle()

    run(net, main, leak_free=False)  # the landings' block is the test's
