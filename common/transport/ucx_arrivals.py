"""What arrives on one link over UCX, and when it is whole.

A tag, of a message or of an announcement of rows, is ``kind u8 | sender u24 | sequence u32``. `sender` is given out by
the *receiver* at the handshake and never reused while the process lives (16 million links), so a message still under
way from a dead predecessor finds no link. `sequence` counts what was posted per link and direction, and messages are
delivered in its order; a number that is in already, or far off, closes the link.

Receiving costs by arrival, not by peer: one wildcard probe takes the oldest message with its exact size, checked
against the limit before memory is taken from the pool. Small messages are complete at once; large ones (rendezvous)
complete later, and what came behind them on the same link waits its turn.

Rows in device memory take their message along: UCX announces them with it (kind 2), so that the receiver knows at once
where they go. A message that is too long for that goes ahead as any other (kind 1), and its rows have its number (kind
3). It is delivered when both are in.

A neighbour's messages (`common.transport.neighbour`) have the same tags. Its rows, or a third process's that it hands
on, are not received but read where they are, and those of an answer may be in their landing when the answer comes.
"""

from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from common.errors import LinkClosed, WireError
from common.transport.base import Handler, Hello
from common.transport.buffers import Buffer
from common.transport.link import BaseLink, LinkState
from common.transport.port import CANCELED, IN_PROGRESS, Foreign, LinkCounts
from common.transport.reactor import KIND_MESSAGE, KIND_SHIFT, Endpoint
from common.wire.header import HEADER_NBYTES, REQUESTS, Header

if TYPE_CHECKING:
    from common.transport.device import DeviceBlock, DeviceRows
    from common.transport.neighbour import Neighbour
    from common.transport.ucx_plane import DataPlane

KIND_WITH_ROWS, KIND_ROWS = 2, 3  # KIND_MESSAGE (1): header and payload, or header and tables
SENDER_SHIFT = 32
SENDER_MASK, SEQUENCE_MASK = (1 << 24) - 1, (1 << 32) - 1
_MAX_AHEAD = 1 << 16  # of the next message to deliver; credits allow far fewer

_Announced = tuple[int, int]  # rows that are announced: the port's name of them, bytes


@dataclass(slots=True, eq=False)
class _Arrival:
    """A message on its way in: first itself, then (with a header) its rows if they come apart."""

    buffer: Buffer
    status: int = IN_PROGRESS
    header: Header | None = None
    rows_status: int = IN_PROGRESS


