"""Data messages: order, at most once, sizes, credits, overload, re-sends of one payload."""

import asyncio
import random

import pytest

from common.errors import LinkClosed, Overloaded, WireError
from common.transport.environment import set_ucx_environment
from common.transport.link import LinkLimits
from common.wire.header import Header, Kind
from tests.contract.harness import LIMITS, ROUTER, Peer, hello, pair, run, send

SIZES = [0, 1, 127, 128, 129, 1023, 4096, 8064, 8192, 65536, 100_003, 1 << 20, 8 << 20]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_echo_of_every_size(net, loop):
    async def main():
        here, there = Peer(), Peer(echo=True)
        link, _, dialler, _ = await pair(net, here, there)
        for num, nbytes in enumerate(SIZES):
            body = random.Random(num).randbytes(nbytes)
            send(dialler, link, body, layer=num, num_rows=nbytes, trace=2**64 - 1)
            await here.until(lambda num=num: len(here.messages) > num)
            header, answer = here.messages[num]
            assert answer == body
            assert (header.layer, header.num_rows, header.trace) == (num, nbytes, 2**64 - 1)
            assert header.payload_nbytes == nbytes

    run(net, main, loop=loop)


def test_order_and_at_most_once_across_sizes(net):
    """Large messages complete late (rendezvous); what was posted behind them must not overtake."""

    async def main():
        here, there = Peer(), Peer()
        link, _, dialler, _ = await pair(net, here, there, LinkLimits(max_queued=1000))
        chance = random.Random(1)
        for block in range(300):
            send(dialler, link, bytes(chance.choice([0, 10, 5000, 20_000, 300_000])), block=block)
        await there.until(lambda: len(there.messages) == 300)
        assert [header.block for header, _ in there.messages] == list(range(300))
        await asyncio.sleep(0.02)
        assert len(there.messages) == 300

    run(net, main)


def test_an_empty_buffer_arrives_as_none(net):
    async def main():
        here, there = Peer(), Peer(hold=True)
        link, _, dialler, _ = await pair(net, here, there)
        empty = dialler.pool.acquire(0)
        link.post(Header(Kind.EXPERT_IN, num_rows=0), empty)
        empty.release()
        await there.until(lambda: bool(there.messages))
        assert there.held == []

    run(net, main)


def test_both_directions_at_once(net):
    async def main():
        here, there = Peer(), Peer()
        limits = LinkLimits(window=4, max_queued=1000)
        link, back, dialler, listener = await pair(net, here, there, limits)
        for block in range(200):
            send(dialler, link, bytes(2000), block=block)
            send(listener, back, bytes(50_000), block=block)
        await here.until(lambda: len(here.messages) == 200)
        await there.until(lambda: len(there.messages) == 200)
        for peer in (here, there):
            assert [header.block for header, _ in peer.messages] == list(range(200))

    run(net, main)


def test_many_links(net):
    async def main():
        hub = Peer(echo=True)
        listener = net.transport()
        address = await listener.listen(net.address(), ROUTER, hub)
        spokes = []
        for index in range(12):
            transport, peer = net.transport(), Peer()
            link = await transport.connect(address, hello(index=index), peer, timeout_s=5)
            spokes.append((transport, peer, link))
        for turn in range(5):
            for index, (transport, _, link) in enumerate(spokes):
                send(transport, link, bytes([index]) * 3000, block=turn)
        for index, (_, peer, _) in enumerate(spokes):
            await peer.until(lambda peer=peer: len(peer.messages) == 5)
            assert [header.block for header, _ in peer.messages] == list(range(5))
            assert {body for _, body in peer.messages} == {bytes([index]) * 3000}

    run(net, main)


def test_credits_run_out_and_come_back(net):
    async def main():
        here, there = Peer(), Peer(hold=True)
        link, _, dialler, _ = await pair(net, here, there)
        for block in range(LIMITS.window + 5):
            send(dialler, link, b"x", block=block)
        await there.until(lambda: len(there.messages) == LIMITS.window)
        await asyncio.sleep(0.02)
        assert len(there.messages) == LIMITS.window, "more than the window without a credit"
        assert "credits 0/8 | queued 5" in repr(link)
        there.let_go()
        await there.until(lambda: len(there.messages) == LIMITS.window + 5)
        assert [header.block for header, _ in there.messages] == list(range(LIMITS.window + 5))
        there.let_go()

    run(net, main)


def test_a_full_queue_is_overload_and_recovers(net):
    async def main():
        here, there = Peer(), Peer(hold=True)
        link, _, dialler, _ = await pair(net, here, there)
        room = LIMITS.window + LIMITS.max_queued
        for block in range(room):
            send(dialler, link, b"x", block=block)
        with pytest.raises(Overloaded, match=r"16 messages wait for router-0, the limit is 16"):
            send(dialler, link, b"x", block=room)
        there.hold = False
        there.let_go()
        await there.until(lambda: len(there.messages) == room)
        send(dialler, link, b"x", block=room)
        await there.until(lambda: len(there.messages) == room + 1)

    run(net, main)


