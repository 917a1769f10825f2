"""UCX on an asyncio loop: one context and worker, progressed when its epoll descriptor says so. Idle costs nothing.

The only file that imports ucxx (core API, private module: pinned in pyproject). The library's own `blocking` mode arms
its worker once and spins from the first event on; its asyncio endpoints cost 30 to 60 us per message. Here `pump`
progresses, lets the owner sweep arrivals and completions, and goes back to sleep only when UCX agrees (`arm`).
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from common.errors import LinkClosed
from common.transport.carriers import carriers_of

log = logging.getLogger(__name__)

IN_PROGRESS = 1  # ucs_status_t; 0 is success, below 0 an error
KIND_MESSAGE, KIND_SHIFT = 1, 56  # of a tag whose message is found by probing
_MAX_ROUNDS = 32  # rounds of progress before other callbacks of the loop get their turn


class Request(Protocol):
    """A send or receive under way. Dropping it cancels it, and it keeps no reference to its memory."""

    status: int


class Tag(Protocol):
    """A 64-bit tag."""

    value: int


class Probed(Protocol):
    """A message taken off UCX's queue and not received yet."""

    matched: bool  # False: there was none, and the rest is not there
    length: int  # bytes
    sender_tag: Tag


class Endpoint(Protocol):
    """UCX's way to one peer."""

    handle: int  # ucp_ep_h

    def tag_send(self, array: object, tag: Tag) -> Request:
        """Post a send; the memory must stay until it ended."""
        ...

    def tag_recv(self, array: object, tag: Tag) -> Request:
        """Post a receive of exactly this peer's message; the memory must stay until it ended."""
        ...

    def remove_close_callback(self) -> None: ...

    def close_blocking(self, period: int, max_attempts: int) -> None: ...


class Reactor:
    """A UCX worker that lives on the running loop. `sweep` returns True while it finds work."""

    def __init__(
        self, sweep: Callable[[], bool], is_busy: Callable[[], bool], *, spin_us: int = 0
    ) -> None:
        """`is_busy`: something is under way that wakes nobody, so poll. `spin_us`: how long to poll after the last
        event before sleeping; only for a process with its own core.
        """
        # loaded here: whoever only talks to gateways or runs `inproc` needs no UCX
        from ucxx._lib import libucxx
        from ucxx._lib.arr import Array

        self._lib = libucxx
        self.array: Callable[[Any], object] = Array
        self.tag: Callable[[int], Tag] = libucxx.UCXXTag
        self._message_tag = libucxx.UCXXTag(KIND_MESSAGE << KIND_SHIFT)
        self._kind_mask = libucxx.UCXXTagMask(0xFF << KIND_SHIFT)
        self._sweep = sweep
        self._is_busy = is_busy
        self._spin_ns = spin_us * 1000
        self._last_event_ns = 0
        self._pumping = False
        self._kicked = False
        context = libucxx.UCXContext({}, (libucxx.Feature.TAG, libucxx.Feature.WAKEUP))
        self._worker: Any = libucxx.UCXWorker(context)
        self._worker.init_blocking_progress_mode()
        self.address = bytes(self._worker.address)
        self._loop = asyncio.get_running_loop()
        self._fd: int = self._worker.epoll_file_descriptor
        self._loop.add_reader(self._fd, self.pump)

    # -- what the transport does with it

    def probe(self) -> Probed:
        """Take the oldest message (not rows) that nobody received yet off the queue, if there is one: `matched`."""
        probed: Probed = self._worker.tag_probe(self._message_tag, self._kind_mask, True)
        return probed

    def receive(self, array: object, probed: Probed) -> Request:
        """Receive a probed message into `array`, whose memory holds at least `probed.length` bytes."""
        request: Request = self._worker.tag_recv_with_handle(array, probed)
        return request

    def endpoint(self, address: bytes, on_failed: Callable[[], None]) -> Endpoint:
        """An endpoint to a worker. A garbage address aborts the process: only ever one from an authenticated peer.

        `on_failed` is called while UCX progresses: it must only take a note.
        """
        try:
            parsed = self._lib.UCXAddress.create_from_buffer(address)
            endpoint: Any = self._lib.UCXEndpoint.create_from_worker_address(
                self._worker, parsed, True
            )
        except Exception as exc:
            raise LinkClosed(f"UCX cannot reach the peer's worker: {exc}") from exc
        endpoint.set_close_callback(lambda *_: on_failed())
        made: Endpoint = endpoint
        return made

    def carriers(self, endpoint: Endpoint) -> tuple[str, ...]:
        """What UCX chose for it, "transport/device"."""
        return carriers_of(endpoint.handle)

    def close_endpoint(self, endpoint: Endpoint) -> None:
        """Force it closed, dead peer or not: measured below 0.1 ms; its requests then end as cancelled."""
        endpoint.remove_close_callback()
        endpoint.close_blocking(0, 1)
        self.kick()  # events may have been consumed on the way

    def kick(self) -> None:
        """Pump soon: something was posted that only progress completes."""
        if not self._kicked and not self._pumping and self._worker is not None:
            self._kicked = True
            self._loop.call_soon(self._pump_kicked)

    def _pump_kicked(self) -> None:
        self._kicked = False
        self.pump()

    def pump(self) -> None:
        """Progress and sweep until UCX has nothing more to do."""
        worker = self._worker
        if worker is None or self._pumping:
            return
        self._pumping = True
        try:
            for _ in range(_MAX_ROUNDS):
                worker.progress()
                if self._sweep():
                    if self._spin_ns:
                        self._last_event_ns = time.monotonic_ns()
                    continue
                if self._worker is None:
                    return
                if not self._is_busy() and not self._spinning() and worker.arm():
                    return
        finally:
            self._pumping = False
        self.kick()

    def _spinning(self) -> bool:
        return self._spin_ns > 0 and time.monotonic_ns() - self._last_event_ns < self._spin_ns

    def drain(self, is_done: Callable[[], bool], *, timeout_s: float) -> bool:
        """Progress without sleeping until `is_done` or the time is up: only while closing."""
        deadline = time.monotonic() + timeout_s
        while not is_done():
            if self._worker is None or time.monotonic() > deadline:
                return False
            self._worker.progress()
        return True

    def close(self) -> None:
        """Leave the loop and destroy the worker; idempotent. All endpoints must be closed before."""
        if self._worker is None:
            return
        self._loop.remove_reader(self._fd)
        self._worker = None
