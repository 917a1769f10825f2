"""The data plane over UCX tags: links, arrivals, completions, and what outlives a link.

A tag is ``kind u8 | sender u24 | sequence u32``. `sender` is given out by the *receiver* at the handshake and never
reused while the process lives (16 million links), so a message still under way from a dead predecessor finds no link.
`sequence` counts per link and direction; anything but the next number closes the link.

Receiving costs by arrival, not by peer: one wildcard probe takes the oldest message with its exact size, checked
against the limit before memory is taken from the pool. Small messages are complete at once; large ones (rendezvous)
complete later, and what came behind them on the same link waits its turn.

When a link dies its endpoint is forced closed, which ends every request on it (measured, shared memory and tcp, peer
killed or closed). The memory of those requests stays out of the pool for a while all the same: a peer that is alive,
when only the link was closed, or an RDMA engine may still touch it.
"""

import asyncio
import base64
import binascii
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from common.errors import AtollError, AuthError, LinkClosed, WireError
from common.transport.base import Handler, Hello, Link
from common.transport.buffers import Buffer, BufferPool
from common.transport.control import Channel
from common.transport.link import BaseLink, LinkLimits, LinkState
from common.transport.reactor import IN_PROGRESS, Endpoint, Probed, Reactor, Request
from common.wire.header import HEADER_NBYTES

log = logging.getLogger(__name__)

