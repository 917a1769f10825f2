"""What an expert's and an attention worker's Python costs per message of a neighbour: kernels and the wire left out.

    python -m tests.bench.neighbour_python [--rows 128] [--blocks 1500]

The real handlers on real links with credits, pools and seams; the port moves nothing, graphs launch nothing and the
device is always done. Microseconds, the median and the least of many. expert: a question about rows of a neighbour as
it comes in, to the launch; the answer, whose rows are where they are wanted. attention: a block to be sent; its post
when the device has written it; the answer. hop: a message of `tests.bench.gpu.hop` with eight in flight to whom it is
sent, whose copy is left out, and its part of an answer to four. (`tests.bench.router_python` is the same of a router.)
"""

import argparse
import asyncio
import ctypes
import json
import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from common.ids import ProcessId, Role
from common.transport.base import Hello
from common.transport.device import DeviceBlock, DevicePool, DeviceRows, NeighbourBlock
from common.transport.link import LinkLimits, LinkState
from common.transport.neighbour import Neighbour
from common.transport.port import RowsPort
from common.transport.reactor import KIND_SHIFT, Endpoint
from common.transport.seam import Seam
from common.transport.ucx import UcxTransport
from common.transport.ucx_arrivals import KIND_WITH_ROWS
from common.transport.ucx_messages import UcxMessages
from common.wire.blocks import RowType, answer_layout, expert_pick_layout, row_segment
from common.wire.header import HEADER_NBYTES, Header, Kind, Landed, Wire
from services.attention.moe_client import MoeClient
from services.expert.batcher import Batcher
from services.expert.device_bank import DeviceBank
from services.expert.device_experts import DeviceExpert, GraphedExperts
from services.expert.worker import ExpertWorker
from tests.bench.gpu.hop import COUNT, Side, message

WIDTH, LAYER, EXPERT = 7168, 3, 5
HALF = 4  # of the messages that a hop has in flight
Times = dict[str, list[float]]


class Done:
    """An event that the device has reached."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return True


class StillPort:
    """Keeps what is sent; a neighbour's rows and landing are always at the same place."""

    max_head, num_open = 1 << 16, 0

    def __init__(self, rows: int) -> None:
        self.rows = torch.zeros(row_segment(rows, WIDTH, RowType.FP8).end, dtype=torch.uint8)
        self.landing = torch.zeros(2 * rows * WIDTH, dtype=torch.uint8)
        self.sent: list[tuple[bytes, Callable[[int], object]]] = []

    def reach_rows(self, data: int) -> tuple[int, int, int]:
        return self.rows.data_ptr(), self.landing.data_ptr(), self.landing.nbytes

    def return_rows(self, data: int) -> None: ...

    def share(self, address: int, nbytes: int, on_device: bool) -> object:
        return self

    def send(self, to: object, address: int, nbytes: int, tag: int, ended: Any) -> int:
        self.sent.append((ctypes.string_at(address, nbytes), ended))
        return 0

    def send_rows(self, to: object, tag: int, head: int, head_nbytes: int, *rest: Any) -> int:
        self.sent.append((ctypes.string_at(head, head_nbytes), rest[-1]))
        return 1

    def taken(self) -> tuple[bytes, Callable[[int], object]]:
        """The one message that was sent."""
        (message,) = self.sent
        self.sent.clear()
        return message


class StillNeighbour(Neighbour):
    """Its rows count as a device's, which experts pick from."""

    def __init__(self, port: StillPort, device: torch.device) -> None:
        self._port, self._device = cast(RowsPort, port), device
        self._known = {}

    def _block(self, link: object, address: int, nbytes: int) -> NeighbourBlock:
        block = super()._block(link, address, nbytes)
        block.on_host = False
        return block


