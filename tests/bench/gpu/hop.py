"""One hop of a block, GPU to GPU, through the transport, in both ways in which rows travel.

    python -m tests.bench.gpu.hop [--bytes 3801088] [--out FILE]

Two processes, one card each (or one card for both). Both sides go on within their handlers, as services do.

A message offers rows where they lie. It has arrived when they are in memory of the receiver: those of a neighbour are
copied there. Latency is half a round trip of the same size both ways; the rate is that of messages one way with some in
flight, each with rows of its own: every half of these is answered by an empty one, as credits come back, behind one
fence for the half, as an expert worker waits for what it has read.

An answer's rows are written where the asker wants them, and a header follows (`landed_`, see `hop_landed`). Latency is
from just before the copy is launched until the asker knows, the median of 400 of which the first 50 are left out. The
rate is that of rows with some questions in flight, each with a place of its own, and the way of the questions counts.
Where rows do not land, as on a CPU, there are no such figures.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import uvloop

from common.errors import LinkClosed
from common.ids import ProcessId, Role
from common.transport.base import Hello, Link
from common.transport.buffers import Buffer
from common.transport.device import (
    DeviceBlock,
    DevicePool,
    DeviceRows,
    open_copy,
    open_seam,
)
from common.transport.environment import set_ucx_environment
from common.transport.link import LinkLimits
from common.transport.ucx import UcxTransport
from common.wire.header import Header, Kind, Landed, Wire
from tests.bench.gpu.cluster import DEVICE, NUM_CARDS, as_client_of_mps
from tests.bench.gpu.environment import gpu_facts
from tests.bench.gpu.hop_landed import FLIGHTS, LAND, Answering, Asking, landed_figures

SECRET = b"of a benchmark between two processes"
ECHO, COUNT = 1, 2  # layer of a header: what the other side does
ROUNDS, MESSAGES = 400, 400


class Side:
    """A handler: the far one answers, the near one counts."""

    def __init__(self, transport: UcxTransport) -> None:
        self.transport = transport
        self.link: Link | None = None
        self.opened = asyncio.Event()
        self.closed = asyncio.Event()
        self.taken: Callable[[], None] | None = None  # of the near side; the far one answers
        self.num_taken = 0  # and counts
        self.copied: list[tuple[Link, Header, Buffer, DeviceBlock]] = []  # behind no fence yet
        pool = transport.pool
        assert isinstance(pool, DevicePool)
        self.copy = open_copy(pool.device)
        self.answering = Answering(pool, transport.seam)  # of the far side
        self.asking: Asking | None = None  # of the near one

    def on_open(self, link: Link) -> None:
        self.link = link
        self.opened.set()

    def on_close(self, link: Link, error: LinkClosed) -> None:
        self.answering.close()
        self.closed.set()

    def on_control(self, link: Link, message: dict[str, Any]) -> None:
        pass

    def on_landed(self, link: Link, answer: Landed, landing: DeviceRows) -> None:
        assert self.asking is not None, "an answer to nothing"
        self.asking.on_answer(answer)

    def on_message(self, link: Link, header: Header, payload: Buffer | None) -> None:
        if header.layer == LAND:
            assert payload is not None, "a question or an answer without rows"
            if header.kind is Kind.EXPERT_IN:
                self.answering.add(link, header, payload)
            else:
                payload.release()
                assert self.asking is not None, "an answer to nothing"
                self.asking.on_answer(header)
            return
        if payload is None or payload.rows is None:
            self.take(link, header, None)
            if payload is not None:
                payload.release()
            return
        pool, rows = self.transport.pool, payload.rows
        assert isinstance(pool, DevicePool)
        if rows.block.owner is None:  # they came here
            here = rows.block.retain()
            payload.release()
            self.take(link, header, here)
            return
        here = pool.take(rows.nbytes)
        self.copy(here.address, rows.address, rows.nbytes)
        self.copied.append((link, header, payload, here))
        if len(self.copied) == header.num_pairs:  # answered together
            self.transport.seam.fence().then(partial(self.take_copied, self.copied))
            self.copied = []

    def take_copied(self, copied: list[tuple[Link, Header, Buffer, DeviceBlock]]) -> None:
        """They are here, and nobody reads them where they came from."""
        for link, header, payload, here in copied:
            payload.release()
            self.take(link, header, here)

    def take(self, link: Link, header: Header, rows: DeviceBlock | None) -> None:
        """A message is here."""
        if self.taken is not None:
            self.taken()
        elif header.layer == COUNT:
            self.num_taken += 1
            if self.num_taken % header.num_pairs == 0:
                link.post(message(COUNT))
        elif rows is not None:
            pool = self.transport.pool
            assert isinstance(pool, DevicePool)
            payload = pool.acquire_with(rows.rows(0, header.rows_nbytes))
            link.post(message(ECHO), payload)
            payload.release()
        if rows is not None:
            rows.release()


def message(layer: int, each: int = 1) -> Header:
    """`each`: every so many of those to be counted are answered."""
    return Header(Kind.EXPERT_IN, Wire.FP8, layer, 1, 7168, 1, 1, 1, each)


def hello(index: int) -> Hello:
    return Hello(ProcessId(Role.ROUTER, index), 0, os.getpid(), "m", 1, "fp8")


def transport() -> UcxTransport:
    set_ucx_environment(local=True, device=DEVICE)
    limits = LinkLimits(window=64, max_queued=64, max_payload_nbytes=256 << 20)
    return UcxTransport(
        SECRET, link_limits=limits, spin_us=1000, pool=DevicePool(DEVICE), seam=open_seam(DEVICE)
    )


async def far(address: str) -> None:
    t = transport()
    side = Side(t)
    await t.listen(address, hello(1), side)
    print("listening", flush=True)
    async with asyncio.timeout(120):
        await side.closed.wait()
    await t.close()


async def exchange(
    side: Side, link: Link, nbytes: int, layer: int, num: int, flight: int
) -> list[float]:
    """Post `num` messages, up to `flight` at a time: seconds at the start, and when answers came."""
    pool, each = side.transport.pool, max(1, flight // 2)
    buffers = deque(pool.acquire(nbytes, rows_nbytes=nbytes) for _ in range(flight))
    moments, left, done = [time.perf_counter()], num - flight, asyncio.Event()

    def post() -> None:
        buffers.rotate()
        link.post(message(layer, each), buffers[0])

    def taken() -> None:
        nonlocal left
        moments.append(time.perf_counter())
        for _ in range(min(each, left)):
            left -= 1
            post()
        if len(moments) > num // each:
            done.set()

    side.taken = taken
    for _ in range(flight):
        post()
    async with asyncio.timeout(60):
        await done.wait()
    for buffer in buffers:
        buffer.release()
    return moments


async def offered(side: Side, link: Link, nbytes: int) -> dict[str, float]:
    """Figures of messages whose rows the receiver copies."""
    moments = await exchange(side, link, nbytes, ECHO, ROUNDS, 1)
    times = [(later - earlier) / 2e-6 for earlier, later in pairwise(moments)]
    found = {"one_way_us": round(median(times[50:]), 1)}
    for flight in FLIGHTS:
        first, *_, last = await exchange(side, link, nbytes, COUNT, MESSAGES, flight)
        found[f"us_per_message_{flight}"] = round((last - first) / MESSAGES * 1e6, 1)
        found[f"gb_per_s_{flight}"] = round(nbytes * MESSAGES / (last - first) / 1e9, 1)
    return found


async def landed(side: Side, link: Link, nbytes: int) -> dict[str, float]:
    """Figures of answers whose rows the sender writes."""
    pool = side.transport.pool
    assert isinstance(pool, DevicePool)
    side.asking = Asking(link, pool, nbytes)
    found = await landed_figures(side.asking, nbytes, ROUNDS, MESSAGES)
    side.asking.close()
    return found


async def near(address: str, sizes: list[int]) -> list[dict[str, Any]]:
    t = transport()
    side = Side(t)
    await t.connect(address, hello(0), side, timeout_s=30)
    await side.opened.wait()
    link = side.link
    assert link is not None
    rows = []
    for nbytes in sizes:
        row: dict[str, Any] = {"bytes": nbytes}
        row |= await offered(side, link, nbytes)
        row |= await landed(side, link, nbytes)
        rows.append(row)
        print(json.dumps(row), flush=True)
    await t.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bytes", default="65536,950272,3801088,8388608")
    parser.add_argument("--far", metavar="ADDRESS", help="be the other process")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    as_client_of_mps()
    with torch.inference_mode(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if args.far:
            runner.run(far(args.far))
            return
        with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
            address = f"unix:{scratch}/hop.sock"
            card = str(min(1, max(0, NUM_CARDS - 1)))
            command = [sys.executable, "-m", "tests.bench.gpu.hop", "--far", address]
            other = subprocess.Popen(
                command, env=os.environ | {"CUDA_VISIBLE_DEVICES": card}, stdout=subprocess.PIPE
            )
            try:
                assert other.stdout is not None
                other.stdout.readline()
                rows = runner.run(near(address, [int(n) for n in args.bytes.split(",")]))
            finally:
                other.terminate()
                other.wait(10)
    if args.out:
        args.out.write_text(json.dumps(gpu_facts() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
