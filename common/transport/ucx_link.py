"""One link over UCX tags: what is sent, what arrives, and when it is whole.

A tag is ``kind u8 | sender u24 | sequence u32``. `sender` is given out by the *receiver* at the handshake and never
reused while the process lives (16 million links), so a message still under way from a dead predecessor finds no link.
`sequence` counts per link and direction; anything but the next number closes the link.

Receiving costs by arrival, not by peer: one wildcard probe takes the oldest message with its exact size, checked
against the limit before memory is taken from the pool. Small messages are complete at once; large ones (rendezvous)
complete later, and what came behind them on the same link waits its turn.

Rows in device memory have tags of their own, of kind 2 with the sequence of their message, or of kind 3 with the number
under which the asker posted the receive when it asked. Their message is delivered when both are in.
"""

import asyncio
import base64
import binascii
import logging
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from common.errors import AtollError, AuthError, LinkClosed, WireError
from common.transport.base import Handler, Hello, Link
from common.transport.buffers import Buffer
from common.transport.control import Channel
from common.transport.link import BaseLink, LinkState
from common.transport.port import CANCELED, IN_PROGRESS, Ended
from common.transport.reactor import KIND_MESSAGE, KIND_SHIFT, Endpoint
from common.wire.header import ANSWER_OFFSET, ANSWERS, HEADER_NBYTES, Header

if TYPE_CHECKING:
    from common.transport.device import DeviceRows
    from common.transport.ucx_plane import DataPlane

log = logging.getLogger(__name__)

_KIND_ROWS, _KIND_ANSWER_ROWS = 2, 3  # KIND_MESSAGE (1): header and payload, or header and tables
SENDER_SHIFT = 32
SENDER_MASK, _SEQUENCE_MASK = (1 << 24) - 1, (1 << 32) - 1
_FIRST_FRAME_S = 5.0  # how long an authenticated dialler may take to say what it needs

_KIND_OFFSET = 3  # of a header's `kind`
_read_answer = struct.Struct("<I").unpack_from


@dataclass(slots=True, eq=False)
class _RowsIn:
    """A posted receive of rows, with a reference to their memory until UCX has ended it."""

    rows: "DeviceRows"
    status: int = IN_PROGRESS
    operation: Any = None  # what cancels it
    arrival: "_Arrival | None" = None  # the message that they belong to, when that is in


@dataclass(slots=True, eq=False)
class _Arrival:
    """A message on its way in: first itself, then (with a header) its rows if they come apart."""

    buffer: Buffer
    sequence: int
    status: int = IN_PROGRESS
    header: Header | None = None
    rows: _RowsIn | None = None

    @property
    def is_whole(self) -> bool:
        return self.header is not None and (self.rows is None or self.rows.status == 0)