class StillLink(UcxMessages):
    """An open link to a neighbour."""

    def __init__(
        self, port: StillPort, pool: DevicePool, seam: Seam, peer: Role, handler: Any
    ) -> None:
        reactor = SimpleNamespace(kick=lambda: None)
        plane: Any = SimpleNamespace(
            pool=pool, limits=LinkLimits(), seam=seam, port=port, reactor=reactor
        )
        hellos = [Hello(ProcessId(role, 0), 0, 1, "m", 1, "fp8") for role in (Role.EXPERT, peer)]
        super().__init__(plane, *hellos, handler, 1)
        self._neighbour = StillNeighbour(port, pool.device)
        self._endpoint = cast(Endpoint, object())
        self._is_met = self._reaches_here = True
        self.state = LinkState.OPEN
        self._set_windows(1 << 16)

    def _defer(self, call: object) -> None: ...

    def _detach(self, error: object) -> None: ...

    def _send_control(self, frame: object) -> None: ...


def still() -> tuple[DevicePool, Seam]:
    """Of a process whose device is always done."""
    pool = DevicePool("cpu")
    pool.polled = True
    return pool, Seam(Done)


class StillGraphs(GraphedExperts):
    """Compute nothing, and are done."""

    def _compute(self, expert: DeviceExpert, bucket: int) -> None:
        self._staged._told.add_(1)


class StillExpert(ExpertWorker):
    """An expert worker without a cluster, and its one expert."""

    def __init__(self, transport: Any) -> None:
        self.spec: Any = SimpleNamespace(id=ProcessId(Role.EXPERT, 0))
        self.transport, self.trace = transport, None
        counted = ("calls", "rows", "batches", "queue_us", "compute_us", "failed")
        self.counters = dict.fromkeys(counted, 0)
        self.batcher = Batcher(GraphedExperts.BUCKETS[-1])
        self._scheduled, self._in_flight, self._ended_ns = False, 0, 0
        bank = self.bank = DeviceBank(WIDTH, "m", {}, {}, {(LAYER, EXPERT): 0})
        nothing, one = torch.zeros(16, 16), torch.ones(1, 1)
        bank.experts[LAYER, EXPERT] = DeviceExpert(nothing, nothing, one, one)
        bank.graphed = StillGraphs(WIDTH, torch.device("cpu"))


def question(rows: int, number: int) -> tuple[bytes, int]:
    """An EXPERT_PICK of all rows of a block, and the bytes of that."""
    segment = row_segment(rows, WIDTH, RowType.FP8)
    layout = expert_pick_layout(segment.end, rows, 1)
    header = Header(
        Kind.EXPERT_PICK, Wire.FP8, LAYER, 1, WIDTH, number, number, rows, 1, payload_nbytes=layout.nbytes,
        rows_nbytes=segment.end, answer=number,
    )  # fmt: skip
    message = bytearray(HEADER_NBYTES + layout.nbytes - segment.end)
    header.pack_into(message)
    for at, numbers in ((layout.segments, [EXPERT, rows]), (layout.picks, [rows, *range(rows)])):
        start, packed = HEADER_NBYTES + at - segment.end, np.array(numbers, np.int32).tobytes()
        message[start : start + len(packed)] = packed
    return bytes(message), segment.end


def expert(rows: int, blocks: int) -> Times:
    """Questions to an expert."""
    port, (pool, seam) = StillPort(rows), still()
    worker = StillExpert(SimpleNamespace(pool=pool, seam=seam))
    link = StillLink(port, pool, seam, Role.ROUTER, worker)
    times: Times = defaultdict(list)
    for number in range(blocks):
        message, nbytes = question(rows, number + 1)
        tag = KIND_WITH_ROWS << KIND_SHIFT | number
        started = time.perf_counter()
        link.announced(tag, message, nbytes, 1)
        launched = time.perf_counter()
        assert seam.poll()
        times["expert: question"].append(launched - started)
        times["expert: answer"].append(time.perf_counter() - launched)
        assert Header.unpack_from(port.taken()[0], max_payload_nbytes=1 << 30).landed == 1
    assert worker.counters["calls"] == blocks
    return times


