"""Rows of blocks on their way through a router, and where outputs lie on the way back.

In host memory rows are copied into their messages at once; `services.router.rows_apart` is for those in device memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from common.tensors import TORCH_DTYPES, RowPick, rows_of
from common.transport.buffers import Buffer, BufferPool
from common.transport.device import DeviceBlock
from common.transport.outbox import Call, Message, Outbox
from common.transport.seam import Fence
from common.wire.blocks import (
    DISPATCH_ROWS,
    RowSegment,
    RowType,
    row_segment,
)
from common.wire.header import HEADER_NBYTES, Header, Kind, Wire
from services.router.plan import WorkerShare
from services.router.tables import Piece, Tables, tables_of

if TYPE_CHECKING:
    from services.router.ahead import Left

Tensor = torch.Tensor


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
    held: list[DeviceBlock | Buffer] = field(default_factory=list)
    block: DeviceBlock | None = None  # of those, what `rows` are in
    bytes: memoryview | None = None  # of `rows` in host memory
    read: Fence | None = None  # behind the sum, once that is launched

    @property
    def landing_nbytes(self) -> int:
        """Bytes of an answer for each of its rows; 0 where it cannot come here by itself."""
        # else an answer is longer than its rows
        return self.row_nbytes if self.block is not None and self.row_nbytes % 16 == 0 else 0

    def put(self, start: int, payload: Buffer, segment: RowSegment) -> None:
        """Copy an answer, all of `payload`, to the places from `start` on."""
        num_rows = segment.num_rows
        if self.bytes is None:
            self.rows[start : start + num_rows].copy_(rows_of(payload, segment))
            return
        first, nbytes = start * self.row_nbytes, num_rows * self.row_nbytes
        self.bytes[first : first + nbytes] = payload.view[HEADER_NBYTES : HEADER_NBYTES + nbytes]


Ask = tuple[int, int, int, bytes, Piece, int]
"""A message of those: (number, target, pairs, what follows its rows in the payload, the piece that these are, the place
of `outputs` from which on the rows of its answer go)"""


class Gathered(Protocol):
    """The rows of all messages of one kind about a request."""

    def ask(
        self, outboxes: Sequence[Outbox], asks: Sequence[Ask], outputs: Outputs, now_ns: int
    ) -> None:
        """Send each message to its target, whose outbox keeps it. Raises Overloaded; the rest is not kept then."""
        ...

    def leave(self) -> None:
        """All is asked, or will not be."""
        ...


class Rows(Protocol):
    """The memory of one kind."""

    def handed_on(self, payload: Buffer, segment: RowSegment) -> int:
        """How many rows there are to pick from, where `fan_out` tells experts where they lie; 0: it gathers them."""
        ...

    def gather(
        self, payload: Buffer, segment: RowSegment, tables: Tables, request: Header, kind: Kind
    ) -> Gathered:
        """Row index[place] of `segment` at each place, for messages of `kind` about `request`."""
        ...

    def fan_out(
        self, payload: Buffer, segment: RowSegment, tables: Tables, request: Header, kind: Kind, row_type: RowType,
        left: "Left | None" = None,
    ) -> tuple[Gathered, Outputs]:  # fmt: skip
        """`gather`, and room for the answers in `row_type`, a place for each of the rows.

        Of rows that are handed on questions may have `left` already.
        """
        ...

    def written(self, buffer: Buffer, *outputs: Outputs) -> None:
        """What was launched so far reads `outputs` and writes the rows of `buffer`, which leave when it is done."""
        ...

    def release(self, *outputs: Outputs) -> None:
        """The sum over these outputs was launched, or is not wanted any more; what waits for it goes first."""
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

    def ask(
        self, outboxes: Sequence[Outbox], asks: Sequence[Ask], outputs: Outputs, now_ns: int
    ) -> None:
        for outbox, (number, target, num_pairs, tail, (start, stop, _, nbytes), _) in zip(
            outboxes, asks, strict=True
        ):
            buffer = self.pool.acquire(nbytes + len(tail))
            segment = row_segment(stop - start, self.segment.width, self.segment.row_type)
            self.rows.copy_to(buffer, segment, start, stop)
            buffer.view[HEADER_NBYTES + nbytes : HEADER_NBYTES + buffer.nbytes] = tail
            header = self.request.derive(
                self.kind, target=target, num_rows=stop - start, num_pairs=num_pairs,
                payload_nbytes=buffer.nbytes,
            )  # fmt: skip
            header.block = number
            outbox.send(Message(header, buffer, now_ns))

    def leave(self) -> None:
        pass


class HostRows:
    """Rows in host memory: they travel inside their messages."""

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool

    def handed_on(self, payload: Buffer, segment: RowSegment) -> int:
        return 0

    def gather(
        self, payload: Buffer, segment: RowSegment, tables: Tables, request: Header, kind: Kind
    ) -> Gathered:
        picked = RowPick(payload, segment, tables.index)
        return _Picked(self._pool, picked, segment, request, kind)

    def fan_out(
        self, payload: Buffer, segment: RowSegment, tables: Tables, request: Header, kind: Kind, row_type: RowType,
        left: "Left | None" = None,
    ) -> tuple[Gathered, Outputs]:  # fmt: skip
        assert left is None, "nothing is handed on"
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


def rows_again(
    memory: Rows, request: Header, asked: Call, old: WorkerShare, parts: Sequence[WorkerShare]
) -> tuple[list[Piece], Gathered]:
    """The rows of an EXPERT_IN that was asked of `old`, for others."""
    row_type = DISPATCH_ROWS[request.wire]
    spans = [(part.start - old.start, part.stop - old.start) for part in parts]
    tables = tables_of(np.arange(asked.num_rows), spans, request.width, row_type)
    segment = row_segment(asked.num_rows, request.width, row_type)
    return tables.pieces, memory.gather(asked.payload, segment, tables, request, Kind.EXPERT_IN)
