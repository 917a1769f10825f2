"""Keep one link open for ever: connect, wait until it closes, connect again.

The first retries are quick, since most losses are a peer being restarted on the same host; then full-jitter back-off up
to a cap, so that a hundred experts do not knock at a new router in step. A refused handshake (another secret, model,
epoch or protocol) goes straight to the cap and is logged every time it changes, and again once a minute: it is an
operator's mistake or a rolling restart in progress, and in both cases the process should come back by itself once the
other side agrees, not need a restart of its own.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable

from common.errors import AtollError, Fatal, LinkClosed, Retryable
from common.transport.base import Handler, Hello, Link, Transport

log = logging.getLogger(__name__)

_REMIND_S = 60.0


class _Watched:
    """Passes everything on to the real handler, and notes when the link closes."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.closed = asyncio.Event()
        # bound directly: a message costs no extra call
        self.on_open = handler.on_open
        self.on_message = handler.on_message
        self.on_control = handler.on_control
        self.on_landed = getattr(handler, "on_landed", None)  # see `LandedHandler`

    def on_close(self, link: Link, error: LinkClosed) -> None:
        log.info("link to %s closed: %s", link.peer.process, error)
        self.closed.set()
        self._handler.on_close(link, error)


def backoff_s(attempt: int, chance: float, *, first_s: float = 0.02, max_s: float = 1.0) -> float:
    """How long to wait before retry number `attempt` (from 0), in seconds; `chance` is uniform in [0, 1).

    Full jitter: uniform between half of `first_s` and a bound that doubles up to `max_s`.
    """
    bound = min(max_s, first_s * 2.0 ** min(attempt, 30))
    return first_s / 2 + chance * max(0.0, bound - first_s / 2)


class _Complaints:
    """Says each new reason once, and an old one again after a minute: retries are many, log lines should not be."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._last = ""
        self._said_at = 0.0

    def say(self, error: AtollError) -> None:
        now, text = time.monotonic(), str(error)
        if text == self._last and now - self._said_at < _REMIND_S:
            return
        self._last, self._said_at = text, now
        level = logging.ERROR if isinstance(error, Fatal) else logging.INFO
        log.log(level, "no link to %s yet, trying on: %s", self._address, text)


async def keep_connected(
    transport: Transport, address: str, hello: Callable[[], Hello], handler: Handler, *,
    connect_timeout_s: float = 5.0, first_s: float = 0.02, max_s: float = 1.0,
) -> None:  # fmt: skip
    """Hold a link to `address` until cancelled; then the link is closed.

    `hello` is called for each attempt, so that a new epoch or new facts take effect. Never returns on its own; errors
    that no retry can cure (a malformed address: ConfigError) are raised.
    """
    attempt = 0
    complaints = _Complaints(address)
    while True:
        watched = _Watched(handler)
        try:
            link = await transport.connect(address, hello(), watched, timeout_s=connect_timeout_s)
        except Fatal as exc:
            complaints.say(exc)
            await asyncio.sleep(max_s * (0.5 + 0.5 * random.random()))
            continue
        except Retryable as exc:
            complaints.say(exc)
            await asyncio.sleep(backoff_s(attempt, random.random(), first_s=first_s, max_s=max_s))
            attempt += 1
            continue
        opened_at = time.monotonic()
        try:
            await watched.closed.wait()
        finally:
            link.close("no longer wanted")
        # a peer that accepts and at once closes must not be dialled in a tight loop
        attempt = 0 if time.monotonic() - opened_at > max_s else attempt + 1
        await asyncio.sleep(backoff_s(attempt, random.random(), first_s=first_s, max_s=max_s))
