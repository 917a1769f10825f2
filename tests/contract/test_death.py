"""A peer that is killed with messages under way: seen at once, nothing hangs, nothing leaks, and it can come back."""

import asyncio
import os
import signal
import sys
import time
from contextlib import asynccontextmanager

import pytest

from common.errors import LinkClosed
from common.transport.device import DevicePool
from common.waiting import poll_until
from common.wire.header import Header, Kind
from tests.contract.harness import Peer, hello, run, send, send_apart


@asynccontextmanager
async def child(address, *kind):
    """A `tests.contract.child`, killed at the end if it still lives."""
    path = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.contract.child", address, *kind,
        stdout=asyncio.subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await process.wait()


async def kill(process, peer):
    """SIGKILL; returns how long the link took to close, in seconds."""
    start = time.monotonic()
    process.send_signal(signal.SIGKILL)
    await peer.until(lambda: bool(peer.closed))
    return time.monotonic() - start


@pytest.mark.parametrize("num_bytes", [100, 4 << 20])
def test_killed_with_our_sends_in_flight(ucx, num_bytes):
    async def main():
        transport, here = ucx.transport(), Peer()
        address = ucx.address()
        async with child(address, "hold") as process:
            link = await transport.connect(address, hello(), here, timeout_s=5)
            for block in range(20):
                send(transport, link, bytes(num_bytes), block=block)
            await asyncio.sleep(0.01)
            await kill(process, here)
            assert "router-0" in str(here.closed[0][1])
            with pytest.raises(LinkClosed, match="router-0"):
                link.post(Header(Kind.DISPATCH))
            with pytest.raises(LinkClosed, match="router-0"):
                link.send_control({})

    run(ucx, main)


@pytest.mark.parametrize("after_messages", [0, 1, 5])
def test_killed_while_it_sends_large_messages(ucx, after_messages):
    """Receives in mid-rendezvous end with the link; what arrived whole before it was delivered."""

    async def main():
        transport, here = ucx.transport(), Peer()
        address = ucx.address()
        async with child(address, "flood") as process:
            await transport.connect(address, hello(), here, timeout_s=5)
            await here.until(lambda: len(here.messages) >= after_messages)
            await kill(process, here)
        assert [header.block for header, _ in here.messages] == list(range(len(here.messages)))

    run(ucx, main)


def test_killed_dialler(ucx):
    async def main():
        transport, here = ucx.transport(), Peer(hold=True)
        address = await transport.listen(ucx.address(), hello(), here)
        async with child(address, "dial") as process:
            await here.until(lambda: len(here.messages) >= 3)
            await kill(process, here)
        here.let_go()

    run(ucx, main)


def test_it_comes_back_on_the_same_address(ucx):
    """Three generations at one address: a stale socket file is replaced, nothing of a dead one reaches the next."""

    async def main():
        transport = ucx.transport()
        address = ucx.address()
        for generation in range(3):
            here = Peer()
            async with child(address, "echo") as process:
                link = await transport.connect(address, hello(), here, timeout_s=5)
                for block in range(30):
                    send(transport, link, bytes(200_000), block=block, epoch=generation)
                    if block == 20:
                        await here.until(lambda here=here: len(here.messages) >= 10)
                        break
                await kill(process, here)
            assert {header.epoch for header, _ in here.messages} == {generation}

    run(ucx, main)


@pytest.mark.parametrize("kind", ["hold", "flood"])
def test_a_killed_neighbour_stalls_nobody(ucx, kind):
    """Again and again, with messages in shared memory and rows on their way both ways; a second one goes on."""

    async def main():
        pool = DevicePool("cpu")
        transport = ucx.transport(pool=pool)
        steady, address = Peer(), ucx.address()
        async with child(address, "echo", "cpu"):
            link = await transport.connect(address, hello(), steady, timeout_s=5)
            for generation in range(3):
                here, other = Peer(), ucx.address()
                async with child(other, kind, "cpu") as process:
                    doomed = await transport.connect(other, hello(), here, timeout_s=5)
                    assert doomed._is_met
                    for block in range(8):
                        send_apart(transport, doomed, 300_000, 1000, block=block)
                    if kind == "flood":
                        await here.until(lambda here=here: len(here.messages) >= 3)
                    await kill(process, here)
                send(transport, link, b"still here", block=generation)
                await steady.until(lambda n=generation: len(steady.messages) == n + 1)
            link.close("enough")
        # where a device's memory is in reach, what was offered waits until the process is gone
        await poll_until(lambda: not pool.rows_outstanding)

    run(ucx, main)
