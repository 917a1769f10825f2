"""What a router's Python costs per block: kernels, copies and the wire left out.

    python -m tests.bench.router_python [--rows 128] [--experts 8] [--nodes 1] [--profile]

One block of rows in device form, each to 8 experts, an expert per worker, the workers spread over the nodes (`--experts
256 --nodes 32`: the source's router of EP256), through the real dataflow, links, credits and pools of one process; a
link hands its messages to nobody, answers are put in by hand. Microseconds, the median of many, by step: the block as
it comes in, the answers to all it sent but the last, and the last, which sums.
"""

import argparse
import cProfile
import json
import pstats
import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import cast

import numpy as np
import torch

from common.ids import ProcessId, Role
from common.placement.plan import Plan
from common.transport.base import Hello, Ticket
from common.transport.buffers import Buffer
from common.transport.device import DevicePool, DeviceRows, NeighbourBlock
from common.transport.link import BaseLink, LinkLimits
from common.transport.outbox import Outbox
from common.transport.volley import Question, Volley
from common.wire.blocks import RowType, dispatch_layout, row_segment
from common.wire.header import Header, Kind, Landed, Wire
from kernels import ops
from services.router.dataflow import Dataflow

WIDTH, LAYER = 7168, 3


class SilentLink(BaseLink):
    """Takes messages and sends none."""

    def __init__(
        self, role: Role, index: int, handler: Dataflow, pool: DevicePool, node: int = 0
    ) -> None:
        mine = Hello(ProcessId(Role.ROUTER, 0), 0, 1, "m", 1, "fp8")
        peer = Hello(ProcessId(role, index), node, 1, "m", 1, "fp8")
        super().__init__(mine, peer, handler, pool, LinkLimits(window=1 << 16))
        self.posted: list[Header] = []
        self._rows: NeighbourBlock | None = None
        self.sent: list[Ticket] = []  # of volleys
        self._opened(peer)

    def take(self, volley: Volley, question: Question) -> Ticket:
        self._credits.available -= 1
        answer = self._answer_number() if question[-1] else 0
        volley.block.retain()
        return self, (volley, question), answer

    def send_together(self, volley: Volley, tickets: Sequence[Ticket]) -> list[Ticket]:
        """Part of the wire."""
        for ticket in tickets:
            volley.block.release()
            cast(SilentLink, ticket[0]).sent.append(ticket)
        return []

    def requests(self) -> list[Header]:
        """What was posted, or taken as part of a volley."""
        found, self.posted = self.posted, []
        for _, (volley, question), answer in self.sent:
            number, target, num_rows, num_pairs, _, nbytes, tail, _, _ = question
            header = volley.request.derive(
                volley.kind, target=target, num_rows=num_rows, num_pairs=num_pairs,
                payload_nbytes=nbytes + len(tail),
            )  # fmt: skip
            header.block, header.answer = number, answer
            found.append(header)
        self.sent = []
        return found

    def _transmit(self, buffer: Buffer, landing: object) -> None:
        header = Header.unpack_from(buffer.view, max_payload_nbytes=1 << 30)
        self.posted.append(header)
        buffer.headroom_busy = False
        buffer.release()

    def _defer(self, call: object) -> None: ...

    def _detach(self, error: object) -> None: ...

    def _send_control(self, frame: dict[str, object]) -> None: ...

    def arrive(self, buffer: Buffer) -> None:
        """A message has arrived."""
        header = self._read_header(buffer)
        assert header is not None
        self._deliver(header, buffer)

    def _place(self, buffer: Buffer, number: int, nbytes: int) -> None:
        """Rows of a neighbour are read where they are."""
        del number
        if self._rows is None or not self._rows.take_again():
            memory = torch.empty(nbytes, dtype=torch.uint8)
            self._rows = NeighbourBlock(self, memory, lambda _: None)
            self._rows.offer = 1
        buffer.rows = DeviceRows(self._rows, 0, nbytes)

    def take_landed(self, answer: Landed) -> None:
        """An answer has arrived, and the port has counted it."""
        self._credits.arrived()
        self._credits.owed += 1
        self.deliver_landed(answer)


