"""Rows of blocks in a router's memory: gathered into messages on the way out, and where outputs lie on the way back.

In host memory rows are copied at once. In device memory one kernel gathers the rows of every message of a block into
one stretch, of which each message has its piece; the pieces leave when the kernel is done, and outputs land side by
side, where the weighted sum reads them. The tables of both kernels are read from pinned memory by the first, which
takes those of the second along.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from common.tensors import TORCH_DTYPES, RowPick, check_rows_apart, rows_of, storage_of
from common.transport.buffers import Buffer, BufferPool
from common.transport.device import DeviceBlock, DevicePool, DeviceRows, release_behind
from common.transport.outbox import Call, Message
from common.transport.seam import Seam
from common.transport.volley import Part, Volley
from common.wire.blocks import (
    DISPATCH_ROWS,
    EXPERT_OUT_ROWS,
    PARTIAL_ROWS,
    RowSegment,
    RowType,
    num_scales,
    row_segment,
)
from common.wire.header import HEADER_NBYTES, Header, Kind, Wire
from kernels import ops
from services.router.plan import WorkerShare
from services.router.tables import ALIGN, Piece, Tables, tables_of

Tensor = torch.Tensor
_MOST_WARMED = 8  # pairs of a row, as top-k is in most models


def sum_dtype(wire: Wire) -> torch.dtype:
    """Of a node's sum where it is added to others: not rounded."""
    return torch.float64 if wire is Wire.FP32 else torch.float32


@dataclass(slots=True)
class Outputs:
    """Where the answers to the parts of a block come together, and the order of their sum.

    rows [num_places, width]; slots int32 and weights fp32 (None: all one) [num_rows, most answers for a row].
    """

    rows: Tensor
    slots: Tensor
    weights: Tensor | None
    row_nbytes: int
    held: list[DeviceBlock] = field(default_factory=list)
    bytes: memoryview | None = None  # of `rows` in host memory

    def put(self, start: int, payload: Buffer, segment: RowSegment) -> None:
        """Copy an answer, all of `payload`, to the places from `start` on."""
        num_rows = segment.num_rows
        if self.bytes is None:
            self.rows[start : start + num_rows].copy_(rows_of(payload, segment))
            return
        first, nbytes = start * self.row_nbytes, num_rows * self.row_nbytes
        self.bytes[first : first + nbytes] = payload.view[HEADER_NBYTES : HEADER_NBYTES + nbytes]


class Gathered(Protocol):
    """The rows of all messages of one kind about a request."""

    def call(
        self, number: int, target: int, num_pairs: int, tail: bytes, piece: Piece, outputs: Outputs, first: int,
        now_ns: int,
    ) -> Call:  # fmt: skip
        """The message `number` with the rows of `piece`, and `tail` behind them in the payload.

        The rows of its answer go to the places of `outputs` from `first` on.
        """
        ...

    def leave(self) -> None:
        """Every call has been posted, or will not be."""
        ...


class Rows(Protocol):
    """The memory of one kind."""

    def gather(
        self, payload: Buffer, segment: RowSegment, tables: Tables, request: Header, kind: Kind
    ) -> Gathered:
        """Row index[place] of `segment` at each place, for messages of `kind` about `request`."""
        ...

    def fan_out(
        self, payload: Buffer, segment: RowSegment, tables: Tables, request: Header, kind: Kind, row_type: RowType,
    ) -> tuple[Gathered, Outputs]:  # fmt: skip
        """`gather`, and room for the answers in `row_type`, a place for each of the rows."""
        ...

    def written(self, buffer: Buffer, *outputs: Outputs) -> None:
        """What was launched so far writes the rows of `buffer`, which leave when it is done.

        The `outputs` that it read are released then.
        """
        ...

    def release(self, *outputs: Outputs) -> None:
        """The sum over these outputs was launched, or is not wanted any more."""
        ...

    def warm_up(self, width: int, wire: Wire, depth: int, answer: RowType) -> None:
        """Compile what blocks launch whose rows have up to `depth` pairs, before anybody waits for one."""
        ...


@dataclass(slots=True)
class _Picked:
    """Rows in host memory, which travel inside their messages."""

    pool: BufferPool
    rows: RowPick
    segment: RowSegment
    request: Header
    kind: Kind

    def call(
        self, number: int, target: int, num_pairs: int, tail: bytes, piece: Piece, outputs: Outputs, first: int,
        now_ns: int,
    ) -> Call:  # fmt: skip
        start, stop, _, nbytes = piece
        buffer = self.pool.acquire(nbytes + len(tail))
        segment = row_segment(stop - start, self.segment.width, self.segment.row_type)
        self.rows.copy_to(buffer, segment, start, stop)
        buffer.view[HEADER_NBYTES + nbytes : HEADER_NBYTES + buffer.nbytes] = tail
        header = self.request.derive(
            self.kind, target=target, num_rows=stop - start, num_pairs=num_pairs,
            payload_nbytes=buffer.nbytes,
        )  # fmt: skip
        header.block = number
        return Message(header, buffer, now_ns)

    def leave(self) -> None:
        pass


