"""A router's rows in the memory of a device: each message's travel apart from it.

Rows that lie in a neighbour's memory are handed on to experts of this host without touching them: a message says where
the block is and which of its rows it asks about (EXPERT_PICK); one that goes by itself has them gathered. Otherwise one
kernel gathers the rows of every message of a block into one stretch, of which each message has its piece; the pieces
leave when the kernel is done. Outputs land side by side, where the weighted sum reads them. Tables are read from pinned
memory; a kernel that gathers takes those of the sum along.
"""

from collections.abc import Sequence

import numpy as np
import torch

from common.tensors import TORCH_DTYPES, check_rows_apart, storage_of
from common.transport.buffers import Buffer, BufferPool
from common.transport.device import DeviceBlock, DevicePool, DeviceRows, release_behind
from common.transport.outbox import Outbox
from common.transport.seam import WRITTEN, Seam
from common.transport.volley import Part, Question, Volley
from common.wire.blocks import (
    DISPATCH_ROWS,
    EXPERT_OUT_ROWS,
    PARTIAL_ROWS,
    RowSegment,
    RowType,
    align,
    num_scales,
    row_segment,
)
from common.wire.header import HEADER_NBYTES, Header, Kind, Wire
from kernels import ops
from services.router.ahead import Left
from services.router.rows import Ask, Gathered, HostRows, Outputs, Rows, sum_dtype
from services.router.tables import ALIGN, Tables, tables_of

Tensor = torch.Tensor
_MOST_WARMED = 8  # pairs of a row, as top-k is in most models
_MOST_VIEWS = 256  # of tables
_NO_SLOTS = torch.empty((0, 0), dtype=torch.int32)  # of outputs whose tables are still to come


class _Pieces(Volley):
    """Rows gathered: each message has its piece of the block."""

    __slots__ = ()
    whole: tuple[int, int] | None = None  # or every message all of it: place and bytes

    def ask(
        self, outboxes: Sequence[Outbox], asks: Sequence[Ask], outputs: Outputs, now_ns: int
    ) -> None:
        self.landings, wanted, whole = outputs.block, outputs.landing_nbytes, self.whole
        questions = [
            (
                number, target, stop - start, pairs, *(whole or (place, nbytes)), tail, first * wanted,
                (stop - start) * wanted,
            )
            for number, target, pairs, tail, (start, stop, place, nbytes), first in asks
        ]  # fmt: skip
        self.post(outboxes, questions, now_ns)


class _HandedOn(_Pieces):
    """Rows in a neighbour's memory, for experts that read them there: what follows them says which."""

    __slots__ = ("left", "memory", "outputs", "segment", "source", "tables", "whole")

    def __init__(
        self, memory: "RowsApart", source: DeviceRows, segment: RowSegment, request: Header, outputs: Outputs,
        tables: Tables, left: Left | None,
    ) -> None:  # fmt: skip
        """`tables` are for the sum of the `outputs`, which get them when all is asked: experts do not wait for that."""
        super().__init__(request, Kind.EXPERT_PICK, memory.pool, source.block.retain(), WRITTEN)
        self.memory, self.source, self.segment = memory, source, segment
        self.outputs, self.tables = outputs, tables
        self.whole = source.offset, source.nbytes
        self.left = left

    def post(
        self, outboxes: Sequence[Outbox], questions: Sequence[Question], since_ns: int
    ) -> None:
        if self.left is None:
            super().post(outboxes, questions, since_ns)
        else:
            sent = list(zip(self.left.answers, self.left.ends, strict=False))
            self.keep(outboxes, questions, sent, since_ns)

    def leave(self) -> None:
        self.memory.bring_tables(self.outputs, self.tables)
        super().leave()

    @property
    def kind_alone(self) -> Kind:
        return Kind.EXPERT_IN

    def alone(self, part: Part) -> tuple[DeviceRows, bytes]:
        """Gathered for it."""
        end, segment = align(8 * part.num_pairs), self.segment  # of what an EXPERT_IN has
        index = np.frombuffer(part.tail, np.int32, part.num_rows, end + 4)
        tables = tables_of(index, [(0, part.num_rows)], segment.width, segment.row_type)
        gathered = self.memory.gathered(self.source, segment, tables, self.request, Kind.EXPERT_IN)
        rows = gathered.block.rows(0, tables.pieces[0][3])
        rows.fence = gathered.fence
        gathered.leave()
        return rows, part.tail[:end]


