"""Messages whose rows are pieces of one block of device memory: they leave once the device has written it.

The places where their answers are wanted are pieces of another block. Between neighbours several go with one call of
the port and without a buffer or a header of their own, and at once: what is kept of each until its answer is in is
written down behind that, since nothing is received meanwhile. What goes by itself (no credit, another way than shared
memory, asked again) is a call of an outbox like any other.
"""

from collections.abc import Callable, Sequence

from common.transport.base import Link, Ticket
from common.transport.buffers import Buffer
from common.transport.device import DeviceBlock, DevicePool, DeviceRows
from common.transport.outbox import Outbox
from common.transport.seam import Fence
from common.wire.header import HEADER_NBYTES, Header, Kind

_TOGETHER = 8  # that many do not wait for the rest
Question = tuple[int, int, int, int, int, int, bytes, int, int]
"""(number, target, rows, pairs, place of the rows in the block, bytes of these, what follows them, place of the rows of
the answer, bytes of these or 0: they may be anywhere)"""


class Ended:
    """What the port calls when a receiver has done with rows that a forwarder asked about.

    `call` is set when the question is kept or given up, before the port calls anybody.
    """

    __slots__ = ("call",)
    call: Callable[[int], None]

    def __call__(self, status: int) -> None:
        self.call(status)


class Volley:
    """Messages of one kind about `request`. Made with a reference to the block, given up by `leave`."""

    __slots__ = ("_template", "_unsent", "block", "fence", "kind", "landings", "pool", "request")

    def __init__(
        self, request: Header, kind: Kind, pool: DevicePool, block: DeviceBlock, fence: Fence,
        landings: DeviceBlock | None = None,
    ) -> None:  # fmt: skip
        """`fence` is passed when the block is written; answers are wanted in `landings`."""
        self.request, self.kind, self.pool = request, kind, pool
        self.block, self.fence, self.landings = block, fence, landings
        self._unsent: list[tuple[Ticket, Part]] = []
        self._template = b""

    @property
    def template(self) -> bytes:
        """What the headers of all have in common."""
        if not self._template:
            self._template = self.request.template(self.kind)
        return self._template

    def post(
        self, outboxes: Sequence[Outbox], questions: Sequence[Question], since_ns: int
    ) -> None:
        """Send each question to its target, whose outbox keeps it. Raises Overloaded; the rest is not kept then."""
        for first in range(0, len(questions), _TOGETHER):
            some = slice(first, first + _TOGETHER)
            self._post(outboxes[some], questions[some], since_ns)

    def _post(
        self, outboxes: Sequence[Outbox], questions: Sequence[Question], since_ns: int
    ) -> None:
        asked = list(zip(outboxes, questions, strict=True))
        tickets = [None if o.link is None else o.link.take(self, q) for o, q in asked]
        taken = [ticket for ticket in tickets if ticket is not None]
        failed, is_written = [], self.fence.reached()
        if is_written:
            self._send_rest()
            if taken:
                failed = taken[0][0].send_together(self, taken)
        parts: list[tuple[Ticket, Part]] = []
        for (outbox, question), ticket in zip(asked, tickets, strict=True):
            if ticket is not None:
                part = Part(self, question, since_ns)
                outbox.keep(part)
                ticket[0].expect(ticket, part.landing)
                parts.append((ticket, part))
        if not is_written:
            self._unsent += parts
        elif failed:
            self._copy(failed, parts)
        for (outbox, question), ticket in zip(asked, tickets, strict=True):
            if ticket is None:
                outbox.send(Part(self, question, since_ns))

    def keep(
        self, outboxes: Sequence[Outbox], questions: Sequence[Question],
        sent: Sequence[tuple[int, Ended]], since_ns: int,
    ) -> None:  # fmt: skip
        """`post` of what a forwarder has sent: of each question the number of its answer's place, 0: it was not."""
        parts = [Part(self, question, since_ns) for question in questions]
        for outbox, part, (answer, ended) in zip(outboxes, parts, sent, strict=True):
            if answer:
                assert outbox.link is not None, "sent to nobody"
                outbox.keep(part)
                outbox.link.forwarded(part.landing, answer, ended, self.block)
        for outbox, part, (answer, _) in zip(outboxes, parts, sent, strict=True):
            if not answer:  # which may raise
                outbox.send(part)

    def leave(self) -> None:
        """Every message is posted: send what links have taken as soon as the block is written."""
        if self._unsent:
            self.fence.then(self._send_rest)
        self.block.release()

    def _send_rest(self) -> None:
        parts, self._unsent = self._unsent, []  # which know us
        if parts:
            tickets = [ticket for ticket, _ in parts]
            self._copy(tickets[0][0].send_together(self, tickets), parts)

    def _copy(self, failed: list[Ticket], parts: list[tuple[Ticket, "Part"]]) -> None:
        """For these there is no room among the rows that are handed on."""
        for ticket, part in parts:
            if ticket in failed:
                ticket[0].send_copy(ticket, part)

    @property
    def kind_alone(self) -> Kind:
        """Of a message that goes by itself."""
        return self.kind

    def alone(self, part: "Part") -> tuple[DeviceRows, bytes]:
        """Its rows, with their fence, and what follows them."""
        rows = self.block.rows(part.place, part.nbytes)
        rows.fence = self.fence
        return rows, part.tail


class Part:
    """One message: see `common.transport.outbox.Call`."""

    __slots__ = (
        "_header",
        "_payload",
        "landing",
        "nbytes",
        "num_pairs",
        "num_rows",
        "number",
        "place",
        "since_ns",
        "tail",
        "target",
        "volley",
    )

    def __init__(self, volley: Volley, question: Question, since_ns: int) -> None:
        """`number` is the header's block; `tail` is what follows the rows in the payload."""
        (
            self.number, self.target, self.num_rows, self.num_pairs, self.place, self.nbytes, self.tail, where, wanted,
        ) = question  # fmt: skip
        self.volley, self.since_ns = volley, since_ns
        self.landing: DeviceRows | None = None
        if wanted:
            assert volley.landings is not None, "nowhere to land"
            self.landing = volley.landings.rows(where, wanted)
        self._header: Header | None = None
        self._payload: Buffer | None = None
        volley.block.retain()

    @property
    def header(self) -> Header:
        """Of the message by itself, made at the first need; a link fills in the payload's bytes."""
        if self._header is None:
            volley = self.volley
            self._header = volley.request.derive(
                volley.kind_alone, target=self.target, num_rows=self.num_rows, num_pairs=self.num_pairs,
                payload_nbytes=0,
            )  # fmt: skip
            self._header.block = self.number
        return self._header

    @property
    def payload(self) -> Buffer:
        """Likewise."""
        if self._payload is None:
            rows, tail = self.volley.alone(self)
            buffer = self.volley.pool.acquire_with(rows, len(tail))
            buffer.view[HEADER_NBYTES : HEADER_NBYTES + len(tail)] = tail
            self._payload = buffer
        return self._payload

    def post(self, link: Link) -> None:
        """Raises what `Link.post` does."""
        link.post(self.header, self.payload, landing=self.landing)

    def release(self) -> None:
        """Drop what is held for another try."""
        self.volley.block.release()
        if self.landing is not None:
            self.landing.release()
        if self._payload is not None:
            self._payload.release()