_KIND_MESSAGE = 1  # header and payload in one piece; 2 is kept for payloads in device memory
_KIND_SHIFT, _SENDER_SHIFT = 56, 32
_SENDER_MASK, _SEQUENCE_MASK = (1 << 24) - 1, (1 << 32) - 1
_MAX_ARRIVALS = 256  # per sweep, so that a flood cannot keep completions and timers waiting
_MAX_CACHED_SIZES = 8  # UCX views kept per buffer, one per message size: 1.3 us saved per message
_QUARANTINE_S = 60.0
_FIRST_FRAME_S = 5.0  # how long an authenticated dialler may take to say what it needs


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
        self.sends: deque[tuple[Request, Buffer]] = deque()
        self.receives: deque[tuple[Request, Buffer]] = deque()

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
                if type(sender) is not int or not 0 < sender <= _SENDER_MASK or not worker:
                    raise ValueError("sender or worker")
                self._tag_base = _KIND_MESSAGE << _KIND_SHIFT | sender << _SENDER_SHIFT
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
        tag = self._reactor.tag(self._tag_base | self._num_sent)
        self._num_sent = (self._num_sent + 1) & _SEQUENCE_MASK
        assert self._endpoint is not None
        try:
            request = self._endpoint.tag_send(array, tag)
            status = request.status
        except Exception as exc:
            # not raised: `post` is not the only caller, and a closed link says what is lost by itself
            buffer.headroom_busy = False
            buffer.release()
            self._close(LinkClosed(f"{self._peer.process} is gone: {exc}"))
            return
        if status == 0:
            buffer.headroom_busy = False
            buffer.release()
            return
        self.sends.append((request, buffer))
        self._plane.sending.add(self)
        self._reactor.kick()

    def sweep_sends(self) -> bool:
        """Release what is out, in the order posted; True when something was."""
        sends, worked = self.sends, False
        while sends:
            request, buffer = sends[0]
            status = request.status
            if status == IN_PROGRESS:
                break
            worked = True
            sends.popleft()
            buffer.headroom_busy = False
            buffer.release()
            if status < 0:
                self._close(LinkClosed(f"{self._peer.process} is gone: send failed ({status})"))
        return worked

    def arrive(self, tag: int, probed: Probed) -> None:
        """A message of this link was probed: receive it, or close the link when it must not be received."""
        nbytes = probed.length
        sequence = tag & _SEQUENCE_MASK
        if (
            sequence != self._num_received
            or tag >> _KIND_SHIFT != _KIND_MESSAGE
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
        request = self._plane.receive(buffer, probed)
        if request.status == 0 and not self.receives and self.state is LinkState.OPEN:
            self._deliver(buffer)
            return
        self.receives.append((request, buffer))
        self._plane.receiving.add(self)

    def sweep_receives(self) -> bool:
        """Deliver what is complete, in order; True when something was."""
        receives, worked = self.receives, False
        while receives and self.state is LinkState.OPEN:
            request, buffer = receives[0]
            status = request.status
            if status == IN_PROGRESS:
                break
            worked = True
            receives.popleft()
            if status == 0:
                self._deliver(buffer)
            else:
                buffer.release()
                self._close(LinkClosed(f"{self._peer.process} is gone: receive failed ({status})"))
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


class DataPlane:
    """What all links of one process share: the UCX worker, the tags in use, requests that outlived their link."""

    def __init__(self, pool: BufferPool, limits: LinkLimits, *, spin_us: int) -> None:
        """Starts UCX on the running loop."""
        self.pool = pool
        self.limits = limits
        self.loop = asyncio.get_running_loop()
        self.reactor = Reactor(self._sweep, spin_us=spin_us)
        self.sending: set[UcxLink] = set()
        self.receiving: set[UcxLink] = set()
        self.failed: list[UcxLink] = []
        self.links: dict[int, UcxLink] = {}  # by the sender id in their tags
        self._next_sender = 1
        self._strays: list[tuple[Request, Buffer]] = []  # being received for links that are gone
        self._quarantine: deque[tuple[float, Request, Buffer]] = deque()

    def __repr__(self) -> str:
        return f"<DataPlane [{len(self.links)} links | {len(self._quarantine)} in quarantine]>"

    def new_link(
        self, mine: Hello, peer: Hello, handler: Handler, opening: asyncio.Future[Link] | None
    ) -> UcxLink:
        """A link to an authenticated peer, or one about to be (`opening` is the dialler's future)."""
        sender, self._next_sender = self._next_sender, self._next_sender + 1
        if sender > _SENDER_MASK:
            raise LinkClosed(f"this process has opened {_SENDER_MASK} links: restart it")
        self._leave_quarantine()
        link = self.links[sender] = UcxLink(self, mine, peer, handler, sender, opening)
        return link

    def opened(self, link: UcxLink) -> None:
        """Deliver what overtook the control socket."""
        link.sweep_receives()
        self.reactor.kick()

    def receive(self, buffer: Buffer, probed: Probed) -> Request:
        """Receive a probed message, at most as large as `buffer`, whose view of its memory is cached."""
        array = buffer.received_as
        if array is None:
            array = buffer.received_as = self.reactor.array(buffer.view)
        return self.reactor.receive(array, probed)

    def _sweep(self) -> bool:
        """Take arrivals, then look at what was under way; True when there was anything to do."""
        probe, links = self.reactor.probe, self.links
        worked = False
        for _ in range(_MAX_ARRIVALS):
            probed = probe()
            if not probed.matched:
                break
            worked = True
            tag = probed.sender_tag.value
            link = links.get(tag >> _SENDER_SHIFT & _SENDER_MASK)
            if link is None:
                self._discard(probed)
            else:
                link.arrive(tag, probed)
        while self.failed:
            self.failed.pop().fail()
        if self.receiving:
            for link in list(self.receiving):
                worked |= link.sweep_receives()
                if not link.receives:
                    self.receiving.discard(link)
        if self.sending:
            for link in list(self.sending):
                worked |= link.sweep_sends()
                if not link.sends:
                    self.sending.discard(link)
        if self._strays:
            self._strays = [s for s in self._strays if not _ended(*s)]
        return worked

    def _discard(self, probed: Probed) -> None:
        """A message for a link that is gone: UCX wants it received all the same."""
        if HEADER_NBYTES <= probed.length <= HEADER_NBYTES + self.limits.max_payload_nbytes:
            buffer = self.pool.acquire(probed.length - HEADER_NBYTES)
            request = self.receive(buffer, probed)
            if not _ended(request, buffer):
                self._strays.append((request, buffer))

    def forget(self, link: UcxLink, sender: int) -> None:
        """`link` is closed and its endpoint too: what UCX has not ended yet goes to quarantine."""
        self.links.pop(sender, None)
        self.sending.discard(link)
        self.receiving.discard(link)
        now = time.monotonic()
        for request, buffer in (*link.sends, *link.receives):
            if not _ended(request, buffer):
                self._quarantine.append((now, request, buffer))
        link.sends.clear()
        link.receives.clear()
        self._leave_quarantine()

    def _leave_quarantine(self) -> None:
        oldest = time.monotonic() - _QUARANTINE_S
        while self._quarantine and self._quarantine[0][0] < oldest:
            if not _ended(*self._quarantine[0][1:]):
                return
            self._quarantine.popleft()

    def close(self) -> None:
        """Stop UCX; every link must be closed. Gives all memory back."""
        rest = [(request, buffer) for _, request, buffer in self._quarantine] + self._strays
        done = self.reactor.drain(
            lambda: all(request.status != IN_PROGRESS for request, _ in rest), timeout_s=0.05
        )
        if not done:
            log.warning(
                "UCX has not ended all of %d requests; their worker is destroyed", len(rest)
            )
        self.reactor.close()
        for _, buffer in rest:
            buffer.headroom_busy = False
            buffer.release()
        self._quarantine.clear()
        self._strays.clear()


def _ended(request: Request, buffer: Buffer) -> bool:
    """Release the buffer of a request that UCX is done with; False when it is not."""
    if request.status == IN_PROGRESS:
        return False
    buffer.headroom_busy = False
    buffer.release()
    return True