class UcxLink(BaseLink):
    """One peer over UCX. Made when the peer is authenticated, opened when it told its worker's address."""

    def __init__(
        self,
        plane: "DataPlane",
        mine: Hello,
        peer: Hello,
        handler: Handler,
        sender: int,
        opened: asyncio.Future[Link] | None,
    ) -> None:
        super().__init__(mine, peer, handler, plane.pool, plane.limits)
        self._plane = plane
        self._reactor = plane.reactor
        self._sender = sender  # the id that the peer puts into its tags
        self._channel: Channel | None = None
        self._opening = opened  # the dialler's `connect` waits for it
        self._deadline: asyncio.TimerHandle | None = None  # the listener's, until the first frame
        self._endpoint: Endpoint | None = None
        self._to: Any = None  # the port's name of the endpoint
        self._port = plane.reactor.port
        self._tag_base = 0
        self._num_sent = 0
        self._num_received = 0
        self._receives: deque[_Arrival] = deque()  # in the order of their sequence
        self._expected: dict[int, _RowsIn] = {}  # the rows of answers, by answer number

    # -- control

    def on_peer(self, channel: Channel, peer: Hello) -> None:
        """The handshake is done. The dialler speaks first."""
        self._channel = channel
        self._peer = peer
        self.has_data = self._mine.data and peer.data
        if self._opening is not None:
            self._send_init()  # and `connect` has a deadline of its own
        else:
            self._deadline = self._plane.loop.call_later(_FIRST_FRAME_S, self._too_late)

    def _too_late(self) -> None:
        self.close("no first frame came")

    def _send_init(self) -> None:
        assert self._channel is not None
        init: dict[str, Any] = {"facts": self._mine.facts, "window": self._limits.window}
        if self.has_data:
            init["sender"] = self._sender
            init["worker"] = base64.b64encode(self._reactor.address).decode()
        self._channel.send({"init": init})

    def on_frame(self, channel: Channel, frame: dict[str, Any]) -> None:
        """A sealed frame: the first opens the link."""
        if self.state is not LinkState.OPENING:
            self._take_control(frame)
            return
        facts = self._read_init(frame)
        if self._deadline is not None:
            self._deadline.cancel()
        if self._opening is None:
            self._send_init()
        self._opened(replace(self._peer, facts=facts))
        if self._opening is not None and not self._opening.done():
            self._opening.set_result(self)
        self._plane.opened(self)  # data may have overtaken the control socket

    def _read_init(self, frame: dict[str, Any]) -> dict[str, Any]:
        try:
            init = frame["init"]
            facts = init["facts"]
            self._set_windows(init["window"])
            if self.has_data:
                sender, worker = init["sender"], base64.b64decode(init["worker"], validate=True)
                if type(sender) is not int or not 0 < sender <= SENDER_MASK or not worker:
                    raise ValueError("sender or worker")
                self._tag_base = KIND_MESSAGE << KIND_SHIFT | sender << SENDER_SHIFT
                self._endpoint, self._to = self._reactor.endpoint(worker, self._endpoint_failed)
            if not isinstance(facts, dict):
                raise TypeError("facts")
        except (KeyError, TypeError, ValueError, binascii.Error) as exc:
            raise WireError(f"{self._peer.process} sent a malformed first frame: {exc}") from exc
        return facts

    def on_lost(self, channel: Channel, error: AtollError) -> None:
        """The control socket is gone, and with it the link."""
        if self._opening is not None and not self._opening.done():
            known = isinstance(error, LinkClosed | AuthError)
            self._opening.set_exception(error if known else AuthError(str(error)))
        self._close(error if isinstance(error, LinkClosed) else LinkClosed(str(error)))

    def _send_control(self, frame: dict[str, Any]) -> None:
        if self._channel is None:
            raise LinkClosed(f"the link to {self._peer.process} has no control socket")
        self._channel.send(frame)

    def _endpoint_failed(self) -> None:
        self._plane.failed.append(self)

    def fail(self) -> None:
        """UCX says that the peer's worker is gone (noted by `_endpoint_failed`)."""
        self._close(LinkClosed(f"{self._peer.process} is gone: its UCX endpoint failed"))

    def carriers(self) -> tuple[str, ...]:
        """What UCX chose for this link; empty without an endpoint."""
        return () if self._endpoint is None else self._reactor.carriers(self._endpoint)

    # -- sending

    def _transmit(self, buffer: Buffer) -> None:
        sequence, self._num_sent = self._num_sent, (self._num_sent + 1) & _SEQUENCE_MASK
        rows, tag = buffer.rows, 0
        if rows is not None:  # read now: the buffer may be gone when its own message is out
            (answer,) = _read_answer(buffer.view, ANSWER_OFFSET)
            answer = answer if buffer.view[_KIND_OFFSET] in ANSWERS else 0
            tag = self._rows_tag(sequence, answer)
            rows.retain()
        nbytes = HEADER_NBYTES + buffer.nbytes
        ended = partial(self._sent, buffer)
        self._send_memory(buffer.address, nbytes, False, self._tag_base | sequence, ended)
        if rows is None:
            return
        if rows.fence is None or rows.fence.passed:
            self._send_rows(rows, tag)
        else:
            rows.fence.then(partial(self._send_rows, rows, tag))

    def _send_rows(self, rows: "DeviceRows", tag: int) -> None:
        """The device has written the rows: send them, taking over a reference."""
        ended = partial(self._rows_sent, rows)
        self._send_memory(rows.address, rows.nbytes, rows.on_device, tag, ended)

    def _rows_tag(self, sequence: int, answer: int) -> int:
        sender = self._tag_base & SENDER_MASK << SENDER_SHIFT
        kind, number = (_KIND_ANSWER_ROWS, answer) if answer else (_KIND_ROWS, sequence)
        return kind << KIND_SHIFT | sender | number

    def _send_memory(
        self, address: int, nbytes: int, on_device: bool, tag: int, ended: Ended
    ) -> None:
        """`ended` is called once, now or later. Nothing is raised: a closed link says what is lost by itself."""
        self._plane.num_moving += 1
        status = CANCELED
        if self._endpoint is not None:  # the link may have closed within `post`
            status = self._port.send(self._to, address, nbytes, on_device, tag, ended)
        if status == IN_PROGRESS:
            self._reactor.kick()
        else:
            ended(status)

    def _sent(self, buffer: Buffer, status: int) -> None:
        buffer.headroom_busy = False
        buffer.release()
        self._has_moved("send", status)

    def _rows_sent(self, rows: "DeviceRows", status: int) -> None:
        rows.release()
        self._has_moved("send", status)

    def _has_moved(self, what: str, status: int) -> None:
        self._plane.num_moving -= 1
        if status < 0:
            self._close(LinkClosed(f"{self._peer.process} is gone: {what} failed ({status})"))

    # -- receiving

    def _expect(self, answer: int, rows: "DeviceRows") -> None:
        self._expected[answer] = self._post_rows(rows, _KIND_ANSWER_ROWS, answer)

    def _unexpect(self, answer: int) -> None:
        posted = self._expected.pop(answer, None)
        if posted is not None and posted.status == IN_PROGRESS:
            self._port.cancel(posted.operation)

    def _post_rows(self, rows: "DeviceRows", kind: int, number: int) -> _RowsIn:
        """Post the receive of rows."""
        posted = _RowsIn(rows.retain())
        tag = kind << KIND_SHIFT | self._sender << SENDER_SHIFT | number
        ended = partial(self._rows_in, posted)
        status, posted.operation = self._port.expect(
            tag, rows.address, rows.nbytes, rows.on_device, ended
        )
        if status != IN_PROGRESS:
            ended(status)
        return posted

    def _rows_in(self, posted: _RowsIn, status: int) -> None:
        posted.status = status
        posted.operation = None
        posted.rows.release()
        if posted.arrival is not None:
            self._has_moved("receive", status)
            self._deliver_whole()

    def arrive(self, tag: int, nbytes: int, message: Any) -> None:  # noqa: ANN401  -- the port's
        """A message of this link was probed: receive it, or close the link when it must not be received."""
        sequence = tag & _SEQUENCE_MASK
        if (
            sequence != self._num_received
            or tag >> KIND_SHIFT != KIND_MESSAGE
            or not HEADER_NBYTES <= nbytes <= self._max_message_nbytes
        ):
            self._fail(
                WireError(
                    f"message {sequence} of {nbytes} bytes from {self._peer.process}, expected "
                    f"number {self._num_received} and at most {self._max_message_nbytes} bytes"
                )
            )
            return
        self._num_received = (sequence + 1) & _SEQUENCE_MASK
        buffer = self._pool.acquire(nbytes - HEADER_NBYTES)
        arrival = _Arrival(buffer, sequence)
        self._receives.append(arrival)
        self._plane.num_moving += 1
        ended = partial(self._message_in, arrival)
        status = self._port.receive(message, buffer.address, nbytes, ended)
        if status != IN_PROGRESS:
            ended(status)

    def _message_in(self, arrival: _Arrival, status: int) -> None:
        arrival.status = status
        if self.state is LinkState.CLOSED:
            arrival.buffer.release()
        self._has_moved("receive", status)
        if self.state is LinkState.OPEN:  # else it overtook the control socket
            self._open_arrival(arrival)
            self._deliver_whole()

    def _open_arrival(self, arrival: _Arrival) -> None:
        """The message is in: read its header and see to its rows. A malformed one closes the link."""
        buffer = arrival.buffer
        header = self._read_header(buffer.retain())
        if header is None:
            return
        buffer.release()
        arrival.header = header
        if buffer.rows is None:
            return
        posted = None
        if header.kind in ANSWERS:
            posted = self._expected.pop(header.answer, None)
        if posted is None:
            posted = self._post_rows(buffer.rows, _KIND_ROWS, arrival.sequence)
        arrival.rows = posted
        if posted.status == IN_PROGRESS:
            posted.arrival = arrival
            self._plane.num_moving += 1
        elif posted.status < 0:
            self._close(
                LinkClosed(f"{self._peer.process} is gone: receive failed ({posted.status})")
            )

    def deliver_early(self) -> None:
        """The link is open: what overtook the control socket may be read."""
        for arrival in list(self._receives):
            if arrival.status == 0 and self.state is LinkState.OPEN:
                self._open_arrival(arrival)
        self._deliver_whole()

    def _deliver_whole(self) -> None:
        """Deliver what is complete, in order."""
        receives = self._receives
        while receives and receives[0].is_whole and self.state is LinkState.OPEN:
            arrival = receives.popleft()
            assert arrival.header is not None
            self._deliver(arrival.header, arrival.buffer)

    # -- closing

    def _defer(self, call: Callable[[], None]) -> None:
        self._plane.loop.call_soon(call)

    def _detach(self, error: LinkClosed) -> None:
        if self._opening is not None and not self._opening.done():
            self._opening.set_exception(error)
        endpoint, self._endpoint, self._to = self._endpoint, None, None
        if endpoint is not None:
            self._reactor.close_endpoint(endpoint)
        if self._deadline is not None:
            self._deadline.cancel()
        self._plane.forget(self._sender)
        self._drop_receives()
        if self._channel is not None:
            self._channel.close(error)

    def _drop_receives(self) -> None:
        """What is in goes back to its pool now, the rest when UCX has ended it."""
        posted = [*self._expected.values(), *(a.rows for a in self._receives if a.rows is not None)]
        self._expected.clear()
        for rows in posted:
            if rows.status == IN_PROGRESS:
                self._port.cancel(rows.operation)
        arrivals, self._receives = self._receives, deque()
        for arrival in arrivals:
            if arrival.status != IN_PROGRESS:
                arrival.buffer.release()
