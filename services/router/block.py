"""The two state machines of a router: a node's share of a block, and a block at its source.

    NodeWork    pairs of this node -> EXPERT_IN to each worker hit -> outputs gathered -> weighted sum per row
    SourceWork  one partial per node -> summed in ascending node order -> COMBINED

Neither sends anything nor looks at a clock: `services.router.dataflow` moves the messages.
"""

from dataclasses import dataclass, field

import torch

from common.transport.base import Link
from common.wire.header import Header
from services.router.plan import Int32s, Ints, NodeShare, WorkerShare, row_steps

Tensor = torch.Tensor


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

    `outputs` is [num_pairs, width] in pair order, filled at each EXPERT_OUT; the sum waits for the last one, so the
    order of arrival cannot matter.
    """

    request: Header  # the DISPATCH or RELAY that brought the rows
    origin: Link  # who sent it and gets the answer
    num_rows: int
    pair_rows: Int32s  # [num_pairs], ascending
    weights: Tensor  # fp32 [num_pairs]
    outputs: Tensor
    waiting: dict[int, WorkerShare] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)

    def arrived(self, worker: int, header: Header, rows: Tensor) -> bool:
        """Take the outputs of one worker, [num_rows, width]. True when it was the last one missing."""
        share = self.waiting.pop(worker)
        self.outputs[torch.from_numpy(share.pairs)] = rows
        self.timing.include(header)
        return not self.waiting

    def partial(self, *, exact: bool) -> Tensor:
        """The weighted sum per row: float64 [num_rows, width] when exact, else fp32."""
        return weighted_sum(
            self.outputs, self.weights, row_steps(self.pair_rows), self.num_rows, exact=exact
        )


@dataclass(slots=True)
class SourceWork:
    """A block at the router of its attention worker: which nodes still owe their partial."""

    request: Header
    origin: Link
    shares: dict[int, NodeShare]
    partials: dict[int, Tensor] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)

    def arrived(self, node: int, partial: Tensor) -> bool:
        """Take one node's partial. True when it was the last one missing."""
        self.partials[node] = partial
        return len(self.partials) == len(self.shares)

    def combined(self, *, exact: bool) -> Tensor:
        """Sum of the node partials in ascending node order: fp32 [num_rows, width], rounded once when exact."""
        width = self.request.width
        dtype = torch.float64 if exact else torch.float32
        total = torch.zeros((self.request.num_rows, width), dtype=dtype)
        for node in sorted(self.partials):
            rows = torch.from_numpy(self.shares[node].rows)
            total[rows] += self.partials[node].to(dtype)
        return total.to(torch.float32)


def weighted_sum(
    outputs: Tensor, weights: Tensor, steps: list[tuple[Ints, Ints]], num_rows: int, *, exact: bool
) -> Tensor:
    """Sum of weight * output over each row's pairs, in the order of `steps`: [num_rows, width].

    Products and sums are float64 when exact, else fp32: regrouping by node then costs no bit of the rounded result.
    """
    dtype = torch.float64 if exact else torch.float32
    total = torch.zeros((num_rows, outputs.shape[1]), dtype=dtype)
    terms = outputs.to(dtype) * weights.to(dtype)[:, None]
    for rows, pairs in steps:
        total[torch.from_numpy(rows)] += terms[torch.from_numpy(pairs)]
    return total
