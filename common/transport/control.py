"""The control socket: handshake, then sealed JSON frames, over asyncio. One channel per link.

Decides when a peer is refused and when a socket is closed; what a frame means is the owner's business. Everything is
plain calls from the event loop: no task per channel. EOF, a broken frame or a full send buffer close the channel at
once; `on_lost` follows exactly once for every channel whose handshake ended well.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import orjson

from common.errors import AtollError, AuthError, LinkClosed, WireError
from common.transport.address import Address, BoundSocket, tune_tcp
from common.transport.base import Hello
from common.transport.handshake import NONCE_NBYTES, Handshake

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ControlLimits:
    """Bounds of the control sockets of one transport."""

    max_frame_nbytes: int = 16 << 20
    max_backlog_nbytes: int = 64 << 20  # unsent bytes to one peer before it counts as dead
    max_handshakes: int = 256  # unfinished ones per listener
    handshake_timeout_s: float = 5.0


class ChannelOwner(Protocol):
    """Who uses a channel."""

    def on_peer(self, channel: "Channel", peer: Hello) -> None:
        """The peer has proved itself."""
        ...

    def on_frame(self, channel: "Channel", frame: dict[str, Any]) -> None:
        """A sealed frame arrived. An AtollError raised here closes the channel."""
        ...

    def on_lost(self, channel: "Channel", error: AtollError) -> None:
        """The channel is closed; `error` says why."""
        ...


class Channel(asyncio.Protocol):
    """One control socket, either side."""

    def __init__(self, owner: ChannelOwner, handshake: Handshake, limits: ControlLimits) -> None:
        self._owner = owner
        self._handshake = handshake
        self._limits = limits
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._error: AtollError | None = None
        self._closed = False

    @property
    def where(self) -> str:
        """Names the peer in errors."""
        return self._handshake.where

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has a class of its own
        if self._closed:  # given up before it was connected
            self._transport.abort()
            return
        tune_tcp(transport.get_extra_info("socket"))

    def start(self) -> None:
        """Dialler only: send the first frame."""
        self._write(self._handshake.start())

    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        self._received += data
        try:
            while self._take_frame():
                pass
        except AtollError as exc:
            if self._handshake.refusal:
                self._write(self._handshake.refusal)
            self.close(exc)

    def _take_frame(self) -> bool:
        """Handle one complete frame; False when there is none."""
        if self._closed:
            return False
        before = len(self._received)
        if self._handshake.peer is None:
            answer = self._handshake.feed(self._received)
            if answer:
                self._write(answer)
            if self._handshake.peer is not None:
                self._owner.on_peer(self, self._handshake.peer)
            return len(self._received) < before
        body = self._handshake.unseal(self._received, self._limits.max_frame_nbytes)
        if body is None:
            return False
        try:
            frame = orjson.loads(body)
        except ValueError as exc:
            raise WireError(f"control frame from {self.where} is not JSON") from exc
        if not isinstance(frame, dict):
            raise WireError(f"control frame from {self.where} is not a JSON object")
        self._owner.on_frame(self, frame)
        return True

    def send(self, frame: dict[str, Any]) -> None:
        """Seal and queue one frame. Raises LinkClosed, or WireError above the frame limit."""
        if self._closed:
            raise self._error or LinkClosed(f"{self.where} is closed")
        body = orjson.dumps(frame)
        if len(body) > self._limits.max_frame_nbytes:
            raise WireError(
                f"control frame of {len(body)} bytes to {self.where}, "
                f"the limit is {self._limits.max_frame_nbytes}"
            )
        self._write(self._handshake.seal(body))
        assert self._transport is not None
        backlog = self._transport.get_write_buffer_size()
        if backlog > self._limits.max_backlog_nbytes:
            error = LinkClosed(f"{self.where} does not read its control socket: {backlog} bytes")
            self.close(error, at_once=True)
            raise error

    def _write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self, error: AtollError, *, at_once: bool = False) -> None:
        """Close for the reason `error`; idempotent. What was queued is still sent unless `at_once`."""
        if self._closed:
            return
        self._closed = True
        self._error = error
        if self._transport is not None:
            if at_once:
                self._transport.abort()
            else:
                self._transport.close()
        self._owner.on_lost(self, error)

    def connection_lost(self, exc: Exception | None) -> None:
        why = f": {exc}" if exc is not None else ""
        self.close(LinkClosed(f"{self.where} closed the control socket{why}"))
        self._transport = None


class Listener:
    """Accepts channels on one address, with a bound and a deadline on unfinished handshakes."""

    def __init__(
        self, bound: BoundSocket, secret: bytes, hello: Hello, accept: Callable[[], ChannelOwner],
        limits: ControlLimits,
    ) -> None:  # fmt: skip
        self.address = bound.address
        self._bound = bound
        self._secret = secret
        self._hello = hello
        self._accept = accept
        self._limits = limits
        self._server: asyncio.Server | None = None
        self._pending: dict[Channel, asyncio.TimerHandle] = {}

    async def start(self) -> None:
        """Begin to accept."""
        loop, sock = asyncio.get_running_loop(), self._bound.sock
        # started in two steps: cancelled within the first, a serving server would be out of reach
        if self.address.path:
            self._server = await loop.create_unix_server(
                self._new_channel, sock=sock, start_serving=False
            )
        else:
            self._server = await loop.create_server(
                self._new_channel, sock=sock, start_serving=False
            )
        await self._server.start_serving()

    def _new_channel(self) -> Channel:
        handshake = Handshake(
            self._secret,
            self._hello,
            dialling=False,
            nonce=os.urandom(NONCE_NBYTES),
            where=f"a peer on {self.address}",
        )
        channel = Channel(_Accepting(self), handshake, self._limits)
        timer = asyncio.get_running_loop().call_later(
            self._limits.handshake_timeout_s, self._expire, channel
        )
        self._pending[channel] = timer
        if len(self._pending) > self._limits.max_handshakes:
            # the oldest has had the most time: a burst of real peers wins over mute connections
            self._expire(next(iter(self._pending)))
        return channel

    def _expire(self, channel: Channel) -> None:
        channel.close(AuthError(f"{channel.where} did not finish its handshake"), at_once=True)

    def finished(self, channel: Channel) -> bool:
        """The handshake of `channel` ended, well or not; False when it was already forgotten."""
        timer = self._pending.pop(channel, None)
        if timer is None:
            return False
        timer.cancel()
        return True

    def close(self) -> None:
        """Stop accepting and drop unfinished handshakes; idempotent."""
        if self._server is not None:
            self._server.close()
        self._bound.close()
        for channel in list(self._pending):
            channel.close(LinkClosed(f"{self.address} stopped listening"), at_once=True)

    def take_over(self, channel: Channel, peer: Hello) -> None:
        """Hand an authenticated channel to its owner."""
        self.finished(channel)
        owner = self._accept()
        channel._owner = owner
        owner.on_peer(channel, peer)


class _Accepting:
    """Owner of a listener's channel until the peer has proved itself."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def on_peer(self, channel: Channel, peer: Hello) -> None:
        self._listener.take_over(channel, peer)

    def on_frame(self, channel: Channel, frame: dict[str, Any]) -> None:
        raise AssertionError("a sealed frame before the handshake's end")

    def on_lost(self, channel: Channel, error: AtollError) -> None:
        if self._listener.finished(channel):
            # probes of a health checker that send nothing are not worth a warning each
            log.log(
                logging.WARNING if isinstance(error, AuthError) else logging.DEBUG,
                "refused on %s: %s", self._listener.address, error,
            )  # fmt: skip


async def dial(
    address: Address, secret: bytes, hello: Hello, owner: ChannelOwner, limits: ControlLimits,
) -> Channel:  # fmt: skip
    """Connect and send the first frame. Raises LinkClosed when nobody listens there."""
    handshake = Handshake(
        secret, hello, dialling=True, nonce=os.urandom(NONCE_NBYTES), where=str(address)
    )
    loop = asyncio.get_running_loop()

    def factory() -> Channel:
        return Channel(owner, handshake, limits)

    try:
        if address.path:
            _, channel = await loop.create_unix_connection(factory, address.path)
        else:
            _, channel = await loop.create_connection(
                factory, address.host, address.port, family=_family(address.host)
            )
    except OSError as exc:
        raise LinkClosed(f"{address} cannot be reached: {exc.strerror or exc}") from exc
    channel.start()
    return channel


def _family(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_UNSPEC
