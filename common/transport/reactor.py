"""UCX on an asyncio loop: one context and worker, progressed when its epoll descriptor says so. Idle costs nothing.

The only file that makes ucxx's objects (core API, private module: pinned in pyproject). The library's own `blocking`
mode arms its worker once and spins from the first event on; its asyncio endpoints cost 30 to 60 us per message. Here
`pump` polls the worker's port, lets the owner sweep, and goes back to sleep only when UCX agrees (`arm`).
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from common.errors import LinkClosed
from common.transport.carriers import carriers_of
from common.transport.port import AllLanded, Announced, Arrived, open_port, peer_of

log = logging.getLogger(__name__)

KIND_MESSAGE, KIND_SHIFT = 1, 56  # of a tag whose message is found by probing
_MAX_ROUNDS = 32  # rounds of progress before other callbacks of the loop get their turn


class Endpoint(Protocol):
    """UCX's way to one peer."""

    handle: int  # ucp_ep_h

    def remove_close_callback(self) -> None: ...

    def close_blocking(self, period: int, max_attempts: int) -> None: ...


class Reactor:
    """A UCX worker that lives on the running loop. `sweep` returns True while it finds work."""

    def __init__(
        self, arrived: Arrived, announced: Announced, landed: AllLanded, sweep: Callable[[], bool],
        is_busy: Callable[[], bool], *, spin_us: int = 0,
    ) -> None:  # fmt: skip
        """`arrived` takes messages, `announced` rows, `landed` answers whose rows are there. `is_busy`: something is
        under way that wakes nobody, so poll.

        `spin_us`: how long to poll after the last event before sleeping; only for a process with its own core.
        """
        # loaded here: whoever only talks to gateways or runs `inproc` needs no UCX
        from ucxx._lib import libucxx

        self._lib = libucxx
        self._told = arrived, announced, landed
        self._sweep = sweep
        self._is_busy = is_busy
        self._spin_ns = spin_us * 1000
        self._last_event_ns = 0
        self._pumping = False
        self._kicked = False
        wanted = libucxx.Feature
        features = wanted.TAG, wanted.AM, wanted.RMA, wanted.WAKEUP
        context = libucxx.UCXContext({}, features)
        self._worker: Any = libucxx.UCXWorker(context)
        self._worker.init_blocking_progress_mode()
        tag, mask = KIND_MESSAGE << KIND_SHIFT, 0xFF << KIND_SHIFT
        self.port = open_port(libucxx, context, self._worker, tag, mask)
        self.address = bytes(self._worker.address)
        self._loop = asyncio.get_running_loop()
        self._fd: int = self._worker.epoll_file_descriptor
        self._loop.add_reader(self._fd, self._readable)

    # -- what the transport does with it

    def endpoint(self, address: bytes, on_failed: Callable[[], None]) -> tuple[Endpoint, Any]:
        """An endpoint to a worker, and what the port calls it.

        A garbage address aborts the process: only ever one from an authenticated peer. `on_failed` is called while UCX
        progresses: it must only take a note. Raises LinkClosed.
        """
        try:
            parsed = self._lib.UCXAddress.create_from_buffer(address)
            endpoint: Any = self._lib.UCXEndpoint.create_from_worker_address(
                self._worker, parsed, True
            )
        except Exception as exc:
            raise LinkClosed(f"UCX cannot reach the peer's worker: {exc}") from exc
        endpoint.set_close_callback(lambda *_: on_failed())
        return endpoint, peer_of(self.port, endpoint)

    def carriers(self, endpoint: Endpoint) -> tuple[str, ...]:
        """What UCX chose for it, "transport/device"."""
        return carriers_of(endpoint.handle)

    def close_endpoint(self, endpoint: Endpoint) -> None:
        """Force it closed, dead peer or not: measured below 0.1 ms; its sends then end as cancelled."""
        endpoint.remove_close_callback()
        endpoint.close_blocking(0, 1)
        self.kick()  # events may have been consumed on the way

    def kick(self) -> None:
        """Pump soon: something was posted that only progress completes."""
        if not self._kicked and not self._pumping and self._worker is not None:
            self._kicked = True
            self._loop.call_soon(self._pump_kicked)

    def _readable(self) -> None:
        """UCX has something for us. It says so for as long as nobody arms it: who waits for what came goes first."""
        if not self._kicked:
            self.pump()

    def _pump_kicked(self) -> None:
        self._kicked = False
        self.pump()

    def pump(self) -> None:
        """Poll and sweep until UCX has nothing more to do, then let those go on who waited for what came."""
        if self._worker is None or self._pumping:
            return
        self._pumping = True
        poll, sweep = self.port.poll, self._sweep
        arrived, announced, landed = self._told
        has_worked = False
        try:
            for _ in range(_MAX_ROUNDS):
                if self._worker is None:  # closed by somebody who was called
                    return
                worked = poll(arrived, announced, landed)
                if sweep() or worked:
                    has_worked = True
                    continue
                if has_worked and (self._spin_ns or self._is_busy()):
                    self._last_event_ns = time.monotonic_ns()
                    break
                if not self._is_busy() and not self._spinning() and self.port.arm():
                    return
        except Exception:
            self._pumping = False
            self.kick()  # nothing would wake us for what is left
            raise
        finally:
            self._pumping = False
        self.kick()

    def _spinning(self) -> bool:
        return self._spin_ns > 0 and time.monotonic_ns() - self._last_event_ns < self._spin_ns

    def close(self, *, timeout_s: float) -> bool:
        """Leave the loop and destroy the worker; idempotent. All endpoints must be closed before.

        What is under way may end until the time is up; False when it did not. Every operation has ended afterwards.
        """
        if self._worker is None:
            return True
        self._loop.remove_reader(self._fd)
        deadline = time.monotonic() + timeout_s
        while self.port.num_open and time.monotonic() < deadline:
            self.port.poll(*self._told)
        done = not self.port.num_open
        self._worker = None
        self.port.settle()
        return done