class StillAttention:
    """Gives a link to the client, as an attention worker does, and keeps the last answer."""

    moe: MoeClient
    held: DeviceRows | None = None

    def on_landed(self, *answer: Any) -> None:
        self.moe.on_landed(*answer)

    def keep(self, rows: DeviceRows) -> None:
        if self.held is not None:
            self.held.release()
        self.held = rows.retain()


def combined(asked: bytes) -> Landed:
    """The answer to a DISPATCH, whose rows have landed."""
    request = Header.unpack_from(asked, max_payload_nbytes=1 << 30)
    nbytes = answer_layout(request.num_rows, WIDTH, RowType.BF16).nbytes
    return Landed(Kind.COMBINED, request.layer, request.block, nbytes, 0, 0, 0, request.answer)


async def attention(rows: int, blocks: int) -> Times:
    """Blocks of an attention worker."""
    port, worker, (pool, seam) = StillPort(rows), StillAttention(), still()
    link = StillLink(port, pool, seam, Role.ROUTER, worker)
    moe = worker.moe = MoeClient(0, WIDTH, Wire.FP8, 1, pool, 30.0, RowType.BF16, seam)
    moe.routers[0].opened(link)
    block = DeviceBlock(port.rows, lambda _: None)
    ids, weights = torch.arange(8, dtype=torch.int32).repeat(rows, 1), torch.full((rows, 8), 0.125)
    out, times = torch.empty(rows, WIDTH, dtype=torch.bfloat16), defaultdict(list)
    for _ in range(blocks):
        begun = time.perf_counter()
        answer = moe.dispatch(
            LAYER, 0, block.rows(0, block.capacity), ids, weights, out=out, written=lambda: True,
            keep=worker.keep,
        )  # fmt: skip
        waiting = time.perf_counter()
        assert seam.poll()
        posted = time.perf_counter()
        message, ended = port.taken()
        ended(0)
        answered = combined(message)
        came = time.perf_counter()
        link.deliver_landed(answered)
        times["attention: answer"].append(time.perf_counter() - came)
        times["attention: dispatch"].append(waiting - begun)
        times["attention: post"].append(posted - waiting)
        await answer
    assert moe.times.blocks == blocks
    return times


class HopPort(StillPort):
    """Messages that are in flight together have rows of their own, and want none of an answer."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.all = torch.zeros(HALF, self.rows.nbytes, dtype=torch.uint8)
        self.places = [(row.data_ptr(), 0, 0) for row in self.all]

    def reach_rows(self, data: int) -> tuple[int, int, int]:
        return self.places[data >> 1]


def hop(rows: int, blocks: int) -> Times:
    """Messages to the far side, four at a time."""
    port, (pool, seam) = HopPort(rows), still()
    side = Side(cast(UcxTransport, SimpleNamespace(pool=pool, seam=seam)))
    side.copy = lambda *_: None
    link = StillLink(port, pool, seam, Role.ROUTER, side)
    header, packed = message(COUNT, HALF), bytearray(HEADER_NBYTES)
    header.rows_nbytes = header.payload_nbytes = port.rows.nbytes
    header.pack_into(packed)
    times: Times = defaultdict(list)
    for number in range(0, blocks, HALF):
        started = time.perf_counter()
        for i in range(HALF):
            tag = KIND_WITH_ROWS << KIND_SHIFT | number + i
            link.announced(tag, bytes(packed), header.rows_nbytes, i << 1 | 1)
        seam.poll()
        times["hop: message"].append((time.perf_counter() - started) / HALF)
        port.taken()
    assert side.num_taken == blocks
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=1500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        times = expert(args.rows, args.blocks) | asyncio.run(attention(args.rows, args.blocks))
        times |= hop(args.rows, args.blocks - args.blocks % HALF)
    for name, seconds in times.items():
        figures = {"median_us": median(seconds), "least_us": min(seconds)}
        print(json.dumps({"step": name} | {k: round(v * 1e6, 1) for k, v in figures.items()}))


if __name__ == "__main__":
    main()
