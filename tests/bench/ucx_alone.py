"""The round trip of UCX between two sleeping processes, without anything of ours but the reactor that sleeps and wakes:
no header, no credits, no pooled buffers. What the transport can reach at best over UCX's tcp on loopback.
"""

import asyncio
import itertools
import multiprocessing
import time
from multiprocessing.connection import Connection
from statistics import median

import numpy as np
import uvloop

from common.transport.environment import set_ucx_environment
from common.transport.reactor import KIND_MESSAGE, KIND_SHIFT, Reactor

NBYTES = 192  # what a message of 64 bytes has on the wire with our header
WARM_UP = 200
TAG = KIND_MESSAGE << KIND_SHIFT


def ignore(status: int) -> None:
    del status


async def _bounce(pipe: Connection, trips: int, *, leads: bool) -> dict[str, float] | None:
    """Send one message to and fro; the leading side returns p50 and its CPU per round trip, both in microseconds."""
    done = asyncio.get_running_loop().create_future()
    arrivals: list[int] = []

    def arrived(tag: int, nbytes: int, message: object) -> None:
        reactor.port.receive(message, into, nbytes, ignore)
        arrivals.append(time.perf_counter_ns())
        if not leads or len(arrivals) < trips:
            reactor.port.send(to, out, NBYTES, TAG, ignore)
        if len(arrivals) == trips:
            done.set_result(None)

    def announced(tag: int, head: bytes, nbytes: int, data: int) -> None:
        raise AssertionError("rows, which nobody sends")

    reactor = Reactor(arrived, announced, lambda: False, lambda: False)
    memory = np.zeros((2, NBYTES), np.uint8)
    out, into = memory[0].ctypes.data, memory[1].ctypes.data
    pipe.send_bytes(reactor.address)
    endpoint, to = reactor.endpoint(pipe.recv_bytes(), lambda: None)
    pipe.send("ready")
    pipe.recv()
    cpu_started = time.process_time()
    if leads:
        reactor.port.send(to, out, NBYTES, TAG, ignore)
        reactor.kick()
    async with asyncio.timeout(60):
        await done
    cpu_us = (time.process_time() - cpu_started) / trips * 1e6
    if leads:
        pipe.recv()  # the other side is done
    else:
        pipe.send("done")
        await asyncio.sleep(0.2)  # the last message leaves
    reactor.close_endpoint(endpoint)
    reactor.close(timeout_s=0.1)
    gaps = [(b - a) / 1000 for a, b in itertools.pairwise(arrivals)]
    return {"p50_us": median(gaps[WARM_UP:]), "cpu_us": cpu_us} if leads else None


def _side(pipe: Connection, trips: int) -> None:
    set_ucx_environment(local=True)
    uvloop.run(_bounce(pipe, trips, leads=False))


def round_trip(trips: int = 5000) -> dict[str, float]:
    """Median and the leading side's CPU time of a round trip, microseconds."""
    set_ucx_environment(local=True)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_side, args=(theirs, trips), daemon=True)
    process.start()
    try:
        figures = uvloop.run(_bounce(ours, trips, leads=True))
        assert figures is not None, "the leading side measures"
        return figures
    finally:
        process.join(5)
        process.kill()
