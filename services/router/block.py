"""The two state machines of a router: a node's share of a block, and a block at its source.

    NodeWork    pairs of this node -> EXPERT_IN to each worker hit -> outputs gathered -> weighted sum per row
    SourceWork  one partial per node -> summed in ascending node order -> COMBINED

Neither sends anything nor looks at a clock: `services.router.dataflow` moves the messages.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from common.transport.base import Link
from common.transport.buffers import Buffer
from common.wire.blocks import RowSegment
from common.wire.header import Header
from kernels import ops
from services.router.plan import NodeShare, WorkerShare
from services.router.routes import Routes
from services.router.rows import Outputs, Rows

Tensor = torch.Tensor
Int32s = npt.NDArray[np.int32]
NO_ROWS = np.empty(0, np.int64)


@dataclass(slots=True)
class Timing:
    """Where the time of a block went, in microseconds: its slowest expert, and the sums on the way back."""

    queue_us: int = 0
    compute_us: int = 0
    combine_us: int = 0

    def include(self, other: "Timing | Header") -> None:
        """Keep the part that waited and computed longest: the block cannot be done before it."""
        if other.queue_us + other.compute_us >= self.queue_us + self.compute_us:
            self.queue_us, self.compute_us = other.queue_us, other.compute_us
        self.combine_us = max(self.combine_us, other.combine_us)


@dataclass(slots=True)
class NodeWork:
    """This node's pairs of one block, their expert outputs as they come, and who is still missing.

    `outputs` is filled at each EXPERT_OUT; the sum waits for the last one, so the order of arrival cannot matter.
    """

    key: int  # the RELAY's question, or our own about our share of a DISPATCH
    request: Header  # the DISPATCH or RELAY that brought the rows
    origin: Link  # who sent it and gets the answer
    routes: Routes  # of the request's epoch
    num_rows: int
    outputs: Outputs  # in places of the fan-out
    waiting: dict[int, WorkerShare] = field(default_factory=dict)  # by question
    timing: Timing = field(default_factory=Timing)

    def arrived(
        self, call: int, header: Header, payload: Buffer | None, segment: RowSegment
    ) -> bool:
        """Take the answer to a question, the rows of `segment`, None: they are in place. True when it was the last."""
        share = self.waiting.pop(call)
        if payload is not None:
            self.outputs.put(share.start, payload, segment)
        self.timing.include(header)
        return not self.waiting

    def sum_into(self, out: Tensor) -> None:
        """The weighted sum per row, [num_rows, width]: products and sums in float64 when `out` is, else in fp32."""
        ops.combine(self.outputs.rows, self.outputs.slots, self.outputs.weights, out)

    def partial(self, *, exact: bool) -> Tensor:
        """The weighted sum per row: float64 [num_rows, width] when exact, else fp32."""
        rows = self.outputs.rows
        out = torch.empty(
            (self.num_rows, rows.shape[1]),
            dtype=torch.float64 if exact else torch.float32,
            device=rows.device,
        )
        self.sum_into(out)
        return out


@dataclass(slots=True)
class SourceWork:
    """A block at the router of its attention worker: which nodes still owe their partial.

    `shares` and `partials` are by question (a node may be asked twice). `payload` is kept where a share may have to be
    asked of others, else None.
    """

    request: Header
    origin: Link
    routes: Routes
    rows: RowSegment  # where the rows lie in the payload
    payload: Buffer | None = None
    shares: dict[int, NodeShare] = field(default_factory=dict)
    partials: dict[int, Tensor] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)

    def arrived(self, call: int, partial: Tensor) -> bool:
        """Take one partial. True when it was the last one missing."""
        self.partials[call] = partial
        return len(self.partials) == len(self.shares)

    def combined(self, memory: Rows) -> Tensor:
        """Sum of the node partials in ascending node order: fp32 [num_rows, width], rounded once when exact."""
        calls = self._in_order()
        partials = [self.partials[call] for call in calls]
        out = torch.empty((self.request.num_rows, self.request.width), device=partials[0].device)
        rows = [memory.upload(self.shares[call].rows) for call in calls]
        ops.sum_partials(partials, rows, out)
        return out

    def partial(self, memory: Rows, *, exact: bool) -> tuple[Tensor, Int32s]:
        """What this rail knows of the block: sums of its nodes' partials, ascending, and the ids of their rows.

        float64 when exact, so that the attention worker rounds once; no row where no pair was this rail's.
        """
        calls = self._in_order()
        ids = np.unique(np.concatenate([NO_ROWS, *(self.shares[call].rows for call in calls)]))
        out = torch.empty(
            (len(ids), self.request.width),
            dtype=torch.float64 if exact else torch.float32,
            device=self.partials[calls[0]].device if calls else None,
        )
        rows = [memory.upload(ids.searchsorted(self.shares[call].rows)) for call in calls]
        ops.sum_partials([self.partials[call] for call in calls], rows, out)
        return out, ids.astype(np.int32)

    def _in_order(self) -> list[int]:
        return sorted(self.partials, key=lambda call: (self.shares[call].node, call))


Work = NodeWork | SourceWork
