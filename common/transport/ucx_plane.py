"""What all links of one process share over UCX: arrivals, completions, and what outlives a link.

When a link dies its endpoint is forced closed, which ends every request on it (measured, shared memory and tcp, peer
killed or closed). The memory of those requests stays out of the pool for a while all the same: a peer that is alive,
when only the link was closed, or an RDMA engine may still touch it.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from common.errors import LinkClosed
from common.transport.base import Handler, Hello, Link
from common.transport.buffers import Buffer, BufferPool
from common.transport.link import LinkLimits
from common.transport.reactor import IN_PROGRESS, Probed, Reactor, Request
from common.transport.seam import Seam
from common.transport.ucx_link import SENDER_MASK, SENDER_SHIFT, UcxLink
from common.wire.header import HEADER_NBYTES

log = logging.getLogger(__name__)

_MAX_ARRIVALS = 256  # per sweep, so that a flood cannot keep completions and timers waiting
_QUARANTINE_S = 60.0


class DataPlane:
    """What all links of one process share: the UCX worker, the tags in use, requests that outlived their link."""

    def __init__(
        self,
        pool: BufferPool,
        limits: LinkLimits,
        seam: Seam,
        *,
        spin_us: int,
        report: Callable[[UcxLink], None],
    ) -> None:
        """Starts UCX on the running loop. `report` is told of every open link."""
        self._report = report
        self.pool = pool
        self.limits = limits
        self.seam = seam
        self.loop = asyncio.get_running_loop()
        self.reactor = Reactor(self._sweep, self._is_busy, spin_us=spin_us)
        seam.on_open = self.reactor.kick
        self.sending: set[UcxLink] = set()
        self.receiving: set[UcxLink] = set()
        self.failed: list[UcxLink] = []
        self.links: dict[int, UcxLink] = {}  # by the sender id in their tags
        self._next_sender = 1
        # being received for links that are gone, and what outlived its link; each with the call that ends it
        self._strays: list[tuple[Request, Callable[[], None]]] = []
        self._quarantine: deque[tuple[float, Request, Callable[[], None]]] = deque()

    def __repr__(self) -> str:
        return f"<DataPlane [{len(self.links)} links | {len(self._quarantine)} in quarantine]>"

    def new_link(
        self, mine: Hello, peer: Hello, handler: Handler, opening: asyncio.Future[Link] | None
    ) -> UcxLink:
        """A link to an authenticated peer, or one about to be (`opening` is the dialler's future)."""
        sender, self._next_sender = self._next_sender, self._next_sender + 1
        if sender > SENDER_MASK:
            raise LinkClosed(f"this process has opened {SENDER_MASK} links: restart it")
        self._leave_quarantine()
        link = self.links[sender] = UcxLink(self, mine, peer, handler, sender, opening)
        return link

    def opened(self, link: UcxLink) -> None:
        """Report it, then deliver what overtook the control socket."""
        self._report(link)
        link.sweep_receives()
        self.reactor.kick()

    def receive(self, buffer: Buffer, probed: Probed) -> Request:
        """Receive a probed message, at most as large as `buffer`, whose view of its memory is cached."""
        array = buffer.received_as
        if array is None:
            array = buffer.received_as = self.reactor.array(buffer.view)
        return self.reactor.receive(array, probed)

    def _is_busy(self) -> bool:
        """True while the device works on something that no file descriptor will report."""
        return self.seam.is_open or (self.pool.polled and bool(self.sending or self.receiving))

    def _sweep(self) -> bool:
        """Take arrivals, then look at what was under way; True when there was anything to do."""
        probe, links = self.reactor.probe, self.links
        worked = self.seam.is_open and self.seam.poll()
        for _ in range(_MAX_ARRIVALS):
            probed = probe()
            if not probed.matched:
                break
            worked = True
            tag = probed.sender_tag.value
            link = links.get(tag >> SENDER_SHIFT & SENDER_MASK)
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
        if probed.length <= HEADER_NBYTES + self.limits.max_payload_nbytes:
            buffer = self.pool.acquire(max(0, probed.length - HEADER_NBYTES))
            self._strays.append((self.receive(buffer, probed), buffer.release))

    def forget(self, link: UcxLink, sender: int) -> None:
        """`link` is closed and its endpoint too: what UCX has not ended yet goes to quarantine."""
        self.links.pop(sender, None)
        self.sending.discard(link)
        self.receiving.discard(link)
        now = time.monotonic()
        left = [*link.sends, *((a.request, a.buffer.release) for a in link.receives)]
        left += [(request, rows.release) for request, rows in link.expected.values()]
        for request, ended in left:
            if not _ended(request, ended):
                self._quarantine.append((now, request, ended))
        link.sends.clear()
        link.receives.clear()
        link.expected.clear()
        self._leave_quarantine()

    def _leave_quarantine(self) -> None:
        oldest = time.monotonic() - _QUARANTINE_S
        while self._quarantine and self._quarantine[0][0] < oldest:
            if not _ended(*self._quarantine[0][1:]):
                return
            self._quarantine.popleft()

    def close(self) -> None:
        """Stop UCX; every link must be closed. Gives all memory back."""
        rest = [(request, ended) for _, request, ended in self._quarantine] + self._strays
        done = self.reactor.drain(
            lambda: all(request.status != IN_PROGRESS for request, _ in rest), timeout_s=0.05
        )
        if not done:
            log.warning(
                "UCX has not ended all of %d requests; their worker is destroyed", len(rest)
            )
        self.reactor.close()
        for _, ended in rest:
            ended()
        self._quarantine.clear()
        self._strays.clear()


def _ended(request: Request, ended: Callable[[], None]) -> bool:
    """Make the call that ends a request if UCX is done with it; False when it is not."""
    if request.status == IN_PROGRESS:
        return False
    ended()
    return True
