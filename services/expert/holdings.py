"""What the routers of this node want this worker to hold: loaded in the background, dropped when nobody wants it.

One expert at a time is read, hashed and laid out in a thread, so that the loop goes on computing. An expert is dropped
once every router of the node has spoken and none wants it: the last one to give an epoch up decides.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from common.errors import AtollError
from common.ids import ProcessId
from common.placement.plan import Place
from common.transport.base import Link, tell
from services.expert.bank import Bank

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Holdings:
    """Keeps `bank` to what `num_routers` routers ask for; `read` loads an expert and says its hash (in a thread)."""

    bank: Bank
    read: Callable[[Place], tuple[Any, str]]
    num_routers: int
    _wanted: dict[ProcessId, set[Place]] = field(default_factory=dict)
    _waiting: dict[ProcessId, tuple[Link, int]] = field(default_factory=dict)  # owed an answer to
    _failed: dict[Place, str] = field(default_factory=dict)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def want(self, link: Link, number: int, experts: list[Place]) -> None:
        """A router wants these and, for its part, nothing else; question `number` is answered when they are there."""
        self._wanted[link.peer.process] = {(layer, expert) for layer, expert in experts}
        self._waiting[link.peer.process] = link, number
        self._failed.clear()
        self._wake.set()

    async def run(self) -> None:
        """Load, drop and answer, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while missing := self._missing():
                await self._load(missing[0])
            self._drop()
            self._answer()

    def _missing(self) -> list[Place]:
        wanted = set().union(*self._wanted.values())
        return sorted(p for p in wanted if p not in self.bank.hashes and p not in self._failed)

    async def _load(self, place: Place) -> None:
        try:
            weights, digest = await asyncio.to_thread(self.read, place)
        except (AtollError, OSError, RuntimeError) as exc:  # RuntimeError: torch, out of memory
            log.error("expert %d of layer %d: %s", place[1], place[0], exc)
            self._failed[place] = f"expert {place[1]} of layer {place[0]}: {exc}"
        else:
            self.bank.add(place, weights, digest)

    def _drop(self) -> None:
        if len(self._wanted) < self.num_routers:
            return
        for place in set(self.bank.hashes).difference(*self._wanted.values()):
            self.bank.drop(place)

    def _answer(self) -> None:
        experts = [[layer, expert, digest] for (layer, expert), digest in self.bank.hashes.items()]
        waiting, self._waiting = self._waiting, {}
        for router, (link, number) in waiting.items():
            errors = [why for place, why in self._failed.items() if place in self._wanted[router]]
            answer = {
                "type": "held",
                "id": number,
                "experts": experts,
                "error": "".join(errors[:1]),
            }
            tell([link], answer)