class HostRows:
    """Rows in host memory: they travel inside their messages."""

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool

    def gather(
        self, payload: Buffer, segment: RowSegment, tables: Tables, request: Header, kind: Kind
    ) -> Gathered:
        picked = RowPick(payload, segment, tables.index)
        return _Picked(self._pool, picked, segment, request, kind)

    def fan_out(
        self, payload: Buffer, segment: RowSegment, tables: Tables, request: Header, kind: Kind, row_type: RowType,
    ) -> tuple[Gathered, Outputs]:  # fmt: skip
        num_places, weights = tables.num_places, tables.weights
        # torch views nothing as another dtype
        memory = np.empty(max(1, num_places) * segment.width * int(row_type), np.uint8)
        rows = torch.from_numpy(memory).view(TORCH_DTYPES[row_type]).view(-1, segment.width)
        factors = None if weights is None else torch.from_numpy(weights)
        slots = torch.from_numpy(tables.slots)
        nbytes = segment.width * int(row_type)
        outputs = Outputs(rows[:num_places], slots, factors, nbytes, bytes=memory.data)
        return self.gather(payload, segment, tables, request, kind), outputs

    def written(self, buffer: Buffer, *outputs: Outputs) -> None:
        pass

    def release(self, *outputs: Outputs) -> None:
        pass

    def warm_up(self, width: int, wire: Wire, depth: int, answer: RowType) -> None:
        pass


class _Pieces(Volley):
    """Rows in device memory."""

    __slots__ = ()

    def call(
        self, number: int, target: int, num_pairs: int, tail: bytes, piece: Piece, outputs: Outputs, first: int,
        now_ns: int,
    ) -> Call:  # fmt: skip
        start, stop, place, nbytes = piece
        landing, num_rows, row_nbytes = None, stop - start, outputs.row_nbytes
        if row_nbytes % 16 == 0:  # else an answer is longer than its rows
            landing = outputs.held[0].rows(first * row_nbytes, num_rows * row_nbytes)
        return Part(self, number, target, num_rows, num_pairs, place, nbytes, tail, landing, now_ns)


