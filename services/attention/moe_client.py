"""The attention worker's side of a MoE layer: post rows to the node's routers, get combined rows back.

Every router of the node (rail) gets the whole block and answers what it knows of it; the answers are added in rail
order. Or each block goes to one of them, the one that owes least, and its answer is whole. A block is kept in the
outboxes until its answers are in, and posted again when a router's link comes back, or to another router where one has
whole blocks: a router that dies costs a delay, not a request. One future per block: the micro-batch awaits it once per
layer.
"""

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.errors import AtollError, DeadlineExceeded, Retryable, WireError
from common.obs.trace import Recorder
from common.tensors import TORCH_DTYPES, check_rows, numbers, put_bytes, row_bytes, rows_of
from common.transport.base import Link
from common.transport.buffers import Buffer, BufferPool
from common.transport.device import DevicePool, DeviceRows, release_behind
from common.transport.outbox import Message, Outbox
from common.transport.seam import Seam
from common.wire.blocks import (
    DispatchLayout,
    RowType,
    answer_layout,
    check_payload,
    dispatch_layout,
    row_segment,
)
from common.wire.header import Header, Kind, Landed, Wire
from kernels import ops

Tensor = torch.Tensor
Rows = Tensor | DeviceRows
Array = npt.NDArray[Any]
RailAnswer = tuple[Tensor, Tensor | None]
"""One router's rows, and their ids int64 [n] in the block (None: all of them, in order)."""


@dataclass(slots=True)
class HopTimes:
    """Sums over blocks, microseconds: the whole round trip, and its parts on the slowest path."""

    blocks: int = 0
    rows: int = 0
    round_trip_us: int = 0
    queue_us: int = 0
    compute_us: int = 0
    combine_us: int = 0
    late: int = 0


@dataclass(slots=True)
class _Pending:
    future: "asyncio.Future[Tensor]"
    layer: int
    microbatch: int
    num_rows: int
    num_answers: int  # wanted
    posted_ns: int
    out: Tensor | None
    epoch: int
    keep: Callable[[DeviceRows], None] | None
    partials: dict[int, RailAnswer] = field(default_factory=dict)  # by router


