"""Rows of blocks in a router's memory: gathered into messages on the way out, and where outputs lie on the way back.

In host memory rows are copied at once. In device memory one kernel gathers the rows of every message of a block into
one stretch, of which each message has its piece; the pieces leave when the kernel is done, and outputs land side by
side, where the weighted sum reads them. The tables of both kernels go to the device in one copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from common.tensors import TORCH_DTYPES, RowPick, check_rows_apart, put_bytes, rows_of
from common.transport.buffers import Buffer, BufferPool
from common.transport.device import DeviceBlock, DevicePool, DeviceRows, release_behind
from common.transport.seam import Seam
from common.wire.blocks import (
    DISPATCH_ROWS,
    EXPERT_OUT_ROWS,
    PARTIAL_ROWS,
    RowSegment,
    RowType,
    expert_in_layout,
    num_scales,
    row_segment,
)
from common.wire.header import HEADER_NBYTES, Wire
from kernels import ops
from services.router.plan import WorkerShare

Tensor = torch.Tensor
Array = npt.NDArray[Any]
_MOST_WARMED = 8  # pairs of a row, as top-k is in most models
_ALIGN = 256  # of pieces in device memory, so that copies are as wide as they can be


@dataclass(slots=True)
class Piece:
    """One message: the rows of places `start` to `stop`, laid out as `segment`, in a payload of `nbytes`."""

    start: int
    stop: int
    segment: RowSegment
    nbytes: int


Span = WorkerShare | Piece  # places `start` to `stop`


def expert_pieces(
    shares: Sequence[WorkerShare], width: int, wire: Wire, *, first: int = 0
) -> list[Piece]:
    """The EXPERT_IN of each share; `first` is the place that the first of the rows at hand belongs to."""
    pieces = []
    for share in shares:
        layout = expert_in_layout(share.stop - share.start, width, len(share.segments), wire)
        pieces.append(Piece(share.start - first, share.stop - first, layout.rows, layout.nbytes))
    return pieces


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
    held: list[DeviceBlock] = field(default_factory=list)
    bytes: memoryview | None = None  # of `rows` in host memory

    def put(self, start: int, payload: Buffer, segment: RowSegment) -> None:
        """Copy an answer, all of `payload`, to the places from `start` on."""
        num_rows = segment.num_rows
        if self.bytes is None:
            self.rows[start : start + num_rows].copy_(rows_of(payload, segment))
            return
        row_nbytes = segment.width * int(segment.row_type)
        first, nbytes = start * row_nbytes, num_rows * row_nbytes
        self.bytes[first : first + nbytes] = payload.view[HEADER_NBYTES : HEADER_NBYTES + nbytes]


class Rows(Protocol):
    """The memory of one kind."""

    def gather(
        self, payload: Buffer, segment: RowSegment, index: Array, pieces: Sequence[Piece]
    ) -> list[Buffer]:
        """Payloads with row index[place] of `segment` at each place; their tables are still to be written."""
        ...

    def fan_out(
        self, payload: Buffer, segment: RowSegment, index: Array, pieces: Sequence[Piece],
        tables: tuple[Array, Array | None], row_type: RowType,
    ) -> tuple[list[Buffer], Outputs]:  # fmt: skip
        """`gather`, and room for the answers in `row_type`; `tables` are slots and weights of their sum."""
        ...

    def landings(self, outputs: Outputs, spans: Sequence[Span]) -> list[DeviceRows | None]:
        """Where the answers for these places go (a reference each), None where they are copied."""
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


class HostRows:
    """Rows in host memory: they travel inside their messages."""

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool

    def gather(
        self, payload: Buffer, segment: RowSegment, index: Array, pieces: Sequence[Piece]
    ) -> list[Buffer]:
        picked = RowPick(payload, segment, index)
        buffers = []
        for piece in pieces:
            buffer = self._pool.acquire(piece.nbytes)
            picked.copy_to(buffer, piece.segment, piece.start, piece.stop)
            buffers.append(buffer)
        return buffers

    def fan_out(
        self, payload: Buffer, segment: RowSegment, index: Array, pieces: Sequence[Piece],
        tables: tuple[Array, Array | None], row_type: RowType,
    ) -> tuple[list[Buffer], Outputs]:  # fmt: skip
        # torch views nothing as another dtype
        memory = np.empty(max(1, len(index)) * segment.width * int(row_type), np.uint8)
        rows = torch.from_numpy(memory).view(TORCH_DTYPES[row_type]).view(-1, segment.width)
        slots, weights = torch.from_numpy(tables[0]), tables[1]
        factors = None if weights is None else torch.from_numpy(weights)
        outputs = Outputs(rows[: len(index)], slots, factors, bytes=memory.data)
        return self.gather(payload, segment, index, pieces), outputs

    def landings(self, outputs: Outputs, spans: Sequence[Span]) -> list[DeviceRows | None]:
        return [None] * len(spans)

    def written(self, buffer: Buffer, *outputs: Outputs) -> None:
        pass

    def release(self, *outputs: Outputs) -> None:
        pass

    def warm_up(self, width: int, wire: Wire, depth: int, answer: RowType) -> None:
        pass


class RowsApart:
    """Rows in the memory of a device: each message's travel apart from it."""

    def __init__(self, pool: DevicePool, seam: Seam) -> None:
        self._pool = pool
        self._seam = seam

    def gather(
        self, payload: Buffer, segment: RowSegment, index: Array, pieces: Sequence[Piece]
    ) -> list[Buffer]:
        table, places, nbytes = _layout(pieces)
        ats, tables, staging = self._copy(index.astype(np.int32, copy=False), table)
        held = payload.retain(), staging, tables
        return self._gather(payload, segment, tables, ats, pieces, places, nbytes, held)

    def fan_out(
        self, payload: Buffer, segment: RowSegment, index: Array, pieces: Sequence[Piece],
        tables: tuple[Array, Array | None], row_type: RowType,
    ) -> tuple[list[Buffer], Outputs]:  # fmt: skip
        table, places, nbytes = _layout(pieces)
        given = [array for array in tables if array is not None]
        ats, copy, staging = self._copy(index.astype(np.int32, copy=False), table, *given)
        held = payload.retain(), staging
        buffers = self._gather(payload, segment, copy, ats, pieces, places, nbytes, held)
        num_places = len(index)
        block = self._pool.take(num_places * segment.width * int(row_type))
        rows = block.matrix(TORCH_DTYPES[row_type], 0, num_places, segment.width)
        slots = copy.matrix(torch.int32, ats[2], *given[0].shape)
        weights = copy.matrix(torch.float32, ats[3], *given[1].shape) if given[1:] else None
        return buffers, Outputs(rows, slots, weights, [block, copy])

    def landings(self, outputs: Outputs, spans: Sequence[Span]) -> list[DeviceRows | None]:
        nbytes = outputs.rows.shape[1] * outputs.rows.itemsize
        if nbytes % 16:  # an answer is longer than its rows
            return [None] * len(spans)
        block = outputs.held[0]
        return [block.rows(s.start * nbytes, (s.stop - s.start) * nbytes) for s in spans]

    def _gather(
        self, payload: Buffer, segment: RowSegment, tables: DeviceBlock, ats: Sequence[int],
        pieces: Sequence[Piece], places: list[int], nbytes: int, held: Sequence[Buffer | DeviceBlock],
    ) -> list[Buffer]:  # fmt: skip
        """The index and the kernel's table are in `tables` at the first two of `ats`; `held` are released behind it."""
        source = check_rows_apart("a block", payload, segment)
        if not pieces:
            release_behind(self._seam, *held)
            return []
        block = self._pool.take(nbytes)
        is_fp8 = segment.row_type is RowType.FP8
        ops.gather_pieces(
            source.block.tensor, block.tensor, tables.tensor,
            index_offset=ats[0], pieces_offset=ats[1], num_pieces=len(pieces),
            max_rows=max(p.stop - p.start for p in pieces),
            row_nbytes=segment.width * int(segment.row_type),
            source_offset=source.offset + segment.rows_offset,
            scale_nbytes=4 * num_scales(segment.width) if is_fp8 else 0,
            source_scales=source.offset + segment.scales_offset,
        )  # fmt: skip
        fence = release_behind(self._seam, *held)
        buffers = []
        for piece, place in zip(pieces, places, strict=True):
            rows = block.rows(place, piece.segment.end)
            rows.fence = fence
            buffers.append(self._pool.acquire_with(rows, piece.nbytes - piece.segment.end))
        block.release()
        return buffers

    def _copy(self, *arrays: Array) -> tuple[list[int], DeviceBlock, Buffer]:
        """Arrays on the device, in one block, and where each begins in it.

        The caller releases the block, and the memory that it is copied from.
        """
        ats, end = [], 0
        for array in arrays:
            ats.append(end)
            end += -(-array.nbytes // _ALIGN) * _ALIGN
        staging = self._pool.acquire(end)
        for array, at in zip(arrays, ats, strict=True):
            put_bytes(staging, at, array)
        return ats, self._pool.upload(staging), staging

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
        shares = [WorkerShare(0, 0, num_rows, np.array([[0, num_rows]], np.int32))]
        slots = np.zeros((num_rows, pairs), np.int32)
        index = np.zeros(num_rows, np.int32)
        pieces = expert_pieces(shares, width, wire)
        tables = slots, slots.astype(np.float32)
        buffers, outputs = self.fan_out(
            payload, segment, index, pieces, tables, EXPERT_OUT_ROWS[wire]
        )
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
        release_behind(self._seam, payload, *buffers)


def _taken(outputs: Sequence[Outputs]) -> list[DeviceBlock]:
    """What these hold, which the caller releases."""
    held = [block for o in outputs for block in o.held]
    for o in outputs:
        o.held = []
    return held


def _layout(pieces: Sequence[Piece]) -> tuple[Array, list[int], int]:
    """Pieces one behind the other: the kernel's table int64 [pieces, 4], the byte where each begins, bytes in all."""
    table, places, end = [], [], 0
    for piece in pieces:
        segment = piece.segment
        rows, scales = end + segment.rows_offset, end + segment.scales_offset
        table.append((piece.start, piece.stop - piece.start, rows, scales))
        places.append(end)
        end += -(-segment.end // _ALIGN) * _ALIGN
    return np.array(table, np.int64), places, end


def open_rows(pool: BufferPool, seam: Seam) -> Rows:
    """The memory that a process's buffers are in."""
    return RowsApart(pool, seam) if isinstance(pool, DevicePool) else HostRows(pool)
