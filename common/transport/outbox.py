"""Messages that are owed an answer: the one mechanism by which nothing is lost on the way.

Whoever sends rows keeps them here until the answer is in. When the target's link closes they stay; when it opens
again they are posted once more with the next attempt number, as they are when handed over to another target. An answer
that nobody waits for (a duplicate, or one that came after its deadline) settles nothing. The outbox decides nothing
about time: `expired` is asked with the clock's reading. Bounded by its owner: every entry belongs to a block, and
blocks in flight are bounded by micro-batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import LinkClosed
from common.transport.base import Link
from common.transport.buffers import Buffer
from common.wire.header import Header

if TYPE_CHECKING:
    from common.transport.device import DeviceRows


@dataclass(slots=True)
class Call:
    """One message waiting for its answer; `payload` is kept for a re-send, `landing` is where the answer's rows go."""

    header: Header
    payload: Buffer
    since_ns: int
    landing: "DeviceRows | None" = None


class Outbox:
    """Unanswered messages to one target (a process that may come and go), by block id."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.link: Link | None = None
        self.num_resent = 0
        self._calls: dict[int, Call] = {}

    def __repr__(self) -> str:
        state = "open" if self.link is not None else "waiting for the link"
        return f"<Outbox to {self.name} [{len(self._calls)} owed | {state}]>"

    def __len__(self) -> int:
        return len(self._calls)

    def send(
        self,
        header: Header,
        payload: Buffer,
        now_ns: int,
        *,
        landing: "DeviceRows | None" = None,
    ) -> None:
        """Keep the message (taking over the caller's references) and post it if the link is open.

        Raises Overloaded when the link's queue is full; the message is then not kept.
        """
        call = self._calls[header.block] = Call(header, payload, now_ns, landing)
        try:
            self._post(call)
        except BaseException:
            self.drop(header.block)
            raise

    def owed(self, block: int) -> Call | None:
        """The message that waits for the answer about `block`, None when nothing is owed (drop that answer)."""
        return self._calls.get(block)

    def settle(self, block: int) -> Call | None:
        """The answer for `block` is in and good: forget the message. None when nothing was owed.

        Only after the answer was checked: a malformed one closes its link, and the next link is asked again.
        """
        call = self._calls.pop(block, None)
        if call is not None:
            call.payload.release()
            if call.landing is not None:
                call.landing.release()
        return call

    def drop(self, block: int) -> None:
        """Forget a message whose answer is no longer wanted."""
        self.settle(block)

    def opened(self, link: Link) -> None:
        """The target is back: post everything that it owes, oldest first."""
        self.link = link
        for call in list(self._calls.values()):
            self._again(call)

    def closed(self, link: Link) -> None:
        """The target's link is gone; what it owes stays here."""
        if self.link is link:
            self.link = None

    def hand_over(self, to: "Outbox") -> None:
        """What is owed here is owed by `to` from now on, which is asked for it."""
        calls, self._calls = self._calls, {}
        to._calls.update(calls)
        for call in calls.values():
            to._again(call)

    def expired(self, now_ns: int, limit_ns: int) -> Iterator[Call]:
        """Messages unanswered for longer than `limit_ns`."""
        return iter([c for c in self._calls.values() if now_ns - c.since_ns > limit_ns])

    def clear(self) -> None:
        """Forget everything."""
        for block in list(self._calls):
            self.drop(block)

    def _again(self, call: Call) -> None:
        call.header.attempt += 1
        self.num_resent += 1
        self._post(call)

    def _post(self, call: Call) -> None:
        if self.link is None:
            return
        try:
            self.link.post(call.header, call.payload, landing=call.landing)
        except LinkClosed:
            self.link = None  # its on_close is on the way; the message waits for the next link