@dataclass(slots=True)
class MoeClient:
    """Blocks of one attention worker that are on their way. `width` is the model's hidden size.

    A block is stamped with `epoch`, the latest that a router of the node has said is in force. `by_block`: it goes to
    one of the routers, not to all.
    """

    worker: int
    width: int
    wire: Wire
    epoch: int
    pool: BufferPool
    deadline_s: float
    combined: RowType = RowType.FP32
    seam: Seam = field(default_factory=Seam)
    trace: Recorder | None = None
    packing: str = "pack"  # in traces; "post" where a device packs and this process only waits
    clock_ns: Callable[[], int] = time.monotonic_ns
    times: HopTimes = field(default_factory=HopTimes)
    routers: dict[int, Outbox] = field(default_factory=lambda: {0: Outbox("router-0")})  # by index
    by_block: bool = False
    _pending: dict[int, _Pending] = field(default_factory=dict)
    _next_block: int = 0

    def __post_init__(self) -> None:
        # a restarted worker must never take an answer that was meant for its predecessor
        incarnation = int.from_bytes(os.urandom(2), "little")
        self._next_block = self.worker << 48 | incarnation << 32

    @property
    def next_block(self) -> int:
        """Id of the block that `dispatch` will post next."""
        return self._next_block

    def in_force(self, link: Link, epoch: int) -> bool:
        """A router says which epoch is in force: all of them serve it then. True when it can be asked from now on.

        One that is out of date is not asked before it has caught up.
        """
        outbox = self.routers[link.peer.process.index]
        if epoch < self.epoch or outbox.link is link:
            self.epoch = max(self.epoch, epoch)
            return False
        self.epoch = epoch
        outbox.opened(link)
        self._hand_over()
        return True

    def router_lost(self, link: Link) -> None:
        """What a router owes waits for its return; whole blocks are asked of another as soon as one is there."""
        self.routers[link.peer.process.index].closed(link)
        self._hand_over()

    def _hand_over(self) -> None:
        if not self.by_block:
            return
        for lost in self.routers.values():
            (other,) = self._asked()
            if lost.link is None and other.link is not None:
                lost.hand_over(other)

    def _asked(self) -> list[Outbox]:
        """Who gets the next block: all, or of those that are there the one that owes least."""
        routers = list(self.routers.values())
        if self.by_block:
            return [min(routers, key=lambda outbox: (outbox.link is None, len(outbox)))]
        return routers

    @property
    def _answers_whole(self) -> bool:
        return self.by_block or len(self.routers) == 1

    @property
    def oldest_epoch(self) -> int:
        """No block of an earlier epoch is, or will be, on its way."""
        return min((pending.epoch for pending in self._pending.values()), default=self.epoch)

    def dispatch(
        self, layer: int, microbatch: int, rows: Rows, experts: Tensor, weights: Tensor, *,
        out: Tensor | None = None, since: object = 0, written: Callable[[], bool] | None = None,
        keep: Callable[[DeviceRows], None] | None = None,
    ) -> "asyncio.Future[Tensor]":  # fmt: skip
        """Post a block: rows [n, width], experts int32 [n, k], weights fp32 [n, k]; never waits.

        Where rows lie in device memory `rows` may be quantised already: a segment (maybe a `wider_segment`), sent from
        where it is, taking over a reference, and not written to before the answer; `out` is contiguous. Experts and
        weights are in host memory. On a GPU the block is posted when the current stream has written all of them, which
        `written` may tell of rows that are quantised already, else all that was launched must end.

        The future gets the combined rows, [n, width] in the row type `combined` on the device of `rows`, or
        DeadlineExceeded / the sentence of whoever failed; they are in `out` if that is given. But rows in device
        memory, whole and of `out`'s type, are given to `keep`, if there is one, which may retain them and read them
        there: `out` is then as it was. `since` is when packing began, for the trace.
        """
        assert experts.dtype is torch.int32, "expert ids of another type"
        assert weights.dtype is torch.float32, "gate weights of another type"
        num_rows, top_k = experts.shape
        layout = dispatch_layout(num_rows, self.width, top_k, self.wire)
        buffer = self._buffer(rows, layout)
        count = num_rows * top_k
        block = self._next_block
        self._next_block += 1
        header = Header(
            Kind.DISPATCH, self.wire, layer, self.epoch, self.width, block, block,
            num_rows, count, microbatch=microbatch,
        )  # fmt: skip
        now_ns = self.clock_ns()
        future: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        num_answers = 1 if self._answers_whole else len(self.routers)
        self._pending[block] = _Pending(
            future, layer, microbatch, num_rows, num_answers, now_ns, out, self.epoch, keep
        )
        tables = (layout, experts.numpy(), weights.numpy())  # views: the device may yet write there
        fence = self.seam.fence(written if isinstance(rows, DeviceRows) else None)
        fence.then(
            partial(self._post, header, buffer, tables, self._landing(num_rows), now_ns, since)
        )
        return future

    def _landing(self, num_rows: int) -> DeviceRows | None:
        """Where a router of this host shall put the combined rows."""
        if not (self._answers_whole and isinstance(self.pool, DevicePool)):
            return None
        return self.pool.acquire_rows(row_segment(num_rows, self.width, self.combined).end)

    def _buffer(self, rows: Rows, layout: DispatchLayout) -> Buffer:
        """A payload with these rows; the tables are still to be written."""
        if isinstance(rows, DeviceRows):
            assert isinstance(self.pool, DevicePool), "rows apart without device buffers"
            return self.pool.acquire_with(rows, layout.nbytes - layout.rows.end)
        buffer, segment = self.pool.acquire(layout.nbytes, rows_nbytes=layout.rows.end), layout.rows
        if self.wire is Wire.FP8:
            ops.quantise_rows(
                rows, row_bytes(buffer),
                rows_offset=segment.rows_offset, scales_offset=segment.scales_offset,
            )  # fmt: skip
        else:
            rows_of(buffer, segment).copy_(rows)
        return buffer

    def _post(
        self, header: Header, buffer: Buffer, tables: tuple[DispatchLayout, Array, Array],
        landing: DeviceRows | None, now_ns: int, since: object,
    ) -> None:  # fmt: skip
        """The device has written the block: send it. A full queue fails the block like any other refusal."""
        try:
            if header.block in self._pending:  # else its deadline is over
                layout, experts, weights = tables
                gap = max(0, buffer.rows_nbytes - layout.rows.end)  # see `wider_segment`
                put_bytes(buffer, gap + layout.experts, experts)
                put_bytes(buffer, gap + layout.weights, weights)
                if self.trace is not None:
                    self.trace.span(
                        self.packing, header.block, header.layer, header.microbatch, since,
                        self.clock_ns(), header.num_rows,
                    )  # fmt: skip
                asked = self._asked()
                for outbox in asked:  # each keeps a header of its own
                    mine = header if len(asked) == 1 else replace(header)
                    to = None if landing is None else landing.retain()
                    outbox.send(Message(mine, buffer.retain(), now_ns, to))
        except AtollError as exc:
            self._fail(header.block, exc)  # all routers or none
        finally:
            buffer.release()
            if landing is not None:
                landing.release()

    def on_landed(self, link: Link, answer: Landed, landing: DeviceRows) -> None:
        """`on_message` of an answer whose rows are where they were wanted. Raises WireError if these are another's."""
        pending, outbox = self._waiting(link, answer), self.routers[link.peer.process.index]
        if pending is None:
            return
        owed = outbox.owed(answer.block)
        if answer.kind != Kind.COMBINED or owed is None or owed.landing is not landing:
            raise WireError(f"{link.peer.process} answered {answer.block} with rows of another")
        self._answered(link, answer, pending, (self._taken(landing, pending), None))

    def on_message(self, link: Link, header: Header, payload: Buffer | None) -> None:
        """Take an answer; one that nobody waits for is dropped."""
        pending = self._waiting(link, header)
        try:
            if pending is None:
                return
            if header.kind is Kind.COMBINED:
                self._answered(link, header, pending, self._read(header, payload, pending))
            else:
                text = b"" if payload is None else payload.array.tobytes()
                sentence = text.decode("utf-8", "replace")
                self._fail(header.block, Retryable(f"{link.peer.process}: {sentence}"))
        finally:
            if payload is not None:  # behind a copy which the device may have yet to make
                self.seam.fence().then(payload.release)

    def _waiting(self, link: Link, answer: Header | Landed) -> _Pending | None:
        """Who waits for an answer; None, and counted, when nobody does any more."""
        pending = self._pending.get(answer.block)
        if pending is None or link.peer.process.index in pending.partials:
            self.times.late += 1
            return None
        return pending

    def _answered(
        self, link: Link, answer: Header | Landed, pending: _Pending, part: RailAnswer
    ) -> None:
        router = link.peer.process.index
        pending.partials[router] = part
        self.routers[router].settle(answer.block)
        if len(pending.partials) == pending.num_answers:
            self._settle(answer.block)
            self._count(answer, pending)
            if not pending.future.done():
                pending.future.set_result(self._combined(pending))

    def _taken(self, rows: DeviceRows, pending: _Pending) -> Tensor:
        """All rows of a block, in device memory: kept where they are, or copied."""
        out, dtype = pending.out, TORCH_DTYPES[self.combined]
        if out is not None and out.dtype is dtype and pending.keep is not None:
            pending.keep(rows)
            return out
        view = rows.block.matrix(dtype, rows.offset, pending.num_rows, self.width)
        out = view.clone() if out is None else out.copy_(view)
        release_behind(self.seam, rows.retain())
        return out

    def _read(self, header: Header, payload: Buffer | None, pending: _Pending) -> RailAnswer:
        """One router's answer. Raises WireError when it is malformed."""
        if self._answers_whole:
            payload, segment = check_rows(
                payload, pending.num_rows, self.width, self.combined, "COMBINED"
            )
            if payload.rows is not None:
                return self._taken(payload.rows, pending), None
            rows, out = rows_of(payload, segment), pending.out
            return (rows.clone() if out is None else out.copy_(rows)), None
        if header.num_rows == 0:
            return torch.empty((0, self.width)), torch.empty(0, dtype=torch.int64)
        row_type = RowType.FP64 if self.wire is Wire.FP32 else self.combined
        layout = answer_layout(header.num_rows, self.width, row_type, header.num_rows)
        check_payload("COMBINED", header.payload_nbytes, layout.nbytes)
        if payload is None:
            raise WireError("COMBINED without payload")
        ids = numbers(payload, layout.ids, header.num_rows, np.int32).astype(np.int64)
        if ids[0] < 0 or ids[-1] >= pending.num_rows or (np.diff(ids) <= 0).any():
            raise WireError(
                f"COMBINED with row ids that are not ascending in 0..{pending.num_rows - 1}"
            )
        return rows_of(payload, layout.rows).clone(), torch.from_numpy(ids)

    def _combined(self, pending: _Pending) -> Tensor:
        """Sum of the routers' answers in rail order, fp32 [num_rows, width]; float64 answers are rounded once."""
        if self._answers_whole:
            ((rows, _),) = pending.partials.values()
            return rows
        answers = [pending.partials[router] for router in self.routers]
        answers = [answer for answer in answers if len(answer[0])]
        like = answers[0][0]
        out = pending.out
        if out is None:
            shape = (pending.num_rows, self.width)
            out = torch.empty(shape, dtype=TORCH_DTYPES[self.combined], device=like.device)
        indices = [None if ids is None else ids.to(out.device) for _, ids in answers]
        ops.sum_partials([rows for rows, _ in answers], indices, out)
        return out

    def expire(self) -> None:
        """Fail the futures of blocks older than the deadline, naming router, layer and micro-batch, or the device."""
        now_ns, limit_ns = self.clock_ns(), int(self.deadline_s * 1e9)
        for outbox in self.routers.values():
            for call in outbox.expired(now_ns, limit_ns):
                h = call.header
                self._fail(
                    h.block,
                    DeadlineExceeded(
                        f"no answer from {outbox.name} within {self.deadline_s:g} s "
                        f"(layer {h.layer}, micro-batch {h.microbatch}, attempt {h.attempt + 1})"
                    ),
                )

        for block, pending in list(self._pending.items()):
            if now_ns - pending.posted_ns > limit_ns:  # and is asked of nobody
                late = f"the device has not written a block within {self.deadline_s:g} s"
                whose = f"(layer {pending.layer}, micro-batch {pending.microbatch})"
                self._fail(block, DeadlineExceeded(f"{late} {whose}"))

    def _fail(self, block: int, error: AtollError) -> None:
        pending = self._settle(block)
        if pending is not None and not pending.future.done():
            pending.future.set_exception(error)

    def _settle(self, block: int) -> _Pending | None:
        for outbox in self.routers.values():
            outbox.settle(block)
        return self._pending.pop(block, None)

    def _count(self, answer: Header | Landed, pending: _Pending) -> None:
        times, now = self.times, self.clock_ns()
        times.blocks += 1
        times.rows += pending.num_rows
        times.round_trip_us += (now - pending.posted_ns) // 1000
        if self.trace is not None:
            place = answer.block, pending.layer, pending.microbatch
            self.trace.span("answer", *place, now, now, pending.num_rows)
        times.queue_us += answer.queue_us
        times.compute_us += answer.compute_us
        times.combine_us += answer.combine_us
