"""Messages through a router: split, fan out, gather, sum, answer. Plain calls, no await, one pass per message.

Decides nothing about links coming and going (services.router.worker) nor about indices (services.router.plan).
Invariant: a request is in `_sources` or `_works` exactly while its origin waits for an answer; every message that is
owed an answer is in an outbox.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from common.errors import AtollError, DeadlineExceeded, LinkClosed, WireError
from common.ids import Role
from common.obs.trace import Recorder
from common.placement.plan import Plan
from common.tensors import numbers, read_rows, rows_of, write_rows
from common.transport.base import Link
from common.transport.buffers import Buffer, BufferPool
from common.transport.device import DeviceRows, release_behind
from common.transport.outbox import Outbox
from common.transport.seam import Seam
from common.wire.blocks import (
    EXPERT_OUT_ROWS,
    PARTIAL_ROWS,
    RowSegment,
    RowType,
    answer_layout,
    check_payload,
    dispatch_layout,
    relay_layout,
    row_segment,
)
from common.wire.header import Header, Kind, Wire
from services.router.block import NodeWork, SourceWork, Timing
from services.router.counters import Counters
from services.router.plan import NodeShare, check_experts, check_pairs, fan_out, split_by_node
from services.router.routes import Routes
from services.router.rows import Piece, Rows, expert_pieces, open_rows

# More for another router, which watches its own experts and knows better who owes what.
_PATIENCE_S = 0.5


@dataclass(slots=True)
class Dataflow:
    """Blocks in flight through one of the `num_rails` routers of `node`. `plan` is the current epoch's placement."""

    node: int
    plan: Plan
    num_experts: int
    pool: BufferPool
    experts: dict[int, Outbox]  # by worker index: the workers of this node
    routers: dict[int, Outbox]  # by node id: the router at the other end of this rail
    rail: int = 0
    num_rails: int = 1
    answer_rows: RowType = RowType.FP32  # compute dtype of the attention workers' device
    trace: Recorder | None = None
    clock_ns: Callable[[], int] = time.monotonic_ns
    counters: Counters = field(default_factory=Counters)
    _sources: dict[int, SourceWork] = field(default_factory=dict)
    _works: dict[int, NodeWork] = field(default_factory=dict)
    seam: Seam = field(default_factory=Seam)
    _routes: Routes = field(init=False)
    _rows: Rows = field(init=False)

    def __post_init__(self) -> None:
        self._routes = Routes(self.plan, self.node, rail=self.rail, num_rails=self.num_rails)
        self._rows = open_rows(self.pool, self.seam)

    def __repr__(self) -> str:
        owed = sum(len(outbox) for outbox in self.experts.values())
        return (
            f"<Dataflow node {self.node} [{len(self._sources)} blocks | {len(self._works)} node shares"
            f" | {owed} owed by experts | {sum(map(len, self.routers.values()))} by routers]>"
        )

    @property
    def num_in_flight(self) -> int:
        """Blocks and node shares that somebody waits for."""
        return len(self._sources) + len(self._works)

    # ---- requests ------------------------------------------------------------------------------

    def on_message(self, link: Link, header: Header, payload: Buffer | None) -> None:
        """Take one data message (and its payload). A bad request is answered with FAILED, not with a dead link."""
        self.counters.received(header)
        started = 0 if self.trace is None else self.clock_ns()
        try:
            if header.kind in (Kind.DISPATCH, Kind.RELAY):
                try:
                    self._on_request(link, header, payload)
                except AtollError as exc:
                    self._forget(header.block)
                    self._fail(link, header, str(exc))
            elif header.kind is Kind.EXPERT_OUT:
                self._on_expert_out(link.peer.process.index, header, payload)
            elif header.kind is Kind.PARTIAL:
                self._on_partial(link.peer.node, header, payload)
            elif header.kind is Kind.FAILED:
                self._on_failed(link, header, payload)
            else:
                raise WireError(f"{header.kind.name} sent to a router")
            if self.trace is not None:
                self.trace.span(
                    header.kind.name.lower(), header.trace, header.layer, header.microbatch, started,
                    self.clock_ns(), header.target if header.kind is Kind.EXPERT_OUT else link.peer.node,
                )  # fmt: skip
        finally:
            if payload is not None:
                payload.release()

    def _on_request(self, link: Link, header: Header, payload: Buffer | None) -> None:
        if header.epoch != self.plan.epoch:
            raise WireError(f"epoch {header.epoch}, this router serves epoch {self.plan.epoch}")
        if header.layer not in self._routes:
            raise WireError(f"layer {header.layer} has no experts")
        if payload is None or header.num_rows == 0:
            raise WireError(f"{header.kind.name} without rows")
        if header.block in self._sources or header.block in self._works:
            self._forget(header.block)  # sent again on a new link: the old answer has nowhere to go
        if header.kind is Kind.DISPATCH:
            self._on_dispatch(link, header, payload)
        else:
            self._on_relay(link, header, payload)

    def _on_dispatch(self, link: Link, header: Header, payload: Buffer) -> None:
        started = self.clock_ns()
        top_k, odd = divmod(header.num_pairs, header.num_rows)
        layout = dispatch_layout(header.num_rows, header.width, top_k, header.wire)
        check_payload("DISPATCH", header.payload_nbytes, layout.nbytes)
        if odd or top_k == 0:
            raise WireError(f"{header.num_pairs} pairs for {header.num_rows} rows")
        experts = numbers(payload, layout.experts, header.num_pairs, np.int32)
        weights = numbers(payload, layout.weights, header.num_pairs, np.float32)
        check_experts(experts, self.num_experts)
        nodes = self._routes.nodes(header.layer, experts)
        shares = split_by_node(
            experts.reshape(-1, top_k), weights.reshape(-1, top_k), nodes.reshape(-1, top_k)
        )
        self.counters.blocks += 1
        source = SourceWork(header, link, {share.node: share for share in shares})
        if not shares:  # every pair is for the node's other rails
            self._answer_combined(source)
            return
        self._sources[header.block] = source
        for share in shares:  # remote nodes first: their way is longer
            if share.node != self.node:
                self._relay(source, share, payload, layout.rows)
        local = source.shares.get(self.node)
        if local is not None:
            self._start_work(
                link, header, payload, layout.rows, local.rows, local.pair_rows, local.experts, local.weights
            )  # fmt: skip
        self.counters.split_us += (self.clock_ns() - started) // 1000

    def _relay(
        self, source: SourceWork, share: NodeShare, payload: Buffer, rows: RowSegment
    ) -> None:
        request = source.request
        num_pairs = len(share.pair_rows)
        layout = relay_layout(len(share.rows), request.width, num_pairs, request.wire)
        piece = Piece(0, len(share.rows), layout.rows, layout.nbytes)
        (buffer,) = self._rows.gather(payload, rows, share.rows, [piece])
        numbers(buffer, layout.pair_rows, num_pairs, np.int32)[:] = share.pair_rows
        numbers(buffer, layout.experts, num_pairs, np.int32)[:] = share.experts
        numbers(buffer, layout.weights, num_pairs, np.float32)[:] = share.weights
        header = request.derive(
            Kind.RELAY, target=share.node, num_rows=len(share.rows), num_pairs=num_pairs,
            payload_nbytes=layout.nbytes,
        )  # fmt: skip
        self.counters.crossed(share.node, header, num_pairs, inward=False)
        answer = row_segment(len(share.rows), request.width, PARTIAL_ROWS[request.wire])
        landing = self.pool.acquire_landing(answer.end)
        self._send(self.routers[share.node], header, buffer, landing)

    def _on_relay(self, link: Link, header: Header, payload: Buffer) -> None:
        started = self.clock_ns()
        layout = relay_layout(header.num_rows, header.width, header.num_pairs, header.wire)
        check_payload("RELAY", header.payload_nbytes, layout.nbytes)
        self.counters.crossed(link.peer.node, header, header.num_pairs, inward=True)
        pair_rows = numbers(payload, layout.pair_rows, header.num_pairs, np.int32)
        experts = numbers(payload, layout.experts, header.num_pairs, np.int32)
        weights = numbers(payload, layout.weights, header.num_pairs, np.float32)
        check_pairs(pair_rows, experts, num_rows=header.num_rows, num_experts=self.num_experts)
        if (self._routes.homes(header.layer, experts) != self.node).any():
            raise WireError(f"a RELAY for experts that node {self.node} does not hold")
        every_row = np.arange(header.num_rows)
        self._start_work(link, header, payload, layout.rows, every_row, pair_rows, experts, weights)
        self.counters.split_us += (self.clock_ns() - started) // 1000

    def _start_work(
        self, link: Link, request: Header, payload: Buffer, segment: RowSegment, rows: np.ndarray,
        pair_rows: np.ndarray, experts: np.ndarray, weights: np.ndarray,
    ) -> None:  # fmt: skip
        """Fan a node's share out to its workers; `rows` index the segment, `pair_rows` index `rows`."""
        workers = self._routes.workers(request.layer, experts)
        plan = fan_out(pair_rows, experts, weights, len(rows), workers)
        pieces = expert_pieces(plan, request.width, request.wire)
        buffers, outputs = self._rows.fan_out(
            payload, segment, rows[plan.rows], pieces, plan, EXPERT_OUT_ROWS[request.wire]
        )
        waiting = {share.worker: share for share in plan.shares}
        self._works[request.block] = NodeWork(request, link, len(rows), outputs, waiting)
        sends = zip(plan.shares, pieces, buffers, outputs.landings, strict=True)
        for share, piece, buffer, landing in sends:
            segments = share.segments
            numbers(buffer, piece.segment.end, segments.size, np.int32)[:] = segments.ravel()
            header = request.derive(
                Kind.EXPERT_IN, target=share.worker, num_rows=share.stop - share.start,
                num_pairs=len(segments), payload_nbytes=piece.nbytes,
            )  # fmt: skip
            self._send(self.experts[share.worker], header, buffer, landing)
        self.counters.rows_to_experts += len(plan.rows)

    # ---- answers -------------------------------------------------------------------------------

    def _on_expert_out(self, worker: int, header: Header, payload: Buffer | None) -> None:
        outbox = self.experts[worker]
        owed = outbox.owed(header.block)
        work = self._works.get(header.block)
        if owed is None or work is None or worker not in work.waiting:
            self.counters.late += 1
            return
        row_type = EXPERT_OUT_ROWS[work.request.wire]
        rows = read_rows(payload, owed.header.num_rows, work.request.width, row_type, "EXPERT_OUT")
        in_place = payload is not None and payload.rows is not None and payload.rows is owed.landing
        outbox.settle(header.block)
        if work.arrived(worker, header, None if in_place else rows):
            del self._works[header.block]
            self._finish_work(work)

    def _finish_work(self, work: NodeWork) -> None:
        started = self.clock_ns()
        request = work.request
        exact = request.wire is Wire.FP32
        source = self._sources.get(request.block) if request.kind is Kind.DISPATCH else None
        if source is None:
            self._answer_sum(work, Kind.PARTIAL, PARTIAL_ROWS[request.wire], work.timing, started)
        elif len(source.shares) == 1 and self.num_rails == 1 and not exact:
            del self._sources[request.block]  # the node's sum is the answer, rounded once as well
            source.timing.include(work.timing)
            self._answer_sum(work, Kind.COMBINED, self.answer_rows, source.timing, started)
        else:
            partial = work.partial(exact=exact)
            self._rows.release(work.outputs)
            self._count_combine(work.timing, started)
            source.timing.include(work.timing)
            self._take_partial(source, self.node, partial)

    def _answer_sum(
        self, work: NodeWork, kind: Kind, row_type: RowType, timing: Timing, started_ns: int
    ) -> None:
        """Answer with a node's sum, which goes straight into its message."""
        layout = answer_layout(work.num_rows, work.request.width, row_type)
        buffer = self.pool.acquire(layout.nbytes, rows_nbytes=layout.rows.end)
        work.sum_into(rows_of(buffer, layout.rows))
        self._rows.written(buffer)
        self._rows.release(work.outputs)
        self._count_combine(timing, started_ns)
        self._answer(work.origin, work.request, kind, buffer, timing, work.num_rows)

    def _count_combine(self, timing: Timing, started_ns: int) -> None:
        elapsed_us = (self.clock_ns() - started_ns) // 1000
        timing.combine_us += elapsed_us
        self.counters.combine_us += elapsed_us

    def _on_partial(self, node: int, header: Header, payload: Buffer | None) -> None:
        outbox = self.routers[node]
        owed = outbox.owed(header.block)
        source = self._sources.get(header.block)
        if owed is None or source is None or node in source.partials:
            self.counters.late += 1
            return
        row_type = PARTIAL_ROWS[source.request.wire]
        rows = read_rows(payload, owed.header.num_rows, source.request.width, row_type, "PARTIAL")
        self.counters.crossed(node, header, owed.header.num_pairs, inward=True)
        outbox.settle(header.block)
        source.timing.include(header)
        self._take_partial(source, node, rows.clone())  # the buffer goes back to the pool
        if payload is not None:
            release_behind(self.seam, payload.retain())

    def _take_partial(self, source: SourceWork, node: int, partial: torch.Tensor) -> None:
        if source.arrived(node, partial):
            del self._sources[source.request.block]
            self._answer_combined(source)

    def _answer_combined(self, source: SourceWork) -> None:
        """One rail's sum is the answer; of several, each answers its rows and the attention worker adds."""
        started = self.clock_ns()
        request = source.request
        if self.num_rails == 1:
            rows, row_type, ids = source.combined(self._rows), self.answer_rows, None
        else:
            row_type = RowType.FP64 if request.wire is Wire.FP32 else self.answer_rows
            rows, ids = source.partial(self._rows, exact=row_type is RowType.FP64)
        num_ids = 0 if ids is None else len(ids)
        layout = answer_layout(len(rows), request.width, row_type, num_ids)
        buffer = self.pool.acquire(layout.nbytes, rows_nbytes=layout.rows.end)
        if len(rows):
            write_rows(buffer, layout.rows, rows)
            self._rows.written(buffer)
        if ids is not None:
            numbers(buffer, layout.ids, num_ids, np.int32)[:] = ids
        self._count_combine(source.timing, started)
        self._answer(
            source.origin, request, Kind.COMBINED, buffer, source.timing, len(rows), num_ids
        )

    def _answer(
        self, link: Link, request: Header, kind: Kind, buffer: Buffer, timing: Timing,
        num_rows: int, num_ids: int = 0,
    ) -> None:  # fmt: skip
        """Answer with the rows in `buffer`; `num_ids` of them are named, 0: all rows of the request, in order."""
        nbytes = buffer.nbytes + buffer.rows_nbytes
        header = request.derive(
            kind, target=self.node, num_rows=num_rows, num_pairs=num_ids, payload_nbytes=nbytes
        )
        header.queue_us, header.compute_us = timing.queue_us, timing.compute_us
        header.combine_us = timing.combine_us
        if kind is Kind.PARTIAL:
            self.counters.crossed(link.peer.node, header, request.num_pairs, inward=False)
        self._post(link, header, buffer)

    # ---- failures ------------------------------------------------------------------------------

    def _on_failed(self, link: Link, header: Header, payload: Buffer | None) -> None:
        outbox = self._outbox_of(link)
        if outbox is None or outbox.settle(header.block) is None:
            self.counters.late += 1
            return
        sentence = "" if payload is None else payload.array.tobytes().decode("utf-8", "replace")
        self._fail_block(header.block, f"{link.peer.process}: {sentence}")

    def expire(self, limit_s: float) -> None:
        """Fail every block that a peer has owed for longer than `limit_s`, naming who owes it."""
        now_ns = self.clock_ns()
        limits = [(outbox, limit_s) for outbox in self.experts.values()]
        limits += [(outbox, limit_s + _PATIENCE_S) for outbox in self.routers.values()]
        for outbox, limit in limits:
            for call in outbox.expired(now_ns, int(limit * 1e9)):
                outbox.drop(call.header.block)
                h = call.header
                error = DeadlineExceeded(
                    f"no answer from {outbox.name} within {limit:g} s "
                    f"(layer {h.layer}, micro-batch {h.microbatch}, attempt {h.attempt + 1})"
                )
                self._fail_block(h.block, str(error))

    def origin_closed(self, link: Link) -> None:
        """Nobody waits any more for what this link asked: drop it. Late answers find nothing and are dropped too."""
        for table in (self._sources, self._works):
            for block in [b for b, item in table.items() if item.origin is link]:
                self._forget(block)

    def _fail_block(self, block: int, sentence: str) -> None:
        item = self._sources.get(block) or self._works.get(block)
        self._forget(block)
        if item is not None:
            self._fail(item.origin, item.request, sentence)

    def _fail(self, link: Link, request: Header, sentence: str) -> None:
        self.counters.failed += 1
        buffer = self.pool.acquire_text(sentence)
        header = request.derive(Kind.FAILED, target=self.node, payload_nbytes=buffer.nbytes)
        self._post(link, header, buffer)

    def _forget(self, block: int) -> None:
        self._sources.pop(block, None)
        work = self._works.pop(block, None)
        if work is not None:
            self._rows.release(work.outputs)
        for outbox in (*self.experts.values(), *self.routers.values()):
            outbox.drop(block)

    # ---- sending -------------------------------------------------------------------------------

    def _send(
        self, outbox: Outbox, header: Header, buffer: Buffer, landing: DeviceRows | None
    ) -> None:
        self.counters.posted(header)
        outbox.send(header, buffer, self.clock_ns(), landing=landing)

    def _post(self, link: Link, header: Header, buffer: Buffer) -> None:
        """Post an answer; an origin that is gone will ask again, so a closed link loses nothing."""
        try:
            link.post(header, buffer)
            self.counters.posted(header)
        except LinkClosed:
            self.counters.late += 1
        finally:
            buffer.release()

    def _outbox_of(self, link: Link) -> Outbox | None:
        if link.peer.process.role is Role.EXPERT:
            return self.experts.get(link.peer.process.index)
        return self.routers.get(link.peer.node)