class UcxArrivals(BaseLink):
    """The receiving half of a link over UCX."""

    def __init__(
        self, plane: "DataPlane", mine: Hello, peer: Hello, handler: Handler, sender: int
    ) -> None:
        super().__init__(mine, peer, handler, plane.pool, plane.limits)
        self._plane = plane
        self._reactor = plane.reactor
        self._port = plane.port
        self._sender = sender  # the id that the peer puts into its tags
        self._endpoint: Endpoint | None = None
        self._neighbour: Neighbour | None = None  # the peer, on this host
        self._reaches_here = False  # the peer, into our device memory, without our having a say
        self._credits: LinkCounts = self._counts(self._limits.window)
        self._arrivals: dict[int, _Arrival] = {}  # by sequence
        self._announced: dict[int, _Announced] = {}  # rows whose receive is not posted

    def _set_windows(self, send_window: int) -> None:
        by_ring = self._credits.by_ring  # what overtook the control socket is not delivered yet
        super()._set_windows(send_window)
        self._credits = self._counts(send_window)
        self._credits.by_ring = by_ring

    def _counts(self, send_window: int) -> LinkCounts:
        in_short = self._on_landed is not None
        return LinkCounts(send_window, self._limits.window, takes_landed=in_short)

    def arrive(self, tag: int, nbytes: int, message: Foreign | bytes) -> None:
        """A message of this link was probed: receive it, or close the link when it must not be received.

        A neighbour's is here already.
        """
        number = tag & SEQUENCE_MASK
        buffer = self._room(number, tag, KIND_MESSAGE, nbytes)
        if buffer is None:
            return
        if type(message) is bytes:
            buffer.view[:nbytes] = message
            self._take(number, buffer)
            return
        self._credits.by_ring = False
        arrival = self._arrivals[number] = _Arrival(buffer)
        ended = partial(self._message_in, number, arrival)
        status = self._port.receive(message, buffer.address, nbytes, ended)
        if status != IN_PROGRESS:
            ended(status)

    def announced(self, tag: int, head: bytes, nbytes: int, data: int) -> None:
        """Rows are announced, with their message unless that goes apart."""
        if self._neighbour is not None and self._take_at_once(tag, head, nbytes, data):
            return
        number = tag & SEQUENCE_MASK
        if tag >> KIND_SHIFT == KIND_ROWS and self._is_expected(number, self._announced):
            self._announced[number] = data, nbytes
            arrival = self._arrivals.get(number)
            if arrival is not None and arrival.header is not None:
                self._receive_rows(number, arrival)
            return
        buffer = self._room(number, tag, KIND_WITH_ROWS, len(head))
        if buffer is None:
            self._port.discard_rows(data)
            return
        self._announced[number] = data, nbytes
        self._credits.by_ring &= bool(data & 1)
        buffer.view[: len(head)] = head
        self._take(number, buffer)

    def _take_at_once(self, tag: int, head: bytes, nbytes: int, data: int) -> bool:
        """Deliver what most are, the next message and a request whose rows this process reaches: faster than in steps.

        False when there is more to it, and nothing has happened.
        """
        credits, tables_nbytes = self._credits, len(head) - HEADER_NBYTES
        if (
            tag >> KIND_SHIFT != KIND_WITH_ROWS or tag & SEQUENCE_MASK != credits.next or credits.is_spent
            or self._arrivals or self.state is not LinkState.OPEN
        ):  # fmt: skip
            return False
        try:
            header = Header.unpack_from(head, max_payload_nbytes=self._limits.max_payload_nbytes)
        except WireError:
            return False
        if (
            header.kind not in REQUESTS or header.landed or header.rows_nbytes != nbytes
            or header.payload_nbytes != nbytes + tables_nbytes
        ):  # fmt: skip
            return False
        assert self._neighbour is not None, "a message of somebody else"
        places = self._neighbour.rows(self, data, nbytes)
        if places is None:
            return False
        credits.arrived()
        credits.next = (credits.next + 1) & SEQUENCE_MASK
        buffer = self._pool.acquire(tables_nbytes)
        buffer.view[HEADER_NBYTES : len(head)] = head[HEADER_NBYTES:]
        buffer.rows, buffer.landing = places
        self._deliver(header, buffer)
        return True

    def _take(self, number: int, buffer: Buffer) -> None:
        """A message is in, maybe without its rows."""
        arrival = self._arrivals[number] = _Arrival(buffer, status=0)
        if self.state is LinkState.OPEN:  # else it overtook the control socket
            self._open_arrival(number, arrival)
            self._deliver_whole()

    def _room(self, number: int, tag: int, kind: int, nbytes: int) -> Buffer | None:
        """A buffer for the message, or None: a correct peer would not send it, and the link is closed."""
        if (
            tag >> KIND_SHIFT == kind
            and HEADER_NBYTES <= nbytes <= self._max_message_nbytes
            and self._is_expected(number, self._arrivals)
        ):
            return self._pool.acquire(nbytes - HEADER_NBYTES)
        self._fail(
            WireError(
                f"message {number} of kind {tag >> KIND_SHIFT} and {nbytes} bytes from {self._peer.process}, "
                f"expected number {self._credits.next} and at most {self._max_message_nbytes} bytes"
            )
        )
        return None

    def _is_expected(self, number: int, known: Container[int]) -> bool:
        return (number - self._credits.next) & SEQUENCE_MASK < _MAX_AHEAD and number not in known

    def _message_in(self, number: int, arrival: _Arrival, status: int) -> None:
        arrival.status = status
        if self.state is LinkState.CLOSED:
            arrival.buffer.release()
        if status < 0:
            self._lost("receive", status)
        if self.state is LinkState.OPEN:  # else it overtook the control socket
            self._open_arrival(number, arrival)
            self._deliver_whole()

    def _open_arrival(self, number: int, arrival: _Arrival) -> None:
        """The message is in: read its header and see to its rows. A malformed one closes the link."""
        arrival.header = self._read_header(arrival.buffer, number)
        if arrival.header is not None:
            self._await_rows(number, arrival)

    def _await_rows(self, number: int, arrival: _Arrival) -> None:
        header, buffer = arrival.header, arrival.buffer
        assert header is not None, "a message that was not read"
        if buffer.rows is not None and not header.landed and buffer.rows.block.owner is None:
            self._receive_rows(number, arrival)
        elif number in self._announced:
            self._fail(WireError(f"rows {number} of {self._peer.process} are not in their header"))
        else:
            arrival.rows_status = 0

    def _place(self, buffer: Buffer, number: int, nbytes: int) -> None:
        """Rows of a neighbour are read where they are."""
        offer, offered = self._announced.get(number, (0, 0))
        if self._neighbour is not None and offered == nbytes:
            places = self._neighbour.rows(self, offer, nbytes)
            if places is not None:
                del self._announced[number]
                buffer.rows, buffer.landing = places
                return
        super()._place(buffer, number, nbytes)

    def _receive_rows(self, number: int, arrival: _Arrival) -> None:
        """Post the receive of rows, if they are announced."""
        rows = arrival.buffer.rows
        if rows is None or number not in self._announced:
            return
        data, nbytes = self._announced.pop(number)
        if nbytes != rows.nbytes:
            self._port.discard_rows(data)
            error = f"{nbytes} bytes of rows, the header says {rows.nbytes}"
            self._fail(WireError(f"{self._peer.process}: {error}"))
            return
        ended = partial(self._rows_in, arrival, rows.retain())
        status = self._port.receive_rows(data, rows.address, nbytes, rows.on_device, ended)
        if status != IN_PROGRESS:
            ended(status)

    def _rows_in(self, arrival: _Arrival, rows: "DeviceRows", status: int) -> None:
        arrival.rows_status = status
        self._let_go(rows, status)
        if status < 0:
            self._lost("receive", status)
        self._deliver_whole()

    def deliver_early(self) -> None:
        """The link is open: what overtook the control socket may be read."""
        for number, arrival in list(self._arrivals.items()):
            if arrival.status == 0 and self.state is LinkState.OPEN:
                self._open_arrival(number, arrival)
        self._deliver_whole()

    def _deliver_whole(self) -> None:
        """Deliver what is complete, in order."""
        while self.state is LinkState.OPEN:
            arrival = self._arrivals.get(self._credits.next)
            if arrival is None or arrival.header is None or arrival.rows_status != 0:
                return
            del self._arrivals[self._credits.next]
            self._credits.next = (self._credits.next + 1) & SEQUENCE_MASK
            self._deliver(arrival.header, arrival.buffer)

    def _deliver(self, header: Header, buffer: Buffer) -> None:
        if self._open_behind_written():
            super()._deliver(header, buffer)
        else:
            buffer.release()

    def _open_behind_written(self) -> bool:
        """What the device has written goes before the next message is handled. False when that has closed this link."""
        if self._plane.seam.is_open:
            self._plane.seam.poll()
        return self.state is LinkState.OPEN

    def _drop_receives(self) -> None:
        """What is in goes back to its pool now, the rest when UCX has ended it."""
        announced, self._announced = self._announced, {}
        for data, _ in announced.values():
            self._port.discard_rows(data)
        arrivals, self._arrivals = self._arrivals, {}
        for arrival in arrivals.values():
            if arrival.status != IN_PROGRESS:
                arrival.buffer.release()

    def _let_go(self, rows: "DeviceRows | DeviceBlock", status: int) -> None:
        """A transfer of rows has ended. If not well, a peer that is alive may still be about to read or write them."""
        if status < 0 and self._reaches_here:
            self._plane.retire(rows, self._peer.pid)
        else:
            rows.release()

    def _give_up(self, landing: "DeviceRows") -> None:
        """A neighbour may still be about to write there."""
        self._let_go(landing, CANCELED)

    def _lost(self, what: str, status: int) -> None:
        self._close(LinkClosed(f"{self._peer.process} is gone: {what} failed ({status})"))
