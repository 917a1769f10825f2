"""What a router asks of its node's experts and of other nodes' routers, what they owe, and who of them can be asked.

Every question has a number of its own (the header's `block` on that hop), so that one block may be asked of the same
peer twice, as happens when a share is asked anew after a worker died. Decides nothing: whom to ask is
`services.router.routes`, what becomes of an answer `services.router.dataflow`.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from common.transport.base import Hello
from common.transport.outbox import Call, Outbox
from common.wire.header import Header, Kind, Landed
from services.router.block import Int32s, NodeWork, SourceWork, Work
from services.router.counters import Counters
from services.router.plan import NodeShare, WorkerShare
from services.router.routes import Fleet
from services.router.rows import Gathered
from services.router.tables import Piece

# More for another router, which watches its own experts and knows better who owes what.
_PATIENCE_S = 0.5
_ROUTER = 0x8000  # tells a router's numbers from an attention worker's


@dataclass(slots=True)
class Calls:
    """Open questions of router `index`; `nodes[worker]` is the plan's."""

    index: int
    nodes: tuple[int, ...]
    experts: dict[int, Outbox]  # by worker: those of this node
    routers: dict[int, Outbox]  # by node
    counters: Counters
    fleet: Fleet = field(init=False)
    works: dict[int, NodeWork] = field(default_factory=dict)  # by question to an expert: who asked
    sources: dict[int, SourceWork] = field(default_factory=dict)  # by share of a source
    # by question to a router: rows by worker
    _loads: dict[int, dict[int, int]] = field(default_factory=dict)
    _down: dict[int, frozenset[int]] = field(default_factory=dict)  # by node: workers it has lost
    _next: int = 0

    def __post_init__(self) -> None:
        self.fleet = Fleet.of(len(self.nodes))
        # an answer meant for a predecessor must find no question
        incarnation = int.from_bytes(os.urandom(2), "little")
        self._next = (_ROUTER | self.index) << 48 | incarnation << 32
        self.look()

    def number(self) -> int:
        """A new question's."""
        return self.numbers(1)

    def numbers(self, num: int) -> int:
        """The first of so many in a row."""
        first = self._next + 1
        self._next += num
        return first

    # ---- who can be asked ----------------------------------------------------------------------

    def look(self) -> bool:
        """Read from the links who is alive; True when that changed."""
        before = self.fleet.alive.copy()
        for worker, node in enumerate(self.nodes):
            if worker in self.experts:
                self.fleet.alive[worker] = self.experts[worker].link is not None
            else:
                router = self.routers.get(node)
                reachable = router is not None and router.link is not None
                self.fleet.alive[worker] = reachable and worker not in self._down.get(node, ())
        return bool((before != self.fleet.alive).any())

    def lost_at(self, node: int, workers: Iterable[int]) -> bool:
        """The router of `node` says which of its workers it cannot reach; True when that changed anything."""
        self._down[node] = frozenset(workers)
        return self.look()

    # ---- asking --------------------------------------------------------------------------------

    def ask_experts(
        self, work: NodeWork, shares: Sequence[WorkerShare], pieces: Sequence[Piece], gathered: Gathered,
        now_ns: int, first: int = 0,
    ) -> None:  # fmt: skip
        """Post a question for each share, whose rows are its piece of those gathered. Raises Overloaded.

        `first` is the number of the first if they have numbers already.
        """
        asks, outboxes = [], []
        for call, (share, piece) in enumerate(
            zip(shares, pieces, strict=True), first or self.numbers(len(shares))
        ):
            asks.append((call, share.worker, share.num_segments, share.tail, piece, share.start))
            outboxes.append(self.experts[share.worker])
        try:
            gathered.ask(outboxes, asks, work.outputs, now_ns)
        finally:
            waiting, works, fleet = work.waiting, self.works, self.fleet
            num_messages = num_rows = nbytes = 0
            for share, (call, worker, _, tail, piece, start), outbox in zip(
                shares, asks, outboxes, strict=True
            ):
                if outbox.owed(call) is not None:
                    waiting[call], works[call] = share, work
                    fleet.ask(worker, share.stop - start)
                    num_messages += 1
                    num_rows += share.stop - start
                    nbytes += piece[3] + len(tail)
            gathered.leave()
            self.counters.asked(work.request.layer, num_messages, nbytes)
            self.counters.rows_to_experts += num_rows

    def ask_routers(
        self, source: SourceWork, shares: dict[int, NodeShare], pieces: Sequence[Piece], gathered: Gathered,
        table: Int32s, now_ns: int,
    ) -> None:  # fmt: skip
        """Post the RELAY of each share, by question. Raises Overloaded.

        `table` is the choice of workers, whose load is counted where there are replicas.
        """
        request, outputs, nbytes = source.request, source.outputs[-1], 0
        asks, outboxes = [], []
        for (call, share), piece in zip(shares.items(), pieces, strict=True):
            tail, num_pairs, node = share.tail, share.num_pairs, share.node
            if source.routes.has_replicas(request.layer):
                workers, counts = np.unique(table[share.experts], return_counts=True)
                load = dict(zip(workers.tolist(), counts.tolist(), strict=True))
                self._loads[call] = load
                for worker, num_rows in load.items():
                    self.fleet.ask(worker, num_rows)
            size = piece[3] + len(tail)
            nbytes += size
            self.counters.crossed(
                node, Kind.RELAY, request, len(share.rows), num_pairs, size, inward=False
            )
            asks.append((call, node, num_pairs, tail, piece, piece[0]))
            outboxes.append(self.routers[node])
        try:
            gathered.ask(outboxes, asks, outputs, now_ns)
        finally:
            gathered.leave()
            self.counters.asked(request.layer, len(asks), nbytes)

    def overdue(self, now_ns: int, limit_s: float) -> Iterator[tuple[int, str]]:
        """Questions that a peer has owed for longer than `limit_s`, and the sentence that says who."""
        limits = [(outbox, limit_s) for outbox in self.experts.values()]
        limits += [(outbox, limit_s + _PATIENCE_S) for outbox in self.routers.values()]
        for outbox, limit in limits:
            for call in outbox.expired(now_ns, int(limit * 1e9)):
                h = call.header
                yield (
                    h.block,
                    (
                        f"no answer from {outbox.name} within {limit:g} s "
                        f"(layer {h.layer}, micro-batch {h.microbatch}, attempt {h.attempt + 1})"
                    ),
                )

    # ---- answers -------------------------------------------------------------------------------

    def question(self, peer: Hello, answer: Header | Landed) -> tuple[Call, Work] | None:
        """What was asked, and about what; None, and counted, when nobody waits for the answer any more."""
        call, is_expert_s = answer.block, answer.kind == Kind.EXPERT_OUT
        item: Work | None = (self.works if is_expert_s else self.sources).get(call)
        outbox = self.experts[peer.process.index] if is_expert_s else self.routers[peer.node]
        owed = outbox.owed(call)
        if owed is None or item is None:
            self.counters.late += 1
            return None
        return owed, item

    def settle_expert(self, worker: int, call: int) -> bool:
        """The worker's answer is good, or no longer wanted. False when nothing was owed."""
        asked = self.experts[worker].settle(call)
        if asked is not None:
            self._settled_expert(worker, call, asked.num_rows)
        return asked is not None

    def settle_router(self, node: int, call: int) -> bool:
        """The same for the router of another node."""
        for worker, num_rows in self._loads.pop(call, {}).items():
            self.fleet.outstanding[worker] -= num_rows
        self.sources.pop(call, None)
        return self.routers[node].settle(call) is not None

    def _settled_expert(self, worker: int, call: int, num_rows: int) -> None:
        self.works.pop(call, None)
        self.fleet.outstanding[worker] -= num_rows
