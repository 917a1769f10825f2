"""What every contract test needs: a network of either kind, a handler that records, a loop with a time limit."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from common.errors import LinkClosed
from common.ids import ProcessId, Role
from common.transport.base import Hello, Link, Transport
from common.transport.buffers import Buffer
from common.transport.control import ControlLimits
from common.transport.device import DevicePool, open_seam
from common.transport.environment import set_ucx_environment
from common.transport.inproc import InprocFabric
from common.transport.link import LinkLimits
from common.transport.ucx import UcxTransport
from common.wire.header import Header, Kind

DEVICE = os.environ.get("ATOLL_TEST_DEVICE", "cpu")  # that processes share
set_ucx_environment(local=True, device=DEVICE)

SECRET = b"a secret of thirty-two bytes, ok"
LIMITS = LinkLimits(window=8, max_queued=16, max_payload_nbytes=16 << 20)


def hello(role=Role.EXPERT, index=0, **changes) -> Hello:
    values = {"node": 0, "pid": os.getpid(), "model": "m0", "epoch": 1, "wire": "fp8"}
    return Hello(ProcessId(role, index), **(values | changes))


ROUTER = hello(Role.ROUTER)


class Peer:
    """A handler that records everything, may answer, and can be waited on."""

    def __init__(self, *, echo: bool = False, hold: bool = False) -> None:
        self.echo, self.hold = echo, hold
        self.links: list[Link] = []
        self.messages: list[tuple[Header, bytes]] = []
        self.controls: list[dict] = []
        self.closed: list[tuple[Link, LinkClosed]] = []
        self.held: list[Buffer] = []
        self.calls: list[tuple[str, Link]] = []
        self._changed = asyncio.Event()

    def on_open(self, link):
        self.links.append(link)
        self._note("open", link)

    def on_message(self, link, header, payload):
        self.messages.append((header, b"" if payload is None else bytes(payload.array)))
        if self.echo:
            link.post(header, payload)
        if payload is not None:
            if self.hold:
                self.held.append(payload)
            else:
                payload.release()
        self._note("message", link)

    def on_control(self, link, message):
        self.controls.append(message)
        self._note("control", link)

    def on_close(self, link, error):
        self.closed.append((link, error))
        self._note("close", link)

    def _note(self, what, link):
        self.calls.append((what, link))
        self._changed.set()

    async def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._changed.clear()
            await self._changed.wait()

    def let_go(self) -> None:
        held, self.held = self.held, []
        for buffer in held:
            buffer.release()


class InprocNet:
    """Transports on one fabric."""

    kind = "inproc"

    def __init__(self, path: Path) -> None:
        self._fabric = InprocFabric(seed=7)
        self.transports: list[Transport] = []
        self._num_addresses = 0

    def transport(self, limits: LinkLimits = LIMITS) -> Transport:
        made = self._fabric.transport(link_limits=limits)
        self.transports.append(made)
        return made

    def address(self) -> str:
        self._num_addresses += 1
        return f"unix:/{self._num_addresses}"


class UcxNet:
    """Transports over UCX and Unix sockets in one process: each has a context and worker of its own."""

    kind = "ucx"

    def __init__(self, path: Path) -> None:
        self._path = path
        self.transports: list[Transport] = []
        self._num_addresses = 0

    def transport(self, limits: LinkLimits = LIMITS, **options) -> UcxTransport:
        control = options.pop("control", ControlLimits())
        made = UcxTransport(SECRET, link_limits=limits, control_limits=control, **options)
        self.transports.append(made)
        return made

    def address(self) -> str:
        self._num_addresses += 1
        return f"unix:{self._path}/{self._num_addresses}.sock"


class DeviceUcxNet(UcxNet):
    """Rows lie apart, in the memory of `device`."""

    device = "cpu"

    def transport(self, limits=LIMITS, **options) -> UcxTransport:
        options = {"pool": DevicePool(self.device), "seam": open_seam(self.device)} | options
        return super().transport(limits, **options)


Net = InprocNet | UcxNet


def run(
    net: Net, main: Callable[[], Awaitable[None]], *, loop: str = "uvloop", leak_free: bool = True
) -> None:
    """Run a test's coroutine under a time limit, close what it opened, and check that no buffer leaked."""

    async def guarded() -> None:
        try:
            async with asyncio.timeout(30):
                await main()
        finally:
            for transport in net.transports:
                await transport.close()
            await asyncio.sleep(0.01)

    (uvloop.run if loop == "uvloop" else asyncio.run)(guarded())
    if leak_free:
        assert [transport.pool.outstanding for transport in net.transports] == [0] * len(
            net.transports
        )


async def pair(
    net: Net, here: Peer, there: Peer, limits: LinkLimits = LIMITS
) -> tuple[Link, Link, Transport, Transport]:
    """A link between two fresh transports: (dialler's end, listener's end, dialler, listener)."""
    dialler, listener = net.transport(limits), net.transport(limits)
    address = await listener.listen(net.address(), ROUTER, there)
    link = await dialler.connect(address, hello(), here, timeout_s=5)
    await there.until(lambda: bool(there.links))
    return link, there.links[-1], dialler, listener


def send(transport: Transport, link: Link, body: bytes, **fields) -> None:
    """Post one message whose payload is `body`."""
    payload = None
    if body:
        payload = transport.pool.acquire(len(body))
        payload.view[128 : 128 + len(body)] = body
    try:
        link.post(Header(Kind.EXPERT_IN, **fields), payload)
    finally:
        if payload is not None:
            payload.release()


def send_apart(transport: Transport, link: Link, rows: int, tables: int, **fields) -> None:
    """Post one message of so many bytes of rows in memory of their own, and of tables."""
    payload = transport.pool.acquire(rows + tables, rows_nbytes=rows)
    try:
        link.post(Header(Kind.EXPERT_IN, **fields), payload)
    finally:
        payload.release()
