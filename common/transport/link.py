"""What every implementation of a link does alike: credits, the bounded queue, headers, delivery, closing.

A subclass moves whole messages (`_transmit`) and says how a call is deferred (`_defer`). A message is header and
payload in one piece of memory. The header lives in the payload's headroom; while an earlier send of the same payload
still reads that headroom, the payload is copied, since re-sending one payload is rare and a second message on the wire
costs more than copying 64 KiB.

Rows in device memory (`Buffer.rows`) travel beside the message, and go straight to where the receiver wants them: a
block of its pool, or for an answer the place that the asker named with its request (`landing`).
"""

import contextlib
import logging
import struct
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from common.errors import AtollError, Fatal, LinkClosed, Overloaded, WireError
from common.transport.base import Handler, Hello, Link, Ticket
from common.transport.buffers import Buffer, BufferPool
from common.transport.credits import CreditRules, Credits
from common.wire.header import ANSWERS, CREDITS_OFFSET, HEADER_NBYTES, Header, Kind, Landed

if TYPE_CHECKING:
    from common.transport.device import DeviceRows

log = logging.getLogger(__name__)

_pack_credits = struct.Struct("<I").pack_into
_MAX_LANDINGS = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """Bounds of one link. `window` is what this side grants its peer, in messages."""

    window: int = 64
    max_queued: int = 4096  # messages that wait for credit
    max_payload_nbytes: int = 256 << 20


class LinkState(StrEnum):
    """OPENING: the handshake is done, `on_open` has not been called."""

    OPENING = "opening"
    OPEN = "open"
    CLOSED = "closed"