def test_one_payload_on_several_links_and_twice_on_one(net):
    """The payload's headroom is shared: no send may see another's header."""

    async def main():
        listener, dialler = net.transport(), net.transport()
        theres = [Peer(), Peer(), Peer()]
        links = []
        for index, there in enumerate(theres):
            address = await listener.listen(net.address(), hello(index=index), there)
            links.append(await dialler.connect(address, ROUTER, Peer(), timeout_s=5))
        for nbytes in (100, 30_000, 2 << 20):
            body = random.Random(nbytes).randbytes(nbytes)
            payload = dialler.pool.acquire(nbytes)
            payload.view[128 : 128 + nbytes] = body
            for target, link in enumerate(links):
                link.post(Header(Kind.EXPERT_IN, target=target, attempt=0), payload)
                link.post(Header(Kind.EXPERT_IN, target=target, attempt=1), payload)
            payload.release()
            for target, there in enumerate(theres):
                await there.until(lambda there=there: len(there.messages) == 2)
                assert [(h.target, h.attempt) for h, _ in there.messages] == [
                    (target, 0), (target, 1)
                ]  # fmt: skip
                assert [got for _, got in there.messages] == [body, body]
                there.messages.clear()

    run(net, main)


def test_a_received_buffer_can_be_posted_on(net):
    """A router forwards what it received; the credit goes back only when the forwarded bytes are out."""

    async def main():
        a, hub_transport = net.transport(), net.transport()
        here, hub = Peer(), Peer(echo=True)
        address = await hub_transport.listen(net.address(), ROUTER, hub)
        link = await a.connect(address, hello(), here, timeout_s=5)
        for block in range(100):
            send(a, link, bytes(20_000), block=block)
            await here.until(lambda block=block: len(here.messages) == block + 1)

    run(net, main)


def test_a_field_out_of_range_sends_nothing_and_costs_no_credit(net):
    async def main():
        here, there = Peer(), Peer()
        link, _, dialler, _ = await pair(net, here, there)
        for _ in range(50):
            with pytest.raises(WireError, match="out of range"):
                send(dialler, link, b"x", layer=1 << 20)
        send(dialler, link, b"y")
        await there.until(lambda: bool(there.messages))
        assert there.messages[0][1] == b"y"

    run(net, main)


def test_a_control_only_link_refuses_data(net):
    async def main():
        listener, dialler = net.transport(), net.transport()
        there, here = Peer(), Peer()
        address = await listener.listen(net.address(), ROUTER, there)
        link = await dialler.connect(address, hello(data=False), here, timeout_s=5)
        with pytest.raises(LinkClosed, match="control frames only"):
            link.post(Header(Kind.DISPATCH))
        link.send_control({"health": 1})
        await there.until(lambda: bool(there.controls))
        assert there.controls == [{"health": 1}]

    run(net, main)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_bounded_spinning(ucx, loop):
    """A process with its own core polls for a while after each event; the loop still runs everything else."""

    async def main():
        listener, dialler = ucx.transport(spin_us=300), ucx.transport(spin_us=300)
        here, there = Peer(), Peer(echo=True)
        address = await listener.listen(ucx.address(), ROUTER, there)
        link = await dialler.connect(address, hello(), here, timeout_s=5)
        for num in range(20):
            send(dialler, link, bytes(1000))
            await here.until(lambda num=num: len(here.messages) > num)
            await asyncio.sleep(0.001)

    run(ucx, main, loop=loop)


def test_a_send_that_fails_closes_the_link_and_raises_nowhere(ucx):
    """`post` is not the only sender: returning a credit is one too, from within the application's `release`."""

    async def main():
        here, there = Peer(), Peer(hold=True)
        link, back, dialler, _ = await pair(ucx, here, there)
        for block in range(LIMITS.window):
            send(dialler, link, b"x", block=block)
        await there.until(lambda: len(there.held) == LIMITS.window)

        class Broken:
            def send(self, *_):
                return -25  # UCS_ERR_CONNECTION_RESET

        back._port = Broken()
        there.let_go()
        await there.until(lambda: bool(there.closed))
        assert "expert-0 is gone: send failed (-25)" in str(there.closed[0][1])

    run(ucx, main)


def test_the_environment_respects_what_is_set():
    environ = {"UCX_TLS": "rc,cuda_copy", "HOME": "/"}
    force = set_ucx_environment(local=True, environ=environ)
    assert environ["UCX_TLS"] == force["UCX_TLS"] == "rc,cuda_copy"
    assert force["UCX_MM_ERROR_HANDLING"] == "y"
    assert "HOME" not in force
    assert set_ucx_environment(local=False, environ={})["UCX_TLS"] == "^sm"
    assert "cuda_ipc" in set_ucx_environment(local=True, device="cuda", environ={})["UCX_TLS"]
