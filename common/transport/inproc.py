"""Links inside one process, for tests and simulation: same codec, credits and contract as UCX, scripted network.

A fabric is the network: it has a clock in microseconds that only moves when told, and a queue of events ordered by due
time. Everything random comes from its seed, so a run replays exactly. Two ways to drive it:

- without any event loop: `listen_now`, `connect_now`, `post`, then `run_until_idle()` or `advance(us)`;
- under asyncio: the async methods of `Transport`; events run on the loop by themselves, in virtual time (a delay costs
  no real time), unless the fabric is made with ``automatic=False``.

Order holds within a link and direction; across links, messages overtake one another as their delays say, and events
due in the same microsecond run in random order. A lost message closes its link: on an open link nothing is ever lost.
"""

import asyncio
import heapq
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import orjson

from common.errors import ConfigError, DeadlineExceeded, LinkClosed
from common.ids import ProcessId
from common.transport.base import Handler, Hello, Link
from common.transport.buffers import Buffer, BufferPool
from common.transport.handshake import check_claims
from common.transport.link import BaseLink, LinkLimits, LinkState
from common.transport.seam import Seam

if TYPE_CHECKING:
    from common.transport.device import DeviceRows

LOST = -1  # a script's answer: this message does not arrive, and its link closes
Script = Callable[[ProcessId, ProcessId, random.Random], int]

_NO_DEVICE = Seam()
_MAX_EVENTS = 10_000_000
_EVENTS_PER_TICK = 1000


class _Lane:
    """One direction of a link, data or control: keeps order."""

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last = (0, 0.0)


