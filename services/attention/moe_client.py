"""The attention worker's side of a MoE layer: post rows to the router, get combined rows back.

A block is kept in the outbox until its answer is in, and posted again when the router's link comes back; a router that
dies costs a delay, not a request. One future per block: the micro-batch awaits it once per layer.
"""

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from common.errors import AtollError, DeadlineExceeded, Retryable
from common.obs.trace import Recorder
from common.tensors import numbers, read_rows, rows_of
from common.transport.base import Link
from common.transport.buffers import Buffer, BufferPool
from common.transport.outbox import Outbox
from common.wire.blocks import RowType, dispatch_layout
from common.wire.header import Header, Kind, Wire
from kernels import ops

Tensor = torch.Tensor


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
    num_rows: int
    posted_ns: int


@dataclass(slots=True)
class MoeClient:
    """Blocks of one attention worker that are on their way. `width` is the model's hidden size."""

    worker: int
    width: int
    wire: Wire
    epoch: int
    pool: BufferPool
    deadline_s: float
    trace: Recorder | None = None
    clock_ns: Callable[[], int] = time.monotonic_ns
    times: HopTimes = field(default_factory=HopTimes)
    outbox: Outbox = field(default_factory=lambda: Outbox("the router"))
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

    def dispatch(
        self, layer: int, microbatch: int, rows: Tensor, experts: Tensor, weights: Tensor
    ) -> "asyncio.Future[Tensor]":
        """Post a block: rows [n, width], experts int32 [n, k], weights fp32 [n, k]; never waits.

        The future gets the combined rows, fp32 [n, width], or DeadlineExceeded / the sentence of whoever failed.
        """
        num_rows, top_k = experts.shape
        layout = dispatch_layout(num_rows, self.width, top_k, self.wire)
        buffer = self.pool.acquire(layout.nbytes)
        if self.wire is Wire.FP8:
            ops.quantise_rows(
                rows, torch.from_numpy(buffer.array),
                rows_offset=layout.rows.rows_offset, scales_offset=layout.rows.scales_offset,
            )  # fmt: skip
        else:
            rows_of(buffer, layout.rows).copy_(rows)
        count = num_rows * top_k
        numbers(buffer, layout.experts, count, np.int32)[:] = experts.numpy().ravel()
        numbers(buffer, layout.weights, count, np.float32)[:] = weights.numpy().ravel()
        block = self._next_block
        self._next_block += 1
        header = Header(
            Kind.DISPATCH, self.wire, 0, layer, self.epoch, self.width, block, block,
            num_rows, count, microbatch=microbatch, payload_nbytes=layout.nbytes,
        )  # fmt: skip
        now_ns = self.clock_ns()
        future: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self.outbox.send(header, buffer, now_ns)
        self._pending[block] = _Pending(future, num_rows, now_ns)
        return future

    def on_message(self, link: Link, header: Header, payload: Buffer | None) -> None:
        """Take an answer; one that nobody waits for is dropped."""
        try:
            pending = self._pending.get(header.block)
            if pending is None:
                self.times.late += 1
            elif header.kind is Kind.COMBINED:
                rows = read_rows(payload, pending.num_rows, self.width, RowType.FP32, "COMBINED")
                self._settle(header.block)
                self._count(header, pending)
                if not pending.future.done():
                    pending.future.set_result(rows.clone())
            else:
                text = b"" if payload is None else payload.array.tobytes()
                sentence = text.decode("utf-8", "replace")
                self._fail(header.block, Retryable(f"{link.peer.process}: {sentence}"))
        finally:
            if payload is not None:
                payload.release()

    def expire(self) -> None:
        """Fail the futures of blocks older than the deadline, naming layer and micro-batch."""
        for call in self.outbox.expired(self.clock_ns(), int(self.deadline_s * 1e9)):
            h = call.header
            self._fail(
                h.block,
                DeadlineExceeded(
                    f"no answer from {self.outbox.name} within {self.deadline_s:g} s "
                    f"(layer {h.layer}, micro-batch {h.microbatch}, attempt {h.attempt + 1})"
                ),
            )

    def _fail(self, block: int, error: AtollError) -> None:
        pending = self._settle(block)
        if pending is not None and not pending.future.done():
            pending.future.set_exception(error)

    def _settle(self, block: int) -> _Pending | None:
        self.outbox.settle(block)
        return self._pending.pop(block, None)

    def _count(self, header: Header, pending: _Pending) -> None:
        times, now = self.times, self.clock_ns()
        times.blocks += 1
        times.rows += pending.num_rows
        times.round_trip_us += (now - pending.posted_ns) // 1000
        if self.trace is not None:
            self.trace.span(
                "answer", header.trace, header.layer, header.microbatch, now, now, pending.num_rows
            )
        times.queue_us += header.queue_us
        times.compute_us += header.compute_us
        times.combine_us += header.combine_us
