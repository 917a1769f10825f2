"""Questions about a block that is all its node's leave before Python hears of the block (`ahead.c`): what that needs,
written down in advance, and what has left, to be kept like any other question.

Only where rows are handed on (`services.router.rows_apart`) and no expert of the layer has replicas. An *order* is
written when a block of a layer has come in the ordinary way; a *spare* is memory for the answers of one block, so of
blocks that come together the first goes ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common.transport
from common.compiled import compiled
from common.transport.buffers import BufferPool
from common.transport.device import DeviceBlock, DevicePool
from common.transport.volley import Ended
from common.wire.blocks import DISPATCH_ROWS
from common.wire.header import Header
from services.router.calls import Calls
from services.router.plan import FanOut, as_plan, row_sizes
from services.router.routes import Int32s, Routes
from services.router.rows import Outputs

_HEADERS = tuple(
    Path(common.transport.__file__).with_name(name) for name in ("answerer.h", "forwarder.h")
)
_compiled = compiled(Path(__file__).with_name("ahead.c"), headers=_HEADERS)


@dataclass(slots=True)
class Left:
    """What has left: questions `first` on, one for each share of the plan, whose answers go to `block`."""

    plan: FanOut
    first: int
    block: DeviceBlock
    answers: Sequence[int]  # numbers of their places; 0: this one has not left
    ends: Sequence[Ended]


class Ahead:
    """Of one router, whose questions are counted by `calls`; `pool` has memory for their answers."""

    def __init__(self, pool: DevicePool, calls: Calls) -> None:
        assert _compiled is not None, "no compiler"
        self._pool, self._calls = pool, calls
        self._orders: dict[int, tuple[Any, ...]] = {}  # by layer
        self._spare: tuple[int, DeviceBlock, tuple[Ended, ...]] | None = None
        self._ahead: Any = _compiled.Ahead(self._orders, self._abandoned)

    @property
    def forwarder(self) -> object:
        """For `Transport.forward_with`."""
        return self._ahead.capsule()

    def take(self, request: Header, table: Int32s) -> Left | None:
        """What has left about a block, for the caller to keep; None: ask about it, of `table` [num_experts]."""
        found = self._ahead.take()
        if found is None:
            return None
        order, divided, answers = found
        plan = as_plan(divided, request.num_pairs, request.num_rows)
        workers, links, experts = order[-3], order[-1], self._calls.experts
        hit = [share.worker for share in plan.shares]
        # other workers compute it, or another link has taken the place of one
        if workers != table.tobytes() or any(experts[w].link is not links[w] for w in hit):
            self._abandoned(found)
            return None
        assert self._spare is not None, "asked without a spare"
        (first, block, ends), self._spare = self._spare, None
        return Left(plan, first, block, answers, ends)

    def learn(
        self, request: Header, routes: Routes, table: Int32s, outputs: Outputs, left: Left | None
    ) -> None:
        """A block was asked about, by `table` [num_experts], and has `outputs`: the next like it may go ahead.

        One that has `left` did already, and there is a new spare to provide.
        """
        layer, block = request.layer, outputs.block
        if left is not None:
            self.provide(left.block)
            return
        if block is None or not outputs.landing_nbytes or routes.has_replicas(layer):
            return
        experts = self._calls.experts
        links = (
            *(experts[w].link if w in experts else None for w in range(len(self._calls.nodes))),
        )
        order, workers = self._orders.get(layer), table.tobytes()
        if order is None or (order[0], order[-3], order[-1]) != (request.epoch, workers, links):
            sizes = row_sizes(request.width, DISPATCH_ROWS[request.wire])
            counts = tuple(None if link is None else link.counts for link in links)
            self._orders[layer] = (
                request.epoch, int(request.wire), request.width, *sizes, outputs.row_nbytes, workers, counts,
                links,
            )  # fmt: skip
        self.provide(block)

    def provide(self, like: DeviceBlock) -> None:
        """A spare as large as that memory, which neighbours reach, unless there is one."""
        if self._spare is not None and self._spare[1].capacity >= like.capacity:
            return
        links = [o.link for o in self._calls.experts.values() if o.link is not None]
        self.close()
        block = self._pool.take(like.capacity)
        shared = links[0].share(block) if links else None
        if shared is None:
            block.release()
            return
        ends = tuple(Ended() for _ in self._calls.experts)
        first = self._calls.numbers(len(ends))
        self._spare = first, block, ends
        self._ahead.provide(first, block.address, block.capacity, shared, ends)

    def close(self) -> None:
        """Give the spare back."""
        if self._spare is not None:
            self._ahead.provide(0, 0, 0, None, ())
            self._spare[1].release()
            self._spare = None

    def _abandoned(self, found: tuple[tuple[Any, ...], tuple[Any, ...], list[int]]) -> None:
        """Nobody waits for what has left: answers find their places, which are kept for them, and no question."""
        order, divided, answers = found
        assert self._spare is not None, "asked without a spare"
        (_, block, ends), self._spare = self._spare, None
        row_nbytes, links = order[5], order[-1]
        for (share, _), answer, ended in zip(divided[3], answers, ends, strict=False):
            worker, start, stop, *_ = share
            if answer:
                landing = block.rows(start * row_nbytes, (stop - start) * row_nbytes)
                links[worker].forwarded(landing, answer, ended, None)
                landing.release()
        block.release()


def open_ahead(pool: BufferPool, calls: Calls) -> Ahead | None:
    """None where rows do not lie apart, or there is no compiler."""
    return Ahead(pool, calls) if isinstance(pool, DevicePool) and _compiled is not None else None