class RowsApart:
    """The memory of a device."""

    def __init__(self, pool: DevicePool, seam: Seam) -> None:
        self.pool = pool
        self._seam = seam
        self._known: dict[tuple[int, tuple[int, int], int], tuple[Tensor, Tensor]] = {}

    def handed_on(self, payload: Buffer, segment: RowSegment) -> int:
        is_offered = payload.rows is not None and payload.rows.block.offer
        return segment.num_rows if is_offered and self.pool.hands_on else 0

    def gather(
        self, payload: Buffer, segment: RowSegment, tables: Tables, request: Header, kind: Kind
    ) -> Gathered:
        source = check_rows_apart("a block", payload, segment)
        return self.gathered(source, segment, tables, request, kind)

    def fan_out(
        self, payload: Buffer, segment: RowSegment, tables: Tables, request: Header, kind: Kind, row_type: RowType,
        left: Left | None = None,
    ) -> tuple[Gathered, Outputs]:  # fmt: skip
        source = check_rows_apart("a block", payload, segment)
        if left is not None or (kind is Kind.EXPERT_IN and self.handed_on(payload, segment)):
            return self._hand_on(source, segment, tables, request, row_type, left)
        row_nbytes, (_, _, slots_at, weights_at) = segment.width * int(row_type), tables.ats
        # the sum's tables lie behind the rows
        end = -(-tables.num_places * row_nbytes // ALIGN) * ALIGN
        block = self.pool.take(end + len(tables.memory) - slots_at)
        gathered = self.gathered(source, segment, tables, request, kind, block, end)
        rows = block.matrix(TORCH_DTYPES[row_type], 0, tables.num_places, segment.width)
        slots, weights = block.matrix(torch.int32, end, *tables.shape), None
        if tables.weighted:
            weights = block.matrix(torch.float32, end + weights_at - slots_at, *tables.shape)
        return gathered, Outputs(rows, slots, weights, row_nbytes, [block], block)

    def _hand_on(
        self, source: DeviceRows, segment: RowSegment, tables: Tables, request: Header, row_type: RowType,
        left: Left | None,
    ) -> tuple[Gathered, Outputs]:  # fmt: skip
        """Nothing is launched, and nothing written yet."""
        row_nbytes = segment.width * int(row_type)
        block = self.pool.take(tables.num_places * row_nbytes) if left is None else left.block
        rows = block.matrix(TORCH_DTYPES[row_type], 0, tables.num_places, segment.width)
        outputs = Outputs(rows, _NO_SLOTS, None, row_nbytes, [block], block)
        return _HandedOn(self, source, segment, request, outputs, tables, left), outputs

    def bring_tables(self, outputs: Outputs, tables: Tables) -> None:
        """Into pinned memory, where the sum reads them."""
        _, _, slots_at, weights_at = tables.ats
        nbytes = len(tables.memory) - slots_at
        staging = self.pool.acquire(nbytes)
        staging.view[HEADER_NBYTES : HEADER_NBYTES + nbytes] = memoryview(tables.memory)[slots_at:]
        views = self._views(staging, tables.shape, weights_at - slots_at)
        outputs.slots, outputs.weights = views
        outputs.held.append(staging)

    def _views(
        self, staging: Buffer, shape: tuple[int, int], weights_at: int
    ) -> tuple[Tensor, Tensor]:
        """Slots int32 and weights fp32, `weights_at` bytes further; the same for the same memory, which they keep."""
        key = staging.address, shape, weights_at
        views = self._known.get(key)
        if views is None:
            memory, nbytes = storage_of(staging)[HEADER_NBYTES:], 4 * shape[0] * shape[1]
            slots, weights = memory[:nbytes], memory[weights_at : weights_at + nbytes]
            views = slots.view(torch.int32).view(shape), weights.view(torch.float32).view(shape)
            if len(self._known) == _MOST_VIEWS:
                self._known.clear()
            self._known[key] = views
        return views

    def gathered(
        self, source: DeviceRows, segment: RowSegment, tables: Tables, request: Header, kind: Kind,
        outputs: DeviceBlock | None = None, rest_at: int = 0,
    ) -> _Pieces:  # fmt: skip
        """`source` are a payload's rows; the tables of the sum go to byte `rest_at` of `outputs`."""
        is_fp8 = segment.row_type is RowType.FP8
        staging, block = self.pool.acquire(len(tables.memory)), self.pool.take(tables.nbytes)
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
        fence = release_behind(self._seam, source.retain(), staging)
        return _Pieces(request, kind, self.pool, block, fence)

    def written(self, buffer: Buffer, *outputs: Outputs) -> None:
        assert buffer.rows is not None, "an answer without rows apart"
        buffer.rows.fence = fence = self._seam.fence()
        for o in outputs:
            o.read = fence

    def release(self, *outputs: Outputs) -> None:
        for o in outputs:
            held, o.held = o.held, []
            if held:
                fence = o.read or self._seam.fence()
                for item in held:
                    fence.then(item.release)

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
        payload = self.pool.acquire(segment.end, rows_nbytes=segment.end)
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


def open_rows(pool: BufferPool, seam: Seam) -> Rows:
    """The memory that a process's buffers are in."""
    return RowsApart(pool, seam) if isinstance(pool, DevicePool) else HostRows(pool)
