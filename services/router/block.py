"""The two state machines of a router: a node's share of a block, and a block at its source.

    NodeWork    pairs of this node -> EXPERT_IN to each worker hit -> outputs gathered -> weighted sum per row
    SourceWork  one partial per node, side by side -> summed in ascending node order -> COMBINED

Neither sends anything nor looks at a clock: `services.router.dataflow` moves the messages.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from common.transport.base import Link
from common.transport.buffers import Buffer
from common.wire.blocks import RowSegment
from common.wire.header import Header, Landed
from kernels import ops
from kernels.reference.combine import OTHER
from services.router.plan import NodeShare, WorkerShare, side_by_side, sum_table
from services.router.routes import Routes
from services.router.rows import Outputs, sum_dtype
from services.router.tables import Tables

Tensor = torch.Tensor
Int32s = npt.NDArray[np.int32]


@dataclass(slots=True)
class Timing:
    """Where the time of a block went, in microseconds: its slowest expert, and the sums on the way back."""

    queue_us: int = 0
    compute_us: int = 0
    combine_us: int = 0

    def include(self, other: "Timing | Header | Landed") -> None:
        """Keep the part that waited and computed longest: the block cannot be done before it."""
        queue_us, compute_us = other.queue_us, other.compute_us
        if queue_us + compute_us >= self.queue_us + self.compute_us:
            self.queue_us, self.compute_us = queue_us, compute_us
        if other.combine_us > self.combine_us:
            self.combine_us = other.combine_us


@dataclass(slots=True)
class Prepared:
    """A node's sum that is an answer, prepared while experts compute: `launch` writes the rows of `buffer`."""

    buffer: Buffer
    launch: Callable[[], object]


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
    prepared: Prepared | None = None

    def put(self, call: int, payload: Buffer, segment: RowSegment) -> None:
        """Copy an answer to its places."""
        self.outputs.put(self.waiting[call].start, payload, segment)

    def arrived(self, call: int, answer: Header | Landed) -> bool:
        """An answer is in its places. True when it was the last."""
        del self.waiting[call]
        self.timing.include(answer)
        return not self.waiting

    def summing(self, out: Tensor) -> Callable[[], object]:
        """What sums: the weighted sum per row, [num_rows, width], in float64 when `out` is, else in fp32."""
        return ops.combining(self.outputs.rows, self.outputs.slots, self.outputs.weights, out)

    def exact(self) -> Tensor:
        """The weighted sum per row, float64 [num_rows, width]."""
        out = self.outputs.rows.new_empty((self.num_rows, self.request.width), dtype=torch.float64)
        self.summing(out)()
        return out


@dataclass(slots=True)
class SourceWork:
    """A block at the router of its attention worker: which nodes still owe their partial.

    `shares`, `starts` and `own` are by question (a node may be asked twice). `payload` is kept where a share may have
    to be asked of others, or says where the answer's rows go, else None. Partials of other nodes are in `outputs`, one
    behind the other (several where shares were asked anew: no place is given to a second answer), and the last says how
    all are summed; our own are in `own`, not rounded. `starts` are places of the sum, those from OTHER on in `own`.
    """

    request: Header
    origin: Link
    routes: Routes
    rows: RowSegment  # where the rows lie in the payload
    payload: Buffer | None = None
    shares: dict[int, NodeShare] = field(default_factory=dict)
    starts: dict[int, int] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    outputs: list[Outputs] = field(default_factory=list)
    own: dict[int, Tensor] = field(default_factory=dict)
    ids: Int32s = field(default_factory=lambda: np.empty(0, np.int32))  # rows that a partial has
    timing: Timing = field(default_factory=Timing)

    def place(self, calls: dict[int, NodeShare], home: int, *, some: bool) -> Int32s:
        """Give places to the partials of these shares; the table of the sum over all [num_rows, k].

        `home` is our node. With `some` the table is of the rows alone that any share has.
        """
        start = sum(len(outputs.rows) for outputs in self.outputs)
        own = OTHER + sum(len(rows) for rows in self.own.values())
        for call, share in calls.items():
            self.starts[call] = own if share.node == home else start
            start += len(share.rows) if share.node != home else 0
        order = sorted(self.shares, key=lambda call: (self.shares[call].node, call))
        rows, starts = zip(*((self.shares[c].rows, self.starts[c]) for c in order), strict=True)
        slots = sum_table(rows, list(starts), self.request.num_rows)
        if some:
            self.ids = (slots[:, 0] >= 0).nonzero()[0].astype(np.int32)
            slots = slots[self.ids]
        return slots

    def relays(
        self, calls: dict[int, NodeShare], home: int, *, some: bool
    ) -> tuple[dict[int, NodeShare], Tables]:
        """Those of `calls` that other nodes than `home` get, and the tables of their RELAYs; see `place`."""
        slots = self.place(calls, home, some=some)
        relays = {call: share for call, share in calls.items() if share.node != home}
        rows = [share.rows for share in relays.values()]
        return relays, side_by_side(rows, self.request.width, self.rows.row_type, slots)

    def add(self, outputs: Outputs, calls: dict[int, NodeShare], home: int) -> None:
        """Room for the partials of shares that have places; one of `home`, if there is one, is the last."""
        self.outputs.append(outputs)
        *_, (last, share) = calls.items()
        shape = len(share.rows) if share.node == home else 0, self.request.width
        self.own[last] = outputs.rows.new_empty(shape, dtype=sum_dtype(self.request.wire))

    def put(self, call: int, payload: Buffer, segment: RowSegment) -> None:
        """Copy a partial to its place."""
        start = self.starts[call]
        for outputs in self.outputs:
            if start < len(outputs.rows):
                outputs.put(start, payload, segment)
                return
            start -= len(outputs.rows)

    def arrived(self, call: int) -> bool:
        """A partial is in its place. True when it was the last one missing."""
        self.waiting.discard(call)
        return not self.waiting

    def sum_into(self, out: Tensor) -> None:
        """The partials' sum in ascending node order, rounded once, float64 partials summed in float64."""
        rows, own = [outputs.rows for outputs in self.outputs], list(self.own.values())
        ops.combine(_joined(rows), self.outputs[-1].slots, None, out, _joined(own))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


Work = NodeWork | SourceWork
