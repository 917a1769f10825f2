"""Messages that are owed an answer: the one mechanism by which nothing is lost on the way.

Whoever sends rows keeps them here until the answer is in. When the target's link closes they stay; when it opens
again they are posted once more with the next attempt number, as they are when handed over to another target. An answer
that nobody waits for (a duplicate, or one that came after its deadline) settles nothing. The outbox decides nothing
about time: `expired` is asked with the clock's reading. Bounded by its owner: every entry belongs to a block, and
blocks in flight are bounded by micro-batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

from common.errors import LinkClosed
from common.transport.base import Link
from common.transport.buffers import Buffer
from common.wire.header import Header

if TYPE_CHECKING:
    from common.transport.device import DeviceRows
    from common.transport.volley import Part


@dataclass(slots=True)
class Message:
    """A call that goes by itself; it owns a reference to `payload` and `landing`, which are kept for a re-send."""

    header: Header
    payload: Buffer
    since_ns: int
    landing: "DeviceRows | None" = None

    @property
    def number(self) -> int:
        """What the answer names as its block."""
        return self.header.block

    @property
    def num_rows(self) -> int:
        """How many rows are asked about."""
        return self.header.num_rows

    @property
    def num_pairs(self) -> int:
        """Of these rows, as the kind counts them."""
        return self.header.num_pairs

    def post(self, link: Link) -> None:
        """Raises what `Link.post` does."""
        link.post(self.header, self.payload, landing=self.landing)

    def release(self) -> None:
        """The answer is in, or not wanted any more."""
        self.payload.release()
        if self.landing is not None:
            self.landing.release()


Call = Union[Message, "Part"]
"""One message waiting for its answer since then; `landing` is where the rows of the answer go, None: anywhere."""


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

    def send(self, call: "Call") -> None:
        """Keep the message (taking over the caller's references) and post it if the link is open.

        Raises Overloaded when the link's queue is full; the message is then not kept.
        """
        self._calls[call.number] = call
        try:
            self._post(call)
        except BaseException:
            self.drop(call.number)
            raise

    def keep(self, call: "Call") -> None:
        """Keep a message that was sent in another way (taking over the caller's references)."""
        self._calls[call.number] = call

    def owed(self, block: int) -> Call | None:
        """The message that waits for the answer about `block`, None when nothing is owed (drop that answer)."""
        return self._calls.get(block)

    def settle(self, block: int) -> Call | None:
        """The answer for `block` is in and good: forget the message. None when nothing was owed.

        Only after the answer was checked: a malformed one closes its link, and the next link is asked again.
        """
        call = self._calls.pop(block, None)
        if call is not None:
            call.release()
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
            call.post(self.link)
        except LinkClosed:
            self.link = None  # its on_close is on the way; the message waits for the next link
