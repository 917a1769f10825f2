"""The gateway as a service: links to all attention workers and routers, and the HTTP server in front.

start   dial every attention worker and router, listen; `/ready` says 503 until they are there
drain   refuse new requests with 503, wait for the running ones
stop    fail what is left with a clear error, close connections and links
"""

import asyncio
import logging
import os
import time

from aiohttp import web

from common.config import ClusterConfig
from common.errors import ConfigError
from common.ids import Role
from common.status import ProcessStatus, State
from services.gateway.admission import Admission
from services.gateway.app import Parts, make_app
from services.gateway.auth import load_keys
from services.gateway.backends import Backends
from services.gateway.dispatch import Dispatcher
from services.gateway.links import ClusterDialler
from services.gateway.metrics import GatewayMetrics
from services.gateway.model import load_model

log = logging.getLogger(__name__)

_CLOSE_S = 2.0  # for connections that are still writing when everything is answered


class GatewayService:
    """Builds the parts and owns them. Implements `common.service.Service`."""

    def __init__(self, config: ClusterConfig, index: int, dialler: ClusterDialler) -> None:
        self._config = config
        self._dialler = dialler
        spec = config.process(Role.GATEWAY, index)
        self._own = ProcessStatus.of(spec.id, node=spec.node, pid=os.getpid())
        # Everything that can be wrong with the input is found before anything runs.
        self._model = load_model(config, created=int(time.time()))
        keys = config.gateway.api_key_file
        self._keys = load_keys(keys) if keys is not None else None
        self._runner: web.AppRunner | None = None
        self._dispatcher: Dispatcher | None = None
        self._url_file = config.cluster.run_dir / f"{self._own.id}.url"
        self.port = 0  # really bound, after start

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Dial and listen. Raises ConfigError when the port is taken."""
        config = self._config
        backends = Backends(config, self._own)
        metrics = GatewayMetrics()
        metrics.export_processes(backends.processes)
        workers = config.of_role(Role.ATTENTION)
        admission = Admission(
            [spec.id.index for spec in workers],
            max_queued=config.gateway.max_queued,
            max_running=config.attention.max_requests,
            now=asyncio.get_running_loop().time(),
        )
        self._dispatcher = Dispatcher(admission, backends, metrics)
        app = make_app(Parts(config, self._model, backends, self._dispatcher, metrics, self._keys))
        # Handlers are done or answered with an error by the time the runner is cleaned up.
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=_CLOSE_S
        )
        await self._runner.setup()
        await self._listen(self._runner)
        for spec in [*workers, *config.of_role(Role.ROUTER)]:
            tasks.create_task(self._dialler.keep(spec.address, backends), name=f"link to {spec.id}")
        if config.placement.rebalance_every_s:
            tasks.create_task(backends.rebalancer.watch(), name="rebalance")
        self._own.state = State.READY

    async def drain(self) -> None:
        """Refuse new requests and wait for the running ones."""
        self._own.state = State.DRAINING
        if self._dispatcher is not None:
            await self._dispatcher.drain()

    async def stop(self) -> None:
        """Fail what is left, then close; every client gets its answer or an error event first."""
        if self._dispatcher is not None:
            self._dispatcher.close()
        if self._runner is not None:
            await self._runner.cleanup()
        if self.port:
            await asyncio.to_thread(self._url_file.unlink, missing_ok=True)
        await self._dialler.close()

    async def _listen(self, runner: web.AppRunner) -> None:
        host, port = self._config.gateway.host, self._config.gateway.port
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as exc:
            reason = os.strerror(exc.errno) if exc.errno else str(exc)
            raise ConfigError(f"cannot listen on {host} port {port}: {reason}") from exc
        self.port = int(runner.addresses[0][1])
        self._write_url("127.0.0.1" if host in ("", "0.0.0.0") else host)

    def _write_url(self, host: str) -> None:
        """`run_dir/gateway-0.url` tells the launcher which port it is. Written whole or not at all."""
        url = f"http://{host}:{self.port}"
        path = self._url_file
        partial = path.with_suffix(".tmp")
        try:
            partial.write_text(url + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as exc:
            raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc
        log.info("listening on %s", url)
