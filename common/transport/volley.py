"""Messages whose rows are pieces of one block of device memory: they leave once the device has written it.

The places where their answers are wanted are pieces of one block, too.

Each is a `Call` of an outbox like any other. Between neighbours several go with one call of the port and without a
buffer or a header of their own; what goes by itself (no credit, another way than shared memory, asked again) gets both
then.
"""

from typing import TYPE_CHECKING

from common.transport.base import Link
from common.transport.buffers import Buffer
from common.transport.device import DeviceBlock, DevicePool, DeviceRows
from common.transport.seam import Fence
from common.wire.header import HEADER_NBYTES, Header, Kind

if TYPE_CHECKING:
    from common.transport.ucx_messages import UcxMessages

_TOGETHER = 4  # that many do not wait for the rest
# link, tag, credits to return, number of the answer
Ticket = tuple["UcxMessages", int, int, int, "Part"]


class Volley:
    """Messages of one kind about `request`. Made with a reference to the block, given up by `leave`."""

    __slots__ = ("block", "fence", "has_left", "kind", "pool", "request", "tickets")

    def __init__(
        self, request: Header, kind: Kind, pool: DevicePool, block: DeviceBlock, fence: Fence
    ) -> None:
        """`fence` is passed when the block is written."""
        self.request, self.kind, self.pool = request, kind, pool
        self.block, self.fence = block, fence
        self.has_left = False
        self.tickets: list[Ticket] = []  # of messages that links have taken

    def leave(self) -> None:
        """Every message is posted: send what links have taken as soon as the block is written."""
        self.has_left = True
        if self.tickets:
            self.hurry()
            self.fence.then(self._send)
        self.block.release()

    @property
    def kind_alone(self) -> Kind:
        """Of a message that goes by itself."""
        return self.kind

    def alone(self, part: "Part") -> tuple[DeviceRows, bytes]:
        """Its rows, with their fence, and what follows them."""
        rows = self.block.rows(part.place, part.nbytes)
        rows.fence = self.fence
        return rows, part.tail

    def hurry(self) -> None:
        """Send what links have taken if the block is written by now."""
        if self.fence.reached():
            self._send()

    def _send(self) -> None:
        tickets, self.tickets = self.tickets, []  # which know us
        if tickets:
            first, *_ = tickets[0]
            first.send_together(self.request, self.kind, tickets)


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

    def __init__(
        self, volley: Volley, number: int, target: int, num_rows: int, num_pairs: int,
        place: int, nbytes: int, tail: bytes, landing: DeviceRows | None, since_ns: int,
    ) -> None:  # fmt: skip
        """`nbytes` of rows from byte `place` of the volley's block on; takes over the reference to `landing`.

        `number` is the header's block; `tail` is what follows the rows in the payload.
        """
        self.volley, self.number, self.target = volley, number, target
        self.num_rows, self.num_pairs = num_rows, num_pairs
        self.place, self.nbytes, self.tail = place, nbytes, tail
        self.landing, self.since_ns = landing, since_ns
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
        volley = self.volley
        if volley.has_left or not link.take_part(self):
            link.post(self.header, self.payload, landing=self.landing)
        elif len(volley.tickets) % _TOGETHER == 0:
            volley.hurry()

    def release(self) -> None:
        """Drop what is held for another try."""
        self.volley.block.release()
        if self.landing is not None:
            self.landing.release()
        if self._payload is not None:
            self._payload.release()
