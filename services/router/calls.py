"""What a router asks of its node's experts and of other nodes' routers, what they owe, and who of them can be asked.

Every question has a number of its own (the header's `block` on that hop), so that one block may be asked of the same
peer twice, as happens when a share is asked anew after a worker died. Decides nothing: whom to ask is
`services.router.routes`, what becomes of an answer `services.router.dataflow`.
"""

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from common.transport.buffers import Buffer
from common.transport.device import DeviceRows
from common.transport.outbox import Outbox
from services.router import payloads
from services.router.block import Int32s, NodeWork, SourceWork
from services.router.counters import Counters
from services.router.plan import NodeShare, WorkerShare
from services.router.routes import Fleet, Ints
from services.router.rows import Piece

A = TypeVar("A")
B = TypeVar("B")
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
    _loads: dict[int, Ints] = field(default_factory=dict)  # by question to a router: rows by worker
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
        self._next += 1
        return self._next

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
        self, work: NodeWork, shares: Sequence[WorkerShare], pieces: Sequence[Piece],
        buffers: list[Buffer], landings: list[DeviceRows | None], now_ns: int,
    ) -> None:  # fmt: skip
        """Post the EXPERT_IN of each share, whose rows are in its buffer. Raises Overloaded."""
        with closing(_each(shares, pieces, buffers, landings)) as questions:
            for share, piece, buffer, landing in questions:
                header = payloads.expert_in(work.request, share, piece, buffer)
                header.block = call = self.number()
                work.waiting[call] = share
                self.works[call] = work
                self.fleet.outstanding[share.worker] += header.num_rows
                self.fleet.asked[share.worker] += header.num_rows
                self.counters.posted(header)
                try:
                    self.experts[share.worker].send(header, buffer, now_ns, landing=landing)
                except BaseException:
                    self._settled_expert(share.worker, call, header.num_rows)
                    raise

    def ask_routers(
        self, source: SourceWork, shares: dict[int, NodeShare], table: Int32s,
        buffers: list[Buffer], landings: list[DeviceRows | None], now_ns: int,
    ) -> None:  # fmt: skip
        """Post the RELAY of each share, by question. Raises Overloaded.

        `table` is the choice of workers, whose load is counted where there are replicas.
        """
        with closing(_each(shares, shares.values(), buffers, landings)) as questions:
            for call, share, buffer, landing in questions:
                header = payloads.relay(source.request, share, buffer)
                header.block = call
                if source.payload is not None:
                    load = np.bincount(table[share.experts], minlength=len(self.nodes))
                    self._loads[call] = load
                    np.add(self.fleet.outstanding, load, out=self.fleet.outstanding)
                    np.add(self.fleet.asked, load, out=self.fleet.asked)
                self.counters.crossed(share.node, header, header.num_pairs, inward=False)
                self.counters.posted(header)
                self.routers[share.node].send(header, buffer, now_ns, landing=landing)

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

    def settle_expert(self, worker: int, call: int) -> bool:
        """The worker's answer is good, or no longer wanted. False when nothing was owed."""
        asked = self.experts[worker].settle(call)
        if asked is not None:
            self._settled_expert(worker, call, asked.header.num_rows)
        return asked is not None

    def settle_router(self, node: int, call: int) -> bool:
        """The same for the router of another node."""
        load = self._loads.pop(call, None)
        if load is not None:
            np.subtract(self.fleet.outstanding, load, out=self.fleet.outstanding)
        self.sources.pop(call, None)
        return self.routers[node].settle(call) is not None

    def _settled_expert(self, worker: int, call: int, num_rows: int) -> None:
        self.works.pop(call, None)
        self.fleet.outstanding[worker] -= num_rows


def _each(
    calls: Iterable[A], parts: Iterable[B], buffers: list[Buffer], landings: list[DeviceRows | None]
) -> Generator[tuple[A, B, Buffer, DeviceRows | None]]:
    """Questions, each with its rows and where the answer goes; closed early (a full queue), it releases the rest."""
    left = list(zip(calls, parts, buffers, landings, strict=True))[::-1]
    try:
        while left:
            yield left.pop()
    finally:
        for _, _, buffer, landing in left:
            buffer.release()
            if landing is not None:
                landing.release()
