"""The production transport: data messages over UCX, everything else over authenticated control sockets.

Decides when links and listeners come and go; `ucx_link`, `ucx_messages`, `ucx_arrivals` and `ucx_plane` move the data,
`neighbour` what stays on a host, `control` and `handshake` prove who is there, `reactor` is the only file that knows
UCX's library.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from common.errors import DeadlineExceeded, LinkClosed
from common.transport.address import Address, bind
from common.transport.base import Handler, Hello, Link
from common.transport.buffers import BufferPool
from common.transport.carriers import LinkClass, complaint
from common.transport.control import Channel, ControlLimits, Listener, dial
from common.transport.link import LinkLimits
from common.transport.seam import Seam
from common.transport.ucx_link import UcxLink
from common.transport.ucx_plane import DataPlane

log = logging.getLogger(__name__)


class UcxTransport:
    """Links over UCX on the running loop. One per process."""

    def __init__(
        self, secret: bytes, *, link_limits: LinkLimits | None = None,
        control_limits: ControlLimits | None = None, spin_us: int = 0,
        pool: BufferPool | None = None, seam: Seam | None = None,
        expected_class: Callable[[Hello, Hello], LinkClass] | None = None,
    ) -> None:  # fmt: skip
        """`secret` is the cluster's, at least 16 bytes. UCX itself starts with the first listen or connect.

        `spin_us`: microseconds of polling after each event, only for a process with a core of its own. `pool` and
        `seam` belong to a device (`common.transport.device`); without them payloads are whole, in host memory.
        `expected_class` of a link, from this side's Hello and the peer's: another one is a warning in the log.
        """
        self._pool = pool or BufferPool()
        self._seam = seam or Seam()
        self._secret = secret
        self._link_limits = link_limits or LinkLimits()
        self._control_limits = control_limits or ControlLimits()
        self._spin_us = spin_us
        self._expected_class = expected_class
        self._plane: DataPlane | None = None
        self._answerer: object = None
        self._forwarder: object = None
        self._listeners: list[Listener] = []
        self._is_closed = False

    def __repr__(self) -> str:
        num_links = 0 if self._plane is None else len(self._plane.links)
        return (
            f"<UcxTransport [{num_links} links | {len(self._listeners)} listeners | {self._pool}]>"
        )

    @property
    def pool(self) -> BufferPool:
        """Buffers for payloads."""
        return self._pool

    @property
    def seam(self) -> Seam:
        """What the device has still to do before messages may go."""
        return self._seam

    def _start(self) -> DataPlane:
        if self._is_closed:
            raise LinkClosed("the transport is closed")
        if self._plane is None:
            self._plane = DataPlane(
                self._pool,
                self._link_limits,
                self._seam,
                spin_us=self._spin_us,
                report=self._report,
            )
            if self._answerer is not None:
                self._plane.port.answer_with(self._answerer)
            if self._forwarder is not None:
                self._plane.port.forward_with(self._forwarder)
        return self._plane

    def answer_with(self, answerer: object) -> None:
        """See `Transport.answer_with`."""
        if self._pool.apart:  # which needs the compiled port
            self._answerer = answerer

    def forward_with(self, forwarder: object) -> None:
        """See `Transport.forward_with`."""
        if self._pool.apart:
            self._forwarder = forwarder

    async def listen(self, address: str, hello: Hello, handler: Handler) -> str:
        """See `Transport.listen`. Raises ConfigError when the address is wrong or in use."""
        plane = self._start()
        listener = Listener(
            bind(Address.parse(address)),
            self._secret,
            hello,
            lambda: plane.new_link(hello, hello, handler, None),
            self._control_limits,
        )
        self._listeners.append(listener)
        try:
            await listener.start()
        except BaseException:
            listener.close()
            self._listeners.remove(listener)
            raise
        return str(listener.address)

    async def connect(
        self, address: str, hello: Hello, handler: Handler, *, timeout_s: float
    ) -> Link:
        """See `Transport.connect`."""
        parsed = Address.parse(address)
        plane = self._start()
        opening: asyncio.Future[Link] = plane.loop.create_future()
        link = plane.new_link(hello, hello, handler, opening)
        channel: Channel | None = None
        try:
            async with asyncio.timeout(timeout_s):
                channel = await dial(parsed, self._secret, hello, link, self._control_limits)
                return await opening
        except BaseException as exc:
            # also when the link opened in the very moment in which the caller was cancelled
            opening.cancel()
            link.close("connect was given up")
            if channel is not None:
                channel.close(LinkClosed("connect was given up"), at_once=True)
            with contextlib.suppress(asyncio.CancelledError):
                opening.exception()  # seen, else the loop would report it as forgotten
            if isinstance(exc, TimeoutError):
                raise DeadlineExceeded(f"{address} did not answer within {timeout_s} s") from exc
            raise

    def _report(self, link: UcxLink) -> None:
        """Log what carries a new link; loudly when it should be something else."""
        if not (carriers := link.carriers()):
            return
        name = f"link {link.mine.process}->{link.peer.process}"
        log.info("%s is carried by %s", name, " ".join(carriers))
        if self._expected_class is not None:
            text = complaint(carriers, self._expected_class(link.mine, link.peer))
            if text:
                log.warning("%s: %s; atoll doctor finds out why", name, text)

    def carriers(self) -> dict[str, list[str]]:
        """See `Transport.carriers`."""
        links = () if self._plane is None else self._plane.links.values()
        return {str(link.peer.process): list(link.carriers()) for link in links if link.carriers()}

    async def close(self) -> None:
        """See `Transport.close`. All is done before its only wait, so cancelling it loses nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        if self._plane is not None:
            for link in list(self._plane.links.values()):
                link.close("the transport is closing")
            self._plane.close()
        await asyncio.sleep(0)  # the loop calls every on_close
        await asyncio.sleep(0)  # and closes the control sockets
