"""What a router has asked of its node's experts and of other nodes' routers, and who of them can be asked.

Every question has a number of its own (the header's `block` on that hop), so that one block may be asked of the same
peer twice, as happens when a share is asked anew after a worker died. Decides nothing: whom to ask is
`services.router.routes`, what becomes of an answer `services.router.dataflow`.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from common.transport.buffers import Buffer
from common.transport.device import DeviceRows
from common.transport.outbox import Outbox
from common.wire.header import Header
from services.router.block import NodeWork, SourceWork
from services.router.routes import Fleet, Ints

_ROUTER = 0x8000  # tells a router's numbers from an attention worker's


@dataclass(slots=True)
class Calls:
    """Open questions of router `index`; `nodes[worker]` is the plan's."""

    index: int
    nodes: tuple[int, ...]
    experts: dict[int, Outbox]  # by worker: those of this node
    routers: dict[int, Outbox]  # by node
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

    def ask_expert(
        self, call: int, work: NodeWork, header: Header, buffer: Buffer, now_ns: int,
        landing: DeviceRows | None,
    ) -> None:  # fmt: skip
        """Post an EXPERT_IN to the worker `header.target`. Raises Overloaded."""
        header.block = call
        self.works[call] = work
        self.fleet.outstanding[header.target] += header.num_rows
        self.fleet.asked[header.target] += header.num_rows
        try:
            self.experts[header.target].send(header, buffer, now_ns, landing=landing)
        except BaseException:
            self._settled_expert(header.target, call, header.num_rows)
            raise

    def ask_router(
        self, call: int, header: Header, buffer: Buffer, now_ns: int,
        landing: DeviceRows | None, load: Ints | None,
    ) -> None:  # fmt: skip
        """Post a RELAY to the router of node `header.target`; `load` counts its rows by worker. Raises Overloaded."""
        header.block = call
        if load is not None:
            self._loads[call] = load
            np.add(self.fleet.outstanding, load, out=self.fleet.outstanding)
            np.add(self.fleet.asked, load, out=self.fleet.asked)
        self.routers[header.target].send(header, buffer, now_ns, landing=landing)

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
