"""A router's sums and the answers that carry them: a node's share as PARTIAL, a block as COMBINED.

Of one rail the sum is the answer; of several each answers the rows that it knows of, and the attention worker adds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from common.tensors import put_bytes, rows_of, write_rows
from common.transport.buffers import Buffer, BufferPool
from common.wire.blocks import PARTIAL_ROWS, AnswerLayout, RowType, answer_layout
from common.wire.header import Header, Kind, Wire
from services.router.block import NodeWork, Prepared, SourceWork, Work
from services.router.counters import Counters
from services.router.rows import Outputs, Rows

if TYPE_CHECKING:
    from common.transport.device import DevicePool

Answer = tuple[Header, Buffer]


@dataclass(slots=True)
class Answers:
    """What `node` answers, from buffers of `pool`; sums are counted and timed."""

    node: int
    num_rails: int
    pool: BufferPool
    memory: Rows
    answer_rows: RowType  # of a COMBINED
    counters: Counters
    clock_ns: Callable[[], int]

    def prepare(self, work: NodeWork, asked: Buffer) -> None:
        """For a node's sum that is the answer to `asked`: straight into its message, or to where it is wanted.

        Its rows then wait for a launch only. They are rounded to what travels between nodes, or once.
        """
        of_router = work.request.kind is Kind.RELAY
        row_type = PARTIAL_ROWS[work.request.wire] if of_router else self.answer_rows
        layout = answer_layout(work.num_rows, work.request.width, row_type)
        buffer = self._buffer(layout, asked, [work.outputs])
        if work.request.wire is Wire.FP32 and row_type is not RowType.FP64:  # rounded once
            launch: Callable[[], object] = partial(_write_exact, buffer, layout, work)
        else:
            launch = work.summing(rows_of(buffer, layout.rows))
        work.prepared = Prepared(buffer, launch)

    def _buffer(self, layout: AnswerLayout, asked: Buffer | None, outputs: list[Outputs]) -> Buffer:
        """For an answer to the question `asked`, whose place for rows can be reached as long as that is held."""
        landing = None if asked is None else asked.landing
        if asked is None or landing is None or landing.nbytes != layout.nbytes:
            return self.pool.acquire(layout.nbytes, rows_nbytes=layout.rows.end)
        outputs[-1].held.append(asked.retain())
        return cast("DevicePool", self.pool).acquire_with(landing.retain())

    def of_node(self, work: NodeWork) -> Answer:
        """The node's sum: COMBINED where it is all of a block, PARTIAL to another router."""
        if work.request.kind is not Kind.RELAY:
            return self._node_sum(work, Kind.COMBINED)
        header, buffer = self._node_sum(work, Kind.PARTIAL)
        node, num_pairs = work.origin.peer.node, work.request.num_pairs
        self.counters.crossed(
            node,
            header.kind,
            header,
            header.num_rows,
            num_pairs,
            header.payload_nbytes,
            inward=False,
        )
        return header, buffer

    def share(self, source: SourceWork, work: NodeWork) -> None:
        """Sum our own share of a block, which is added to those of other nodes."""
        started = self.clock_ns()
        work.summing(source.own[work.key])()
        self.memory.release(work.outputs)
        self._spent(work, started)

    def combined(self, source: SourceWork) -> Answer:
        """COMBINED: the sum over nodes."""
        started = self.clock_ns()
        request, row_type = source.request, self.answer_rows
        num_rows, num_ids = request.num_rows, 0
        if self.num_rails > 1:  # the rows that this rail has pairs of; the attention worker rounds
            num_rows = num_ids = len(source.ids)
            row_type = RowType.FP64 if request.wire is Wire.FP32 else row_type
        layout = answer_layout(num_rows, request.width, row_type, num_ids)
        buffer = self._buffer(layout, source.payload, source.outputs)
        if num_rows:
            source.sum_into(rows_of(buffer, layout.rows))
            self.memory.written(buffer, *source.outputs)
        if num_ids:
            put_bytes(buffer, layout.ids, source.ids)
        self._spent(source, started)
        return self._header(source, Kind.COMBINED, buffer, num_rows, num_ids), buffer

    def _node_sum(self, work: NodeWork, kind: Kind) -> Answer:
        started = self.clock_ns()
        prepared, work.prepared = work.prepared, None
        assert prepared is not None, "a sum that is no answer"
        prepared.launch()
        self.memory.written(prepared.buffer, work.outputs)
        self._spent(work, started)
        return self._header(work, kind, prepared.buffer, work.num_rows), prepared.buffer

    def _header(
        self, item: Work, kind: Kind, buffer: Buffer, num_rows: int, num_ids: int = 0
    ) -> Header:
        """`num_ids` of the rows are named, 0: they are all rows of the request, in order."""
        header = item.request.derive(
            kind, target=self.node, num_rows=num_rows, num_pairs=num_ids,
            payload_nbytes=buffer.nbytes + buffer.rows_nbytes,
        )  # fmt: skip
        timing = item.timing
        header.queue_us, header.compute_us = timing.queue_us, timing.compute_us
        header.combine_us = timing.combine_us
        return header

    def _spent(self, item: Work, started_ns: int) -> None:
        elapsed_us = (self.clock_ns() - started_ns) // 1000
        item.timing.combine_us += elapsed_us
        self.counters.combine_us += elapsed_us


def _write_exact(buffer: Buffer, layout: AnswerLayout, work: NodeWork) -> None:
    write_rows(buffer, layout.rows, work.exact())
