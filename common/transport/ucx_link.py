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
from common.transport.reactor import (
    IN_PROGRESS,
    KIND_MESSAGE,
    KIND_SHIFT,
    Endpoint,
    Probed,
    Request,
)
from common.wire.header import ANSWER_OFFSET, ANSWERS, HEADER_NBYTES, Header

if TYPE_CHECKING:
    from common.transport.device import DeviceRows
    from common.transport.ucx_plane import DataPlane

log = logging.getLogger(__name__)

_KIND_ROWS, _KIND_ANSWER_ROWS = 2, 3  # KIND_MESSAGE (1): header and payload, or header and tables
SENDER_SHIFT = 32
SENDER_MASK, _SEQUENCE_MASK = (1 << 24) - 1, (1 << 32) - 1
_MAX_CACHED_SIZES = 8  # UCX views kept per buffer, one per message size: 1.3 us saved per message
_FIRST_FRAME_S = 5.0  # how long an authenticated dialler may take to say what it needs

_KIND_OFFSET = 3  # of a header's `kind`
_read_answer = struct.Struct("<I").unpack_from


@dataclass(slots=True)
class _Arrival:
    """A message on its way in: first itself, then (with a header) its rows if they come apart."""

    request: Request
    buffer: Buffer
    header: Header | None = None


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
        self._tag_base = 0
        self._num_sent = 0
        self._num_received = 0
        self.sends: deque[tuple[Request, Callable[[], None]]] = deque()  # and what ends each
        self.receives: deque[_Arrival] = deque()
        # receives posted for the rows of answers, by answer number
        self.expected: dict[int, tuple[Request, DeviceRows]] = {}

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
                self._endpoint = self._reactor.endpoint(worker, self._endpoint_failed)
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

    # -- data

    def _transmit(self, buffer: Buffer) -> None:
        nbytes = HEADER_NBYTES + buffer.nbytes
        views = buffer.sent_as
        if views is None:
            views = buffer.sent_as = {}
        array = views.get(nbytes)
        if array is None:
            if len(views) >= _MAX_CACHED_SIZES:
                views.clear()
            array = views[nbytes] = self._reactor.array(buffer.view[:nbytes])
        sequence, self._num_sent = self._num_sent, (self._num_sent + 1) & _SEQUENCE_MASK
        rows, tag = buffer.rows, 0
        if rows is not None:  # read now: the buffer may be gone when its own message is out
            (answer,) = _read_answer(buffer.view, ANSWER_OFFSET)
            answer = answer if buffer.view[_KIND_OFFSET] in ANSWERS else 0
            tag = self._rows_tag(sequence, answer)
            rows.retain()
        self._send_array(array, self._tag_base | sequence, partial(_sent, buffer))
        if rows is None:
            return
        if rows.fence is None or rows.fence.passed:
            self._send_rows(rows, tag)
        else:
            rows.fence.then(partial(self._send_rows, rows, tag))

    def _send_rows(self, rows: "DeviceRows", tag: int) -> None:
        """The device has written the rows: send them, taking over a reference."""
        if self.state is not LinkState.OPEN:
            rows.release()
            return
        self._send_array(rows.view(self._reactor.array), tag, rows.release)

    def _rows_tag(self, sequence: int, answer: int) -> int:
        sender = self._tag_base & SENDER_MASK << SENDER_SHIFT
        kind, number = (_KIND_ANSWER_ROWS, answer) if answer else (_KIND_ROWS, sequence)
        return kind << KIND_SHIFT | sender | number

    def _send_array(self, array: object, tag: int, ended: Callable[[], None]) -> None:
        endpoint = self._endpoint
        if endpoint is None:  # the link closed within `post`
            ended()
            return
        try:
            request = endpoint.tag_send(array, self._reactor.tag(tag))
            status = request.status
        except Exception as exc:
            # not raised: `post` is not the only caller, and a closed link says what is lost by itself
            ended()
            self._close(LinkClosed(f"{self._peer.process} is gone: {exc}"))
            return
        if status == 0:
            ended()
            return
        self.sends.append((request, ended))
        self._plane.sending.add(self)
        self._reactor.kick()

    def sweep_sends(self) -> bool:
        """Release what is out, in the order posted; True when something was."""
        sends, worked = self.sends, False
        while sends:
            request, ended = sends[0]
            status = request.status
            if status == IN_PROGRESS:
                break
            worked = True
            sends.popleft()
            ended()
            if status < 0:
                self._close(LinkClosed(f"{self._peer.process} is gone: send failed ({status})"))
        return worked

    def _expect(self, answer: int, rows: "DeviceRows") -> None:
        tag = _KIND_ANSWER_ROWS << KIND_SHIFT | self._sender << SENDER_SHIFT | answer
        request = self._receive_rows(rows, tag)
        if request is not None:
            self.expected[answer] = (request, rows.retain())

    def _unexpect(self, answer: int) -> None:
        request_and_rows = self.expected.pop(answer, None)
        if request_and_rows is not None:
            _, rows = request_and_rows
            del request_and_rows  # dropping a request cancels it
            rows.release()

    def _receive_rows(self, rows: "DeviceRows", tag: int) -> Request | None:
        """Post a receive; None when the link closed over it."""
        if self._endpoint is None:
            return None
        try:
            return self._endpoint.tag_recv(rows.view(self._reactor.array), self._reactor.tag(tag))
        except Exception as exc:
            self._close(LinkClosed(f"{self._peer.process} is gone: {exc}"))
            return None

    def arrive(self, tag: int, probed: Probed) -> None:
        """A message of this link was probed: receive it, or close the link when it must not be received."""
        nbytes = probed.length
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
        request, header = self._plane.receive(buffer, probed), None
        if self.state is LinkState.OPEN and request.status == 0:
            header = self._read_header(buffer)
            if header is None:
                return
            if buffer.rows is None and not self.receives:
                self._deliver(header, buffer)
                return
        arrival = _Arrival(request, buffer, header)
        if header is not None and not self._expect_rows(arrival, header, sequence):
            return
        if header is not None and not self.receives and self._is_whole(arrival):
            self._deliver(header, buffer)
            return
        self.receives.append(arrival)
        self._plane.receiving.add(self)

    def _open_arrival(self, arrival: _Arrival, sequence: int) -> bool:
        """The message is in: read its header and see to its rows. False when the link closed over it."""
        header = arrival.header = self._read_header(arrival.buffer)
        return header is not None and self._expect_rows(arrival, header, sequence)

    def _expect_rows(self, arrival: _Arrival, header: Header, sequence: int) -> bool:
        """Receive the rows of a message if they come apart. False when the link closed over it."""
        rows = arrival.buffer.rows
        if rows is None:
            return True
        if header.kind in ANSWERS and header.answer in self.expected:
            arrival.request, expected = self.expected.pop(header.answer)
            expected.release()
            return True
        tag = _KIND_ROWS << KIND_SHIFT | self._sender << SENDER_SHIFT | sequence
        request = self._receive_rows(rows, tag)
        if request is None:
            arrival.buffer.release()
            return False
        arrival.request = request
        return True

    def _is_whole(self, arrival: _Arrival) -> bool:
        return arrival.header is not None and (
            arrival.buffer.rows is None or arrival.request.status == 0
        )

    def sweep_receives(self) -> bool:
        """Deliver what is complete, in order; True when something was."""
        receives, worked = self.receives, False
        first = (self._num_received - len(receives)) & _SEQUENCE_MASK
        while receives and self.state is LinkState.OPEN:
            arrival = receives[0]
            status = arrival.request.status
            if status == IN_PROGRESS:
                break
            worked = True
            receives.popleft()
            if status != 0:
                arrival.buffer.release()
                self._close(LinkClosed(f"{self._peer.process} is gone: receive failed ({status})"))
                break
            if arrival.header is None and not self._open_arrival(arrival, first):
                break
            if not self._is_whole(arrival):
                receives.appendleft(arrival)
                continue
            first = (first + 1) & _SEQUENCE_MASK
            assert arrival.header is not None
            self._deliver(arrival.header, arrival.buffer)
        return worked

    # -- closing

    def _defer(self, call: Callable[[], None]) -> None:
        self._plane.loop.call_soon(call)

    def _detach(self, error: LinkClosed) -> None:
        if self._opening is not None and not self._opening.done():
            self._opening.set_exception(error)
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            self._reactor.close_endpoint(endpoint)
        if self._deadline is not None:
            self._deadline.cancel()
        self._plane.forget(self, self._sender)
        if self._channel is not None:
            self._channel.close(error)


def _sent(buffer: Buffer) -> None:
    buffer.headroom_busy = False
    buffer.release()
