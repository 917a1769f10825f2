"""What all links of one process share over UCX: arrivals, completions, and what outlives a link.

When a link dies its endpoint is forced closed, which ends its operations. Memory goes back to the pool when UCX has
ended the operation and not before: a peer that is alive, when only the link was closed, or an RDMA engine may still
touch it. Device memory that a process of this host was about to read or write waits until that process is gone: stopped
for a while, it would go on where it was, and no queue pair that we destroy would keep it from our memory.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from common.errors import ConfigError, LinkClosed
from common.transport.base import Handler, Hello, Link
from common.transport.buffers import Buffer, BufferPool
from common.transport.link import LinkLimits
from common.transport.port import IN_PROGRESS, RowsPort, is_compiled
from common.transport.reactor import Reactor
from common.transport.seam import Seam
from common.transport.ucx_arrivals import SENDER_MASK, SENDER_SHIFT
from common.transport.ucx_link import UcxLink
from common.wire.header import HEADER_NBYTES, Landed

if TYPE_CHECKING:
    from common.transport.device import DeviceBlock, DevicePool, DeviceRows
    from common.transport.neighbour import Neighbour

log = logging.getLogger(__name__)

_landed: Callable[..., Landed] = tuple.__new__
_LAST_WORDS_S = 0.05  # what is under way may take when the transport closes
_LOOK_S = 1.0  # between two looks whether a process is gone; what it had begun ends within that


class DataPlane:
    """What all links of one process share: the UCX worker and the tags in use."""

    def __init__(
        self, pool: BufferPool, limits: LinkLimits, seam: Seam, *, spin_us: int,
        report: Callable[[UcxLink], None],
    ) -> None:  # fmt: skip
        """Starts UCX on the running loop. `report` is told of every open link.

        Raises ConfigError where rows lie apart and nothing can carry them.
        """
        if pool.apart and not is_compiled():
            raise ConfigError(
                "rows in device memory need the compiled port, for which there must be a C compiler"
            )
        self._report = report
        self.pool = pool
        self.limits = limits
        self.seam = seam
        self.loop = asyncio.get_running_loop()
        self.reactor = Reactor(
            self._arrived,
            self._announced,
            self._landed,
            self._sweep,
            self._is_busy,
            spin_us=spin_us,
        )
        # only a pool of device memory has rows to send and to take
        self.port = cast(RowsPort, self.reactor.port)
        seam.on_open = self.reactor.kick
        self.failed: list[UcxLink] = []
        self.links: dict[int, UcxLink] = {}  # by the sender id in their tags
        self._next_sender = 1
        self._retired: list[tuple[DeviceRows | DeviceBlock, int]] = []  # until the process is gone
        self._retired_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<DataPlane [{len(self.links)} links | {self.port.num_open} under way]>"

    def new_link(
        self, mine: Hello, peer: Hello, handler: Handler, opening: asyncio.Future[Link] | None
    ) -> UcxLink:
        """A link to an authenticated peer, or one about to be (`opening` is the dialler's future)."""
        sender, self._next_sender = self._next_sender, self._next_sender + 1
        if sender > SENDER_MASK:
            raise LinkClosed(f"this process has opened {SENDER_MASK} links: restart it")
        link = self.links[sender] = UcxLink(self, mine, peer, handler, sender, opening)
        return link

    def new_neighbour(self, sender: int) -> "Neighbour | None":
        """What a link offers to a peer on this host, which sends as `sender`; None where rows do not lie apart."""
        if not self.pool.apart:
            return None
        from common.transport.neighbour import Neighbour  # which imports torch

        try:
            return Neighbour(self.port, sender, cast("DevicePool", self.pool).device)
        except OSError as exc:  # too many open files, no memory
            log.warning("a peer on this host will be reached by UCX alone: %s", exc)
            return None

    def opened(self, link: UcxLink) -> None:
        """Report it, then deliver what overtook the control socket."""
        self._report(link)
        link.deliver_early()
        self.reactor.kick()

    def _is_busy(self) -> bool:
        """True while the device works on something that no file descriptor will report."""
        return self.seam.is_open or (self.pool.polled and self.port.num_open > 0)

    def _arrived(self, tag: int, nbytes: int, message: Any) -> None:  # noqa: ANN401  -- the port's
        link = self.links.get(tag >> SENDER_SHIFT & SENDER_MASK)
        if link is None:
            self._discard(nbytes, message)
        else:
            link.arrive(tag, nbytes, message)

    def _announced(self, tag: int, head: bytes, nbytes: int, data: int) -> None:
        link = self.links.get(tag >> SENDER_SHIFT & SENDER_MASK)
        if link is None:
            self.port.discard_rows(data)
        else:
            link.announced(tag, head, nbytes, data)

    def _landed(self, found: list[tuple[int, tuple[int, ...]]]) -> None:
        """Answers whose rows are where they are wanted."""
        for sender, fields in found:
            if self.seam.is_open:  # what the device has written goes before the next is handled
                self.seam.poll()
            link = self.links.get(sender)  # none: it has closed since
            if link is not None:
                link.deliver_landed(_landed(Landed, fields))

    def _sweep(self) -> bool:
        """What UCX does not tell of; True when there was anything to do."""
        worked = self.seam.is_open and self.seam.poll()
        while self.failed:
            self.failed.pop().fail()
        return worked

    def _discard(self, nbytes: int, message: Any) -> None:  # noqa: ANN401
        """A message for a link that is gone: UCX wants it received all the same."""
        if type(message) is not bytes and nbytes <= HEADER_NBYTES + self.limits.max_payload_nbytes:
            buffer = self.pool.acquire(max(0, nbytes - HEADER_NBYTES))
            ended = partial(_discarded, buffer)
            if self.port.receive(message, buffer.address, nbytes, ended) != IN_PROGRESS:
                buffer.release()

    def forget(self, sender: int) -> None:
        """A link is closed and its endpoint too."""
        self.links.pop(sender, None)

    def retire(self, rows: "DeviceRows | DeviceBlock", pid: int) -> None:
        """Release rows, or a block's, when a process of this host, which may still read or write them, is gone."""
        self._retired.append((rows, pid))
        if self._retired_timer is None:
            self._retired_timer = self.loop.call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        retired, self._retired = self._retired, []
        for rows, pid in retired:
            if Path(f"/proc/{pid}").exists():
                self._retired.append((rows, pid))
            else:
                rows.release()
        again = self.loop.call_later(_LOOK_S, self._look) if self._retired else None
        self._retired_timer = again

    def close(self) -> None:
        """Stop UCX; every link must be closed. Gives all memory back."""
        if not self.reactor.close(timeout_s=_LAST_WORDS_S):
            log.warning("UCX has not ended all operations; their worker is destroyed")
        if self._retired_timer is not None:
            self._retired_timer.cancel()
        for rows, _ in self._retired:
            rows.release()
        self._retired.clear()


def _discarded(buffer: Buffer, status: int) -> None:
    del status
    buffer.release()