class BaseLink(Link, ABC):
    """A link that knows its peer and its credits, but not how bytes move."""

    def __init__(
        self, mine: Hello, peer: Hello, handler: Handler, pool: BufferPool, limits: LinkLimits
    ) -> None:
        self.state = LinkState.OPENING
        self._mine = mine
        self._peer = peer
        self._handler = handler
        self._pool = pool
        self._limits = limits
        self._max_message_nbytes = HEADER_NBYTES + limits.max_payload_nbytes
        self._credits: CreditRules = Credits(limits.window, limits.window)
        self._queue: deque[tuple[bytearray, Buffer | None, DeviceRows | None]] = deque()
        self._landings: dict[int, DeviceRows] = {}  # answer number -> where its rows go
        self._error: LinkClosed | None = None
        # of a handler that has it: see `LandedHandler`
        self._on_landed: Any = getattr(handler, "on_landed", None)
        self._on_free: Callable[[], None] = self._freed  # one bound method for every message
        self.has_data = mine.data and peer.data

    def __repr__(self) -> str:
        credits = self._credits
        return (
            f"<Link {self._mine.process}->{self._peer.process} [credits {credits.available}"
            f"/{credits.send_window} | queued {len(self._queue)} | {self.state}]>"
        )

    @property
    def peer(self) -> Hello:
        return self._peer

    @property
    def mine(self) -> Hello:
        """What this side said of itself."""
        return self._mine

    # -- what a subclass provides

    @abstractmethod
    def _transmit(self, buffer: Buffer, landing: "DeviceRows | None") -> None:
        """Send `buffer.message`; takes over one reference, clears `headroom_busy` when the bytes are out.

        `buffer.rows` follow once their fence is passed; those of the answer are wanted at `landing`.
        """

    @abstractmethod
    def _defer(self, call: Callable[[], None]) -> None:
        """Make `call` soon, after the current callback has returned."""

    @abstractmethod
    def _detach(self, error: LinkClosed) -> None:
        """Close the means of transport. Nothing may be delivered afterwards."""

    @abstractmethod
    def _send_control(self, frame: dict[str, Any]) -> None:
        """Send one frame to the peer's `_take_control`. Raises LinkClosed."""

    # -- opening

    def _set_windows(self, send_window: int) -> None:
        """The peer said how many messages it takes. Raises WireError when that is nonsense."""
        if type(send_window) is not int or not 1 <= send_window < 1 << 20:
            raise WireError(f"{self._peer.process} grants a window of {send_window!r} messages")
        self._credits = Credits(send_window, self._limits.window)

    def _opened(self, peer: Hello) -> None:
        self._peer = peer
        self.state = LinkState.OPEN
        self._call(self._handler.on_open, self)

    # -- sending

    def post(
        self,
        header: Header,
        payload: Buffer | None = None,
        *,
        landing: "DeviceRows | None" = None,
    ) -> None:
        if self.state is not LinkState.OPEN:
            raise self._error or LinkClosed(f"the link to {self._peer.process} is not open yet")
        if not self.has_data:
            raise LinkClosed(f"the link to {self._peer.process} carries control frames only")
        header.rows_nbytes = header.payload_nbytes = header.credits = header.landed = 0
        if payload is not None:
            if payload.rows is not None:
                header.rows_nbytes = payload.rows.nbytes
                header.landed = self._has_landed(payload.rows)
            header.payload_nbytes = header.rows_nbytes + payload.nbytes
        if header.kind not in ANSWERS:  # an answer brings back the number of its request
            header.answer = 0 if landing is None else self._land(landing)
        try:
            if self._queue or self._credits.available == 0:
                self._enqueue(header, payload, landing)
                return
            buffer = self._message(payload)
            try:
                header.pack_into(buffer.view)
            except WireError:
                buffer.release()
                raise
        except (Overloaded, WireError):
            if landing is not None:  # nobody will answer
                self._landings.pop(header.answer).release()
            raise
        self._credits.available -= 1
        self._send(buffer, landing)

    def expect(self, ticket: "Ticket", landing: "DeviceRows | None") -> None:
        if landing is None:
            return
        landing.retain()
        if self.state is LinkState.OPEN:
            self._landings[ticket[2]] = landing
        else:  # it closed as the message was sent
            self._give_up(landing)

    def _has_landed(self, rows: "DeviceRows") -> bool:
        """Whether they were written where the peer wants them. Raises LinkClosed when somebody else wanted them."""
        link = rows.block.owner
        if link is None:
            return False
        if link is not self:
            raise LinkClosed("the rows are for a link that is gone")
        assert rows.block.offer == 0, "a neighbour's rows are not sent on: copy them"
        return True

    def _land(self, landing: "DeviceRows") -> int:
        """A number for the answer whose rows go there."""
        number = self._answer_number()
        self._landings[number] = landing.retain()
        return number

    def _answer_number(self) -> int:
        number = self._credits.answers = self._credits.answers % _MAX_LANDINGS + 1
        assert number not in self._landings, "an answer number in use"
        return number

    def _enqueue(
        self, header: Header, payload: Buffer | None, landing: "DeviceRows | None"
    ) -> None:
        if len(self._queue) >= self._limits.max_queued:
            raise Overloaded(
                f"{len(self._queue)} messages wait for {self._peer.process}, "
                f"the limit is {self._limits.max_queued}"
            )
        packed = bytearray(HEADER_NBYTES)  # the caller may reuse its header
        header.pack_into(packed)
        self._queue.append((packed, None if payload is None else payload.retain(), landing))

    def _message(self, payload: Buffer | None) -> Buffer:
        """A buffer whose headroom may be written to, with a reference for the send."""
        if payload is None:
            return self._pool.acquire(0)
        if not payload.headroom_busy:
            return payload.retain()
        copy = self._pool.acquire(payload.nbytes)
        copy.array[:] = payload.array
        if payload.rows is not None:
            copy.rows = payload.rows.retain()
        return copy

    def _send(self, buffer: Buffer, landing: "DeviceRows | None" = None) -> None:
        owed = self._credits.owed
        if owed:
            _pack_credits(buffer.view, CREDITS_OFFSET, self._credits.collect())
        buffer.headroom_busy = True
        self._transmit(buffer, landing)

    def _flush(self) -> None:
        """Send what waits, as far as credit goes."""
        while self._queue and self.state is LinkState.OPEN and self._credits.take():
            packed, payload, landing = self._queue.popleft()
            buffer = self._message(payload)
            if payload is not None:
                payload.release()
            buffer.view[:HEADER_NBYTES] = packed
            self._send(buffer, landing)

    def _freed(self) -> None:
        """A received message is done with."""
        if self._credits.freed():
            self._return_credits()

    def _return_credits(self) -> None:
        if self.state is LinkState.OPEN:
            buffer = self._pool.acquire(0)
            Header(Kind.CREDIT).pack_into(buffer.view)
            self._send(buffer)

    def send_control(self, message: dict[str, Any]) -> None:
        if self.state is not LinkState.OPEN:
            raise self._error or LinkClosed(f"the link to {self._peer.process} is not open yet")
        self._send_control({"m": message})

    # -- receiving

    def _read_header(self, buffer: Buffer, number: int = 0) -> Header | None:
        """The header of a whole message in `buffer`, checked, and a place for the rows that follow it (`buffer.rows`).

        None when a correct peer would not send it: then the link is closed.
        """
        try:
            header = Header.unpack_from(
                buffer.view, max_payload_nbytes=self._limits.max_payload_nbytes
            )
            if header.payload_nbytes != buffer.nbytes + header.rows_nbytes:
                raise WireError(
                    f"payload of {buffer.nbytes} bytes, its header says "
                    f"{header.payload_nbytes - header.rows_nbytes}"
                )
            if header.kind is not Kind.CREDIT:
                self._credits.arrived()
            landing = None
            if header.answer and header.kind in ANSWERS:
                landing = self._landings.pop(header.answer, None)
                if landing is None:
                    raise WireError(_wrong_place(header.answer, 0, None))
                buffer.rows = landing
            if header.landed and landing is None:
                raise WireError("rows that landed, though nobody waits for them")
            if header.rows_nbytes and landing is None:
                self._place(buffer, number, header.rows_nbytes)
            elif landing is not None and landing.nbytes != header.rows_nbytes:
                if header.kind is not Kind.FAILED or header.rows_nbytes:
                    raise WireError(_wrong_place(0, header.rows_nbytes, landing))
                buffer.rows = None
                landing.release()
        except WireError as exc:
            self._fail(WireError(f"{self._peer.process}: {exc}"))
            return None
        return header

    def _place(self, buffer: Buffer, number: int, nbytes: int) -> None:
        """Give message `number` room for its rows. Raises WireError when this process takes none."""
        del number
        buffer.rows = self._pool.acquire_rows(nbytes)

    def _deliver(self, header: Header, buffer: Buffer) -> None:
        """A whole message lies in `buffer`, whose reference is taken over."""
        if header.credits:
            try:
                self._credits.granted(header.credits)
            except WireError as exc:
                buffer.release()
                self._fail(WireError(f"{self._peer.process}: {exc}"))
                return
            if self._queue:
                self._flush()
        if (buffer.nbytes == 0 and buffer.rows is None) or header.kind is Kind.CREDIT:
            buffer.release()
            if header.kind is Kind.CREDIT:
                return
            self._freed()
            payload = None
        else:
            buffer.on_free = self._on_free
            payload = buffer
        try:
            self._handler.on_message(self, header, payload)
        except Exception as exc:
            self._handler_raised(exc)

    def deliver_landed(self, answer: Landed) -> None:
        """A header alone, whose rows have landed, for a handler that takes it in short; it is counted already."""
        landing = self._landings.get(answer.answer)
        if landing is None or landing.nbytes != answer.payload_nbytes:
            wrong = _wrong_place(answer.answer, answer.payload_nbytes, landing)
            self._fail(WireError(f"{self._peer.process}: {wrong}"))
            return
        del self._landings[answer.answer]
        self._flush()
        try:
            self._on_landed(self, answer, landing)
        except Exception as exc:
            self._handler_raised(exc)
        landing.release()
        if self._credits.is_due:
            self._return_credits()

    def _take_control(self, frame: dict[str, Any]) -> None:
        if "bye" in frame:
            self._close(LinkClosed(f"{self._peer.process} closed the link: {frame['bye']}"))
            return
        message = frame.get("m")
        if not isinstance(message, dict):
            raise WireError(f"control frame from {self._peer.process} carries no message")
        self._call(self._handler.on_control, self, message)

    # -- closing

    def close(self, reason: str) -> None:
        if self.state is LinkState.OPEN:
            with contextlib.suppress(AtollError):
                self._send_control({"bye": reason[:1000]})
        self._close(LinkClosed(f"link to {self._peer.process} closed here: {reason}"))

    def _fail(self, error: Fatal) -> None:
        log.error("closing the link to %s: %s", self._peer.process, error)
        self.close(str(error))

    def _close(self, error: LinkClosed) -> None:
        if self.state is LinkState.CLOSED:
            return
        opened = self.state is LinkState.OPEN
        self.state = LinkState.CLOSED
        self._error = error
        queued, self._queue = self._queue, deque()
        for _, payload, _ in queued:
            if payload is not None:
                payload.release()
        self._detach(error)
        for landing in self._landings.values():
            self._give_up(landing)
        self._landings.clear()
        if opened:
            self._defer(self._closed)

    def _give_up(self, landing: "DeviceRows") -> None:
        """No answer will come to that place."""
        landing.release()

    def _closed(self) -> None:
        assert self._error is not None
        try:
            self._handler.on_close(self, self._error)
        except Exception:
            log.exception("on_close of the link to %s raised", self._peer.process)

    def _call(self, callback: Callable[..., None], *args: object) -> None:
        try:
            callback(*args)
        except Exception as exc:
            self._handler_raised(exc)

    def _handler_raised(self, exc: Exception) -> None:
        log.error("handler of the link to %s raised", self._peer.process, exc_info=exc)
        self.close(f"{self._mine.process} failed: {type(exc).__name__}")


def _wrong_place(answer: int, nbytes: int, wanted: "DeviceRows | None") -> str:
    if wanted is None:
        return f"answer {answer}, which nobody waits for"
    return f"answer of {nbytes} bytes of rows, {wanted.nbytes} are wanted"