class InprocFabric:
    """The network, its clock and its seed."""

    def __init__(
        self, seed: int = 0, *, script: Script | None = None, automatic: bool = True
    ) -> None:
        """`script(sender, receiver, random)` gives each message's delay in microseconds, or LOST; default 0."""
        self.now_us = 0
        self.script = script
        self.random = random.Random(seed)
        self.listening: dict[str, tuple[InprocTransport, Hello, Handler]] = {}
        self._automatic = automatic
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_scheduled = False
        self._num_events = 0
        self._next_port = 1
        self._events: list[tuple[int, float, int, Callable[[], None]]] = []

    def __repr__(self) -> str:
        return f"<InprocFabric [{self.now_us} us | {len(self._events)} events]>"

    def transport(
        self, *, link_limits: LinkLimits | None = None, pool: BufferPool | None = None
    ) -> "InprocTransport":
        """One process's transport on this network."""
        return InprocTransport(self, link_limits or LinkLimits(), pool or BufferPool())

    def delay_us(self, sender: ProcessId, receiver: ProcessId) -> int:
        """What the script says about the next message, in microseconds, or LOST."""
        return 0 if self.script is None else self.script(sender, receiver, self.random)

    def schedule(self, delay_us: int, call: Callable[[], None], lane: _Lane | None = None) -> None:
        """Make `call` in `delay_us`, and after everything else that is in `lane`."""
        due, tie = self.now_us + delay_us, self.random.random()
        if lane is not None:
            due, tie = lane.last = max((due, tie), lane.last)
        self._num_events += 1
        heapq.heappush(self._events, (due, tie, self._num_events, call))
        self._wake()

    def _wake(self) -> None:
        if self._loop is not None and self._automatic and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        self._is_scheduled = False
        for _ in range(_EVENTS_PER_TICK):
            if not self.step():
                return
        self._wake()

    def attach(self) -> None:
        """Run events on the running loop from now on (if automatic)."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._is_scheduled = loop, False

    def step(self) -> bool:
        """Run the next event, moving the clock to it; False when there is none."""
        if not self._events:
            return False
        due, _, _, call = heapq.heappop(self._events)
        self.now_us = max(self.now_us, due)
        call()
        return True

    def run_until_idle(self, *, max_events: int = _MAX_EVENTS) -> int:
        """Run everything that is under way; returns the number of events. Raises RuntimeError when it never ends."""
        for num_events in range(max_events):
            if not self.step():
                return num_events
        raise RuntimeError(f"not idle after {max_events} events")

    def advance(self, us: int) -> int:
        """Move the clock by `us` microseconds and run what falls due; returns the number of events."""
        until, num_events = self.now_us + us, 0
        while self._events and self._events[0][0] <= until:
            self.step()
            num_events += 1
        self.now_us = max(self.now_us, until)
        return num_events

    def bind(self, address: str) -> str:
        """A free address: itself, or for port 0 one with the port filled in. Raises ConfigError when taken."""
        if address.startswith("tcp://") and address.endswith(":0"):
            address = f"{address[:-1]}{self._next_port}"
            self._next_port += 1
        if address in self.listening:
            raise ConfigError(f"cannot listen on {address}: Address already in use")
        return address


class InprocLink(BaseLink):
    """One end of a link within the process."""

    def __init__(
        self, transport: "InprocTransport", mine: Hello, peer: Hello, handler: Handler
    ) -> None:
        super().__init__(mine, peer, handler, transport.pool, transport.link_limits)
        self.other: InprocLink | None = None
        self._transport = transport
        self._fabric = transport.fabric
        self._data = _Lane()
        self._control = _Lane()
        self._in_flight: dict[Buffer, None] = {}  # a set has no order of its own

    def open(self, other: "InprocLink") -> None:
        """Join two ends; each side grants its own window."""
        self.other = other
        self._set_windows(other._limits.window)
        self._transport.links[self] = None
        self._opened(self._peer)

    def vanish(self, reason: str) -> None:
        """This side is gone without a word: no callback here, `on_close` there."""
        peer_name = self._mine.process
        self.state = LinkState.CLOSED
        self._error = LinkClosed(reason)
        self._drop_all()
        other = self.other
        if other is not None:
            self._fabric.schedule(0, lambda: other._close(LinkClosed(f"{peer_name} {reason}")))

    def _transmit(self, buffer: Buffer, landing: "DeviceRows | None") -> None:
        del landing  # rows are copied to where they are wanted
        self._in_flight[buffer] = None
        delay_us = self._fabric.delay_us(self._mine.process, self._peer.process)
        if delay_us == LOST:
            self._fabric.schedule(0, self._lose, self._data)
        else:
            self._fabric.schedule(delay_us, lambda: self._arrive(buffer), self._data)

    def _lose(self) -> None:
        error = "lost a message"
        if self.other is not None:
            self.other._close(LinkClosed(f"the link to {self._mine.process} {error}"))
        self._close(LinkClosed(f"the link to {self._peer.process} {error}"))

    def _arrive(self, buffer: Buffer) -> None:
        if buffer not in self._in_flight:
            return  # the link closed under way
        assert self.other is not None
        copy = None
        header = None
        if self.other.state is LinkState.OPEN:
            copy = self.other._pool.acquire(buffer.nbytes)
            copy.message[:] = buffer.message
            header = self.other._read_header(copy)
            if header is None:
                copy.release()
        if header is not None and buffer.rows is not None:
            assert copy is not None
            assert copy.rows is not None
            copy.rows.tensor.copy_(buffer.rows.tensor)
        del self._in_flight[buffer]
        buffer.headroom_busy = False
        buffer.release()
        if header is not None and copy is not None:
            self.other._deliver(header, copy)

    def _send_control(self, frame: dict[str, Any]) -> None:
        other, body = self.other, orjson.dumps(frame)
        if other is not None:
            self._fabric.schedule(0, lambda: other._hear(body), self._control)

    def _hear(self, body: bytes) -> None:
        if self.state is LinkState.OPEN:
            self._take_control(orjson.loads(body))

    def _defer(self, call: Callable[[], None]) -> None:
        self._fabric.schedule(0, call)

    def _detach(self, error: LinkClosed) -> None:
        self._drop_all()
        other = self.other
        if other is not None:
            gone = LinkClosed(f"{self._mine.process} closed the link")
            self._fabric.schedule(0, lambda: other._close(gone), self._control)

    def _drop_all(self) -> None:
        for buffer in self._in_flight:
            buffer.headroom_busy = False
            buffer.release()
        self._in_flight.clear()
        self._transport.links.pop(self, None)


class InprocTransport:
    """Links on an `InprocFabric`."""

    def __init__(self, fabric: InprocFabric, link_limits: LinkLimits, pool: BufferPool) -> None:
        self.fabric = fabric
        self.link_limits = link_limits
        self.links: dict[InprocLink, None] = {}
        self._pool = pool
        self._addresses: list[str] = []
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<InprocTransport [{len(self.links)} links | {self._pool}]>"

    @property
    def pool(self) -> BufferPool:
        """Buffers for payloads."""
        return self._pool

    @property
    def seam(self) -> Seam:
        """Nothing computes on a device here."""
        return _NO_DEVICE

    def answer_with(self, answerer: object) -> None:
        """There are no neighbours here."""

    def forward_with(self, forwarder: object) -> None:
        """Likewise."""

    def carriers(self) -> dict[str, list[str]]:
        """See `Transport.carriers`."""
        return {str(link.peer.process): ["inproc"] for link in self.links if link.has_data}

    def listen_now(self, address: str, hello: Hello, handler: Handler) -> str:
        """`listen` without an event loop."""
        if self._is_closed:
            raise LinkClosed("the transport is closed")
        bound = self.fabric.bind(address)
        self.fabric.listening[bound] = (self, hello, handler)
        self._addresses.append(bound)
        return bound

    def connect_now(self, address: str, hello: Hello, handler: Handler) -> Link:
        """`connect` without an event loop: both `on_open` are called before it returns.

        Raises LinkClosed when nobody listens there, AuthError when the two sides do not agree.
        """
        if self._is_closed:
            raise LinkClosed("the transport is closed")
        if address not in self.fabric.listening:
            raise LinkClosed(f"{address} cannot be reached: Connection refused")
        peer_transport, peer_hello, peer_handler = self.fabric.listening[address]
        check_claims(hello, peer_hello)
        near = InprocLink(self, hello, peer_hello, handler)
        far = InprocLink(peer_transport, peer_hello, hello, peer_handler)
        near.other = far  # before the listener's on_open, which may already post
        far.open(near)
        near.open(far)
        return near

    async def listen(self, address: str, hello: Hello, handler: Handler) -> str:
        """See `Transport.listen`."""
        self.fabric.attach()
        await asyncio.sleep(0)
        return self.listen_now(address, hello, handler)

    async def connect(
        self, address: str, hello: Hello, handler: Handler, *, timeout_s: float
    ) -> Link:
        """See `Transport.connect`."""
        self.fabric.attach()
        reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.fabric.schedule(0, lambda: None if reached.done() else reached.set_result(None))
        try:
            async with asyncio.timeout(timeout_s):
                await reached
        except TimeoutError as exc:
            raise DeadlineExceeded(f"{address} did not answer within {timeout_s} s") from exc
        return self.connect_now(address, hello, handler)

    def close_now(self) -> None:
        """`close` without an event loop; `on_close` calls are events of the fabric."""
        self._is_closed = True
        for address in self._addresses:
            self.fabric.listening.pop(address, None)
        self._addresses.clear()
        for link in list(self.links):
            link.close("the transport is closing")

    def crash(self) -> None:
        """As if the process was killed: no callback here, `on_close` at every peer, addresses free again."""
        self._is_closed = True
        for address in self._addresses:
            self.fabric.listening.pop(address, None)
        self._addresses.clear()
        for link in list(self.links):
            link.vanish("was killed")

    async def close(self) -> None:
        """See `Transport.close`."""
        self.close_now()
        self.fabric.attach()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
