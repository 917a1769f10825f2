"""The transport's interface: links, the callbacks of whoever owns them, and what both promise.

Concurrency contract. Everything runs on one event loop, in one thread. `Handler` methods are plain calls made by the
transport as messages complete: they must not block and must not raise (an exception closes that link). `post` and
`send_control` never wait. No task and no future exists per data message; awaiting is for opening and closing.

Delivery contract, per link and direction: data messages arrive in the order posted, each at most once; a message that
was posted may be lost only if the link closes. After `on_close` no other callback of that link comes. Whoever needs
an answer keeps what it sent until the answer is in, and posts it again on the next link: the transport never re-sends.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from common.errors import LinkClosed
from common.ids import ProcessId
from common.transport.buffers import Buffer, BufferPool
from common.transport.seam import Seam
from common.wire.header import Header, Landed

if TYPE_CHECKING:
    from common.transport.device import DeviceBlock, DeviceRows
    from common.transport.volley import Ended, Part, Question, Volley


@dataclass(frozen=True, slots=True)
class Hello:
    """What a process says of itself in the handshake; both sides must agree on `model` and `epoch`.

    `facts` travels as JSON: whatever a role wants its peer to know from the start (an expert: the content hashes of
    its resident experts). `data` is False for a link that carries control frames only (no UCX endpoint is made).
    """

    process: ProcessId
    node: int
    pid: int
    model: str  # hash of the served model's manifest
    epoch: int
    wire: str
    data: bool = True
    facts: dict[str, Any] = field(default_factory=dict)


Ticket = tuple["Link", tuple[Any, ...], int]
"""A message of a volley that a link has taken: that link, what the port wants to know, and the number of its answer."""


class Link(Protocol):
    """One authenticated peer."""

    @property
    def peer(self) -> Hello:
        """What the peer said of itself."""
        ...

    def post(
        self,
        header: Header,
        payload: Buffer | None = None,
        *,
        landing: "DeviceRows | None" = None,
    ) -> None:
        """Send a data message: never waits. Takes its own reference to `payload` and drops it when the bytes are out.

        A message whose rows lie in device memory goes once their fence is passed. `landing`: where the rows of the
        answer (of exactly that size) go; the answer's payload then has them as its `rows`.

        Fills in `payload_nbytes` and `credits` of `header`, which may be reused at once. Without credit the message
        waits in the link's bounded queue. Raises LinkClosed after the link closed, Overloaded when the queue is full,
        WireError when a header field is out of range (nothing was sent).
        """
        ...

    def post_landed(self, header: Header, rows: "DeviceRows") -> bool:
        """`post` an answer whose rows are written where the peer wants them, without a payload for it.

        False: not in this way, or not now; nothing was sent. Raises WireError when a header field is out of range.
        """
        return False

    def take(self, volley: "Volley", question: "Question") -> "Ticket | None":
        """Give a message of a volley its place among those of this link; None: it is to be posted by itself.

        `send_together` sends it, and `expect` is told of its landing before anything is received.
        """
        return None

    def send_together(self, volley: "Volley", tickets: "Sequence[Ticket]") -> "list[Ticket]":
        """The device has written the rows of messages that links of this process took: send them.

        Returns those for whose rows, a neighbour's that are handed on, there is no room: for `send_copy`.
        """
        raise AssertionError("this link takes none")

    def expect(self, ticket: "Ticket", landing: "DeviceRows | None") -> None:
        """The rows of that message's answer come to `landing`."""
        ...

    def send_copy(self, ticket: "Ticket", part: "Part") -> None:
        """Send what was taken with rows of its own."""
        raise AssertionError("this link takes none")

    @property
    def counts(self) -> object:
        """What a forwarder (`forwarder.h`) calls this link."""
        return None

    def share(self, block: "DeviceBlock") -> object:
        """What the port needs so that the peer reaches that memory; None: it cannot."""
        return None

    def forwarded(
        self, landing: "DeviceRows | None", answer: int, ended: "Ended", block: "DeviceBlock | None"
    ) -> None:
        """A forwarder has sent a question: its answer, of that number, comes to `landing`.

        The peer reads rows of `block`, which stay until it has done so. None: nobody waits for the answer.
        """
        raise AssertionError("this link forwards nothing")

    def send_control(self, message: dict[str, Any]) -> None:
        """Send a small JSON message on the authenticated control socket: never waits. Raises LinkClosed."""
        ...

    def close(self, reason: str) -> None:
        """Close both ways at once; idempotent. `on_close` follows exactly once, after the current callback."""
        ...


class Handler(Protocol):
    """Whoever owns links. All calls come from the event loop's thread."""

    def on_open(self, link: Link) -> None:
        """The handshake is done and the link can be posted to."""
        ...

    def on_message(self, link: Link, header: Header, payload: Buffer | None) -> None:
        """A data message is complete. The callee owns `payload`, also when it raises, and releases it when done; that
        returns the credit.

        A message without payload bytes comes with None, whether it was posted with None or with an empty buffer.
        """
        ...

    def on_control(self, link: Link, message: dict[str, Any]) -> None:
        """A control message arrived."""
        ...

    def on_close(self, link: Link, error: LinkClosed) -> None:
        """The link is gone; everything owed by the peer on it will never come."""
        ...


class LandedHandler(Handler, Protocol):
    """One that takes answers whose rows have landed without buffer and header: most answers of a host's processes."""

    def on_landed(self, link: Link, answer: Landed, landing: "DeviceRows") -> None:
        """Instead of `on_message`, with the rows at `landing`, as it was posted; its reference stays the link's."""
        ...


class Transport(Protocol):
    """A factory of links and the buffers that travel on them."""

    @property
    def pool(self) -> BufferPool:
        """Buffers for payloads."""
        ...

    @property
    def seam(self) -> Seam:
        """Where messages wait for the device."""
        ...

    async def listen(self, address: str, hello: Hello, handler: Handler) -> str:
        """Accept links; returns the address really bound (`tcp://host:port` with the port filled in, `unix:/path`)."""
        ...

    async def connect(
        self, address: str, hello: Hello, handler: Handler, *, timeout_s: float
    ) -> Link:
        """Open a link. Raises LinkClosed (unreachable), AuthError (refused), DeadlineExceeded."""
        ...

    def answer_with(self, answerer: object) -> None:
        """Give neighbours' questions to an answerer in a capsule (`answerer.h`) first, where the port can.

        What it takes and answers no handler hears of. Before there are links.
        """
        ...

    def forward_with(self, forwarder: object) -> None:
        """Show neighbours' requests to a forwarder in a capsule (`forwarder.h`) first, where the port can.

        Before there are links.
        """
        ...

    def carriers(self) -> dict[str, list[str]]:
        """What the library below really uses for each open data link, by peer: {"router-0": ["tcp/eth0"]}."""
        ...

    async def close(self) -> None:
        """Close every link and listener, then the transport itself."""
        ...


def tell(links: Iterable[Link], message: dict[str, Any]) -> None:
    """Send a control message to whoever is still there: a link that just closed says so by its `on_close`."""
    for link in links:
        with contextlib.suppress(LinkClosed):
            link.send_control(message)