class Handler:
    """Gives a link to the dataflow."""

    def __init__(self) -> None:
        self.flow: Dataflow

    def on_open(self, link: object) -> None: ...

    def on_message(self, link: SilentLink, header: Header, payload: Buffer | None) -> None:
        self.flow.on_message(link, header, payload)

    def on_landed(self, link: SilentLink, answer: Landed, landing: DeviceRows) -> None:
        self.flow.on_landed(link, answer, landing)


def block(pool: DevicePool, rows: int, experts: int, number: int) -> Buffer:
    """A DISPATCH as it comes in."""
    layout = dispatch_layout(rows, WIDTH, 8, Wire.FP8)
    buffer = pool.acquire(layout.nbytes - layout.rows.end)
    ids = np.stack([np.sort(np.random.permutation(experts)[:8]) for _ in range(rows)]).astype(
        np.int32
    )
    tables = buffer.array
    tables[layout.experts - layout.rows.end :][: ids.nbytes] = ids.reshape(-1).view(np.uint8)
    weights = np.full(ids.shape, 0.125, np.float32)
    tables[layout.weights - layout.rows.end :][: ids.nbytes] = weights.reshape(-1).view(np.uint8)
    header = Header(Kind.DISPATCH, Wire.FP8, LAYER, 1, WIDTH, number, number, rows, rows * 8,
                    payload_nbytes=layout.nbytes, rows_nbytes=layout.rows.end)  # fmt: skip
    header.pack_into(buffer.view)
    return buffer


def answer(request: Header) -> Landed:
    """An EXPERT_OUT or PARTIAL as it comes in: its rows are where they were wanted."""
    kind = Kind.PARTIAL if request.kind is Kind.RELAY else Kind.EXPERT_OUT
    nbytes = row_segment(request.num_rows, WIDTH, RowType.BF16).end
    return Landed(kind, request.layer, request.block, nbytes, 0, 0, 0, request.answer)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=400)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # kernels are left out
    ops.gather_pieces = ops.combine = ops.sum_partials = lambda *_, **__: None
    ops.combining = lambda *_: ops.combine
    pool = DevicePool("cpu")
    homes = tuple(w * args.nodes // args.experts for w in range(args.experts))
    plan = Plan(1, {LAYER: tuple((w,) for w in range(args.experts))}, homes)
    handler = Handler()
    experts = {w: Outbox(f"expert-{w}") for w, node in enumerate(homes) if node == 0}
    routers = {node: Outbox(f"router-{node}") for node in range(1, args.nodes)}
    flow = handler.flow = Dataflow(
        0, plan, args.experts, pool, experts, routers, answer_rows=RowType.BF16
    )
    links = [SilentLink(Role.EXPERT, w, handler, pool) for w in experts]
    links += [SilentLink(Role.ROUTER, node, handler, pool, node) for node in routers]
    for outbox, link in zip([*experts.values(), *routers.values()], links, strict=True):
        outbox.opened(link)
    flow.calls.look()
    origin = SilentLink(Role.ATTENTION, 0, handler, pool)
    times: dict[str, list[float]] = defaultdict(list)
    profile = cProfile.Profile()
    with torch.inference_mode():
        for number in range(1, args.blocks + 1):
            message = block(pool, args.rows, args.experts, number)
            if args.profile and number == args.blocks // 4:
                profile.enable()
            started = time.perf_counter()
            origin.arrive(message)
            split = time.perf_counter()
            requests = [(link, header) for link in links for header in link.requests()]
            answers = [(link, answer(request)) for link, request in requests]
            ready = time.perf_counter()
            for link, landed in answers[:-1]:
                link.take_landed(landed)
            last = time.perf_counter()
            answers[-1][0].take_landed(answers[-1][1])
            ended = time.perf_counter()
            assert origin.posted.pop().kind is Kind.COMBINED
            for name, seconds in (
                ("dispatch", split - started),
                ("answers", last - ready),
                ("sum", ended - last),
            ):
                times[name].append(seconds * 1e6)
    profile.disable()
    figures = {name: round(median(values), 1) for name, values in times.items()}
    least = {name: round(min(values), 1) for name, values in times.items()}
    print(
        json.dumps(
            {
                "median_us": figures,
                "least_us": least,
                "sum_of_medians_us": round(sum(figures.values()), 1),
            }
        )
    )
    assert pool.outstanding == pool.rows_outstanding == 0, pool
    if args.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
