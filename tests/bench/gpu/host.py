"""Several services of one role in one process: EP256 has more services than a machine has cores, or a card clients.

    python -m tests.bench.gpu.host --cluster FILE --role expert --indices 0-15

They are the real ones, each with its own transport, links and buffers; what they share is the event loop, the CUDA
context and its stream. Routers tell in their status, as `busy_us`, how long their transport was at work: polls that
found something, with all that is called from there. A process that polls has no other figure for what it needs.
"""

import argparse
import asyncio
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import uvloop

from common import config as cluster_config
from common.config import ClusterConfig
from common.ids import Role
from common.obs import log
from common.service import Lifecycle, Service
from common.transport import port as ports
from common.transport import reactor
from common.transport.factory import open_transport
from services.expert.worker import ExpertWorker
from services.router.worker import RouterWorker

# of one reactor before the others of the loop get their turn; alone in its process it may go on for longer
_ROUNDS = 4


class TimedPort:
    """A port that knows how long its polls were at work."""

    def __init__(self, port: Any) -> None:
        self._port = port
        self.busy_ns = 0
        for name in dir(port):  # methods are found at once, figures are asked for
            if not name.startswith("_") and name != "poll" and callable(getattr(port, name)):
                setattr(self, name, getattr(port, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._port, name)

    def poll(self, *told: Callable[..., object]) -> bool:
        started = time.perf_counter_ns()
        worked: bool = self._port.poll(*told)
        if worked:
            self.busy_ns += time.perf_counter_ns() - started
        return worked


class TimedRouter(RouterWorker):
    """A router that tells how long it was at work."""

    def __init__(self, config: ClusterConfig, index: int) -> None:
        super().__init__(config, index, open_transport(config))
        self._fences_ns = 0
        poll = self.transport.seam.poll

        def timed() -> bool:
            started = time.perf_counter_ns()
            if passed := poll():
                self._fences_ns += time.perf_counter_ns() - started
            return passed

        self.transport.seam.poll = timed  # type: ignore[method-assign]

    def _entries(self) -> list[dict[str, Any]]:
        entries = super()._entries()
        port: Any = self.transport._plane.reactor.port  # type: ignore[attr-defined]
        if isinstance(port, TimedPort):
            entries[0]["counters"]["busy_us"] = (port.busy_ns + self._fences_ns) // 1000
        return entries


class Host:
    """Services as one. Implements `common.service.Service`."""

    def __init__(self, services: list[Service]) -> None:
        self._services = services

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """One after another; links open when all have loaded, since no one waits in between."""
        for service in self._services:
            await service.start(tasks)

    async def drain(self) -> None:
        await asyncio.gather(*(service.drain() for service in self._services))

    async def stop(self) -> None:
        await asyncio.gather(*(service.stop() for service in self._services))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cluster", type=Path, required=True)
    parser.add_argument("--role", choices=("expert", "router"), required=True)
    parser.add_argument("--indices", required=True, help="first-last")
    args = parser.parse_args()
    first, last = (int(n) for n in args.indices.split("-"))
    log.setup("info")
    torch.set_num_threads(1)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    config = cluster_config.load(args.cluster)
    if last > first:
        reactor._MAX_ROUNDS = _ROUNDS
    role: Role = Role(args.role)
    if role is Role.ROUTER and ports.is_compiled():  # the other form is told apart by its class
        setattr(reactor, "open_port", lambda *given: TimedPort(ports.open_port(*given)))  # noqa: B010
    build = TimedRouter if role is Role.ROUTER else ExpertWorker
    with torch.inference_mode():
        host = Host([build(config, index) for index in range(first, last + 1)])
        lifecycle = Lifecycle(host, drain_deadline_s=config.limits.drain_deadline_s)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(lifecycle.run())


if __name__ == "__main__":
    main()