class RowsApart:
    """Rows in the memory of a device: each message's travel apart from it."""

    def __init__(self, pool: DevicePool, seam: Seam) -> None:
        self._pool = pool
        self._seam = seam

    def gather(
        self, payload: Buffer, segment: RowSegment, tables: Tables, request: Header, kind: Kind
    ) -> Gathered:
        source = check_rows_apart("a block", payload, segment)
        return self._gather(payload, source, segment, tables, request, kind, None, 0)

    def fan_out(
        self, payload: Buffer, segment: RowSegment, tables: Tables, request: Header, kind: Kind, row_type: RowType,
    ) -> tuple[Gathered, Outputs]:  # fmt: skip
        source = check_rows_apart("a block", payload, segment)
        row_nbytes, (_, _, slots_at, weights_at) = segment.width * int(row_type), tables.ats
        # the sum's tables lie behind the rows
        end = -(-tables.num_places * row_nbytes // ALIGN) * ALIGN
        block = self._pool.take(end + len(tables.memory) - slots_at)
        gathered = self._gather(payload, source, segment, tables, request, kind, block, end)
        rows = block.matrix(TORCH_DTYPES[row_type], 0, tables.num_places, segment.width)
        slots, weights = block.matrix(torch.int32, end, *tables.shape), None
        if tables.weighted:
            weights = block.matrix(torch.float32, end + weights_at - slots_at, *tables.shape)
        return gathered, Outputs(rows, slots, weights, row_nbytes, [block])

    def _gather(
        self, payload: Buffer, source: DeviceRows, segment: RowSegment, tables: Tables, request: Header, kind: Kind,
        outputs: DeviceBlock | None, rest_at: int,
    ) -> Gathered:  # fmt: skip
        """`source` are the payload's rows; the tables of the sum go to byte `rest_at` of `outputs`."""
        is_fp8 = segment.row_type is RowType.FP8
        staging, block = self._pool.acquire(len(tables.memory)), self._pool.take(tables.nbytes)
        staging.view[HEADER_NBYTES : HEADER_NBYTES + len(tables.memory)] = tables.memory
        index_at, pieces_at, slots_at, _ = (HEADER_NBYTES + at for at in tables.ats)
        ops.gather_pieces(
            source.block.tensor, block.tensor, storage_of(staging),
            None if outputs is None else outputs.tensor,
            index_offset=index_at, pieces_offset=pieces_at, num_pieces=len(tables.pieces),
            max_rows=max([stop - start for start, stop, _, _ in tables.pieces], default=0),
            row_nbytes=segment.width * int(segment.row_type),
            source_offset=source.offset + segment.rows_offset,
            scale_nbytes=4 * num_scales(segment.width) if is_fp8 else 0,
            source_scales=source.offset + segment.scales_offset,
            rest_from=slots_at, rest_at=rest_at,
            rest_nbytes=0 if outputs is None else HEADER_NBYTES + len(tables.memory) - slots_at,
        )  # fmt: skip
        fence = release_behind(self._seam, payload.retain(), staging)
        return _Pieces(request, kind, self._pool, block, fence)

    def written(self, buffer: Buffer, *outputs: Outputs) -> None:
        assert buffer.rows is not None, "an answer without rows apart"
        buffer.rows.fence = release_behind(self._seam, *_taken(outputs))

    def release(self, *outputs: Outputs) -> None:
        if held := _taken(outputs):
            release_behind(self._seam, *held)

    def warm_up(self, width: int, wire: Wire, depth: int, answer: RowType) -> None:
        # a row has `depth` pairs where one node has all experts; of slices there are too many numbers for all
        for num_rows in ops.KINDS_OF_ROWS:
            powers = {1 << i for i in range((depth - 1).bit_length() + 1)}
            for pairs in {*range(1, min(depth, _MOST_WARMED) + 1), depth, *powers}:
                self._warm_up(num_rows, width, wire, pairs, TORCH_DTYPES[answer])

    def _warm_up(
        self, num_rows: int, width: int, wire: Wire, pairs: int, answer: torch.dtype
    ) -> None:
        """Gather one row for all places, and add up answers that are zero."""
        segment = row_segment(num_rows, width, DISPATCH_ROWS[wire])
        payload = self._pool.acquire(segment.end, rows_nbytes=segment.end)
        slots = np.zeros((num_rows, pairs), np.int32)
        tables = tables_of(
            np.zeros(num_rows, np.int32), [(0, num_rows)], width, DISPATCH_ROWS[wire], slots, slots.astype(np.float32),
        )  # fmt: skip
        request = Header(Kind.DISPATCH, wire)
        gathered, outputs = self.fan_out(
            payload, segment, tables, request, Kind.EXPERT_IN, EXPERT_OUT_ROWS[wire]
        )
        gathered.leave()
        rows, partial, wide = (
            outputs.rows.zero_(),
            TORCH_DTYPES[PARTIAL_ROWS[wire]],
            sum_dtype(wire),
        )
        for dtype in (wide, partial, answer):  # to be added to others, or rounded
            out = rows.new_empty((num_rows, width), dtype=dtype)
            ops.combine(rows, outputs.slots, outputs.weights, out)
        if pairs & (pairs - 1) == 0:  # see plan.sum_table
            out = rows.new_empty((num_rows, width), dtype=answer)
            ops.combine(rows.to(partial), outputs.slots, None, out, rows[:1].to(wide))
        self.release(outputs)
        release_behind(self._seam, payload)


def rows_again(
    memory: Rows, request: Header, asked: Call, old: WorkerShare, parts: Sequence[WorkerShare]
) -> tuple[list[Piece], Gathered]:
    """The rows of an EXPERT_IN that was asked of `old`, for others."""
    row_type = DISPATCH_ROWS[request.wire]
    spans = [(part.start - old.start, part.stop - old.start) for part in parts]
    tables = tables_of(np.arange(asked.num_rows), spans, request.width, row_type)
    segment = row_segment(asked.num_rows, request.width, row_type)
    return tables.pieces, memory.gather(asked.payload, segment, tables, request, Kind.EXPERT_IN)


def _taken(outputs: Sequence[Outputs]) -> list[DeviceBlock]:
    """What these hold, which the caller releases."""
    held = [block for o in outputs for block in o.held]
    for o in outputs:
        o.held = []
    return held


def open_rows(pool: BufferPool, seam: Seam) -> Rows:
    """The memory that a process's buffers are in."""
    return RowsApart(pool, seam) if isinstance(pool, DevicePool) else HostRows(pool)
