"""The life of a service process: start -> ready -> draining -> stopped, with every task in one group.

`run_service` is the whole of a `services/<role>/__main__.py`. It reads the cluster file, runs the service on uvloop
and turns signals into the two things that can be asked of a service:

    SIGTERM         drain: finish what is in flight, accept nothing new, then stop
    SIGTERM again   stop at once; the drain deadline (limits.drain_deadline_s) does the same
    SIGINT          ignored: whoever launched the process handles Ctrl-C for all of them

Where somebody else than the launcher sends SIGTERM to every process at once (Slurm), `--stop-signal USR1` takes its
place and SIGTERM is ignored, so that the launcher's order of stopping holds.

Exit codes: 0 stopped on request; 1 crashed; 2 the input is wrong (`Rejected`), so a restart cannot help. Codes 1 and 2
leave one sentence as the last line on stderr. Under systemd (NOTIFY_SOCKET) readiness, stopping and the watchdog are
reported.
"""

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import uvloop

from common import config as cluster_config
from common.config import ClusterConfig
from common.errors import AtollError, Rejected
from common.ids import ProcessId, Role
from common.obs import log

STOP_DEADLINE_S = 3.0
STOP_SIGNALS = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1}

logger = logging.getLogger("atoll.service")


class State(StrEnum):
    """Where a service is in its life; the values are those of `/cluster`."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class Service(Protocol):
    """What `run_service` drives. All three are awaited once, in this order, in the loop's one thread."""

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Listen, dial, put every task into `tasks`; return when ready. A task that raises ends the process."""
        ...

    async def drain(self) -> None:
        """Accept nothing new and return when nothing is in flight. May be cancelled at any await."""
        ...

    async def stop(self) -> None:
        """Close links and sockets. Also called after a failed start, a crash of a task or a cut-off drain.

        `tasks` is cancelled after it. Runs for at most STOP_DEADLINE_S.
        """
        ...


def run_service(
    build: Callable[[ClusterConfig, int], Service], role: Role, argv: Sequence[str] | None = None
) -> int:
    """Parse `--cluster F --index I`, build the service and run it until it is told to stop; returns the exit code."""
    name = str(role)
    try:
        arguments = _parse(role, argv)
        name = str(ProcessId(role, arguments.index))
        log.setup(arguments.log_level)
        config = cluster_config.load(arguments.cluster)
        config.process(role, arguments.index)
        _one_thread_per_process()
        logger.info("%s pid %d: %s", name, os.getpid(), " ".join(config.to_toml().split("\n")))
        service = build(config, arguments.index)
        lifecycle = Lifecycle(
            service,
            drain_deadline_s=config.limits.drain_deadline_s,
            stop_signal=STOP_SIGNALS[arguments.stop_signal],
        )
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(lifecycle.run())
    except Exception as exc:
        return _report(name, exc)
    return 0


class Lifecycle:
    """Runs one service; `request_stop` is the only way in from outside."""

    def __init__(
        self,
        service: Service,
        *,
        drain_deadline_s: float,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.state = State.STARTING
        self._stop_signal = stop_signal
        self._service = service
        self._drain_deadline_s = drain_deadline_s
        self._num_stop_requests = 0
        self._stop_wanted = asyncio.Event()
        self._limit: asyncio.Timeout | None = None  # of the phase that a stop may cut short

    def __repr__(self) -> str:
        return f"<Lifecycle [{self.state} | stop requests {self._num_stop_requests}]>"

    async def run(self) -> None:
        """The whole life. Raises what `start`, `drain`, `stop` or a task raised, in an ExceptionGroup."""
        loop = asyncio.get_running_loop()
        if self._stop_signal is not signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        loop.add_signal_handler(self._stop_signal, self.request_stop)
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._live(tasks)
                raise _Stopped  # the group's way to cancel what still runs
        except* _Stopped:
            pass
        finally:
            self.state = State.STOPPED
            loop.remove_signal_handler(self._stop_signal)

    def request_stop(self) -> None:
        """Drain and stop; while starting, or when asked again, stop at once."""
        self._num_stop_requests += 1
        self._stop_wanted.set()
        at_once = self.state is State.STARTING or self._num_stop_requests > 1
        if at_once and self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time())

    async def _live(self, tasks: asyncio.TaskGroup) -> None:
        try:
            if await self._bounded(lambda: self._service.start(tasks), None):
                gc.collect()
                gc.freeze()  # what was loaded stays: later collections need not walk through it
                self._become(State.READY, "READY=1")
                _start_watchdog(tasks)
                logger.info("ready; UCX environment: %s", _ucx_environment())
                await self._stop_wanted.wait()
            self._become(State.DRAINING, "STOPPING=1")
            if not await self._bounded(self._service.drain, self._drain_deadline_s):
                logger.warning("stopped before everything in flight was finished")
        finally:
            try:
                async with asyncio.timeout(STOP_DEADLINE_S):
                    await self._service.stop()
            except TimeoutError:
                logger.warning("stop did not end within %g s", STOP_DEADLINE_S)

    async def _bounded(
        self, phase: Callable[[], Coroutine[Any, Any, None]], limit_s: float | None
    ) -> bool:
        """Await a phase unless a stop or `limit_s` seconds cut it short; True when it ended by itself."""
        if self._num_stop_requests > (1 if self.state is State.DRAINING else 0):
            return False
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                self._limit = limit
                await phase()
        except TimeoutError:
            if not limit.expired():
                raise
            return False
        finally:
            self._limit = None
        return True

    def _become(self, state: State, notification: str) -> None:
        self.state = state
        notify(notification)


class _Stopped(Exception):  # noqa: N818
    """Ends the task group without being an error."""


def notify(message: str) -> None:
    """Tell systemd; does nothing without NOTIFY_SOCKET. A supervisor that is gone is not our failure."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(message.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError as exc:
            logger.warning("systemd was not told %s: %s", message, exc)


def _start_watchdog(tasks: asyncio.TaskGroup) -> None:
    interval_us = int(os.environ.get("WATCHDOG_USEC", "0"))
    if interval_us > 0 and "NOTIFY_SOCKET" in os.environ:
        tasks.create_task(_watchdog(interval_us / 2e6), name="watchdog")


async def _watchdog(interval_s: float) -> None:
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)


def _parse(role: Role, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"services.{role}", description=f"Run one {role} process."
    )
    parser.add_argument("--cluster", type=Path, required=True, help="cluster TOML")
    parser.add_argument("--index", type=int, required=True, help=f"which {role} of the cluster")
    parser.add_argument("--log-level", choices=log.LEVELS, default="info")
    parser.add_argument("--stop-signal", choices=list(STOP_SIGNALS), default="TERM")
    return parser.parse_args(argv)


def _one_thread_per_process() -> None:
    """Parallelism is processes here: a pool of threads in each would only fight over the cores."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _ucx_environment() -> str:
    return " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("UCX_"))


def _report(name: str, exc: BaseException) -> int:
    """Write the one sentence; returns 2 for bad input, 1 for a crash."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    if not isinstance(exc, AtollError):
        logger.error("unexpected error", exc_info=exc)
    sentence = str(exc) if isinstance(exc, AtollError) else f"{type(exc).__name__}: {exc}"
    print(f"atoll {name}: {sentence}", file=sys.stderr, flush=True)  # noqa: T201  -- not a log record
    return 2 if isinstance(exc, Rejected) else 1
