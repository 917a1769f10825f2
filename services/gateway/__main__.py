"""Run one gateway process: `python -m services.gateway --cluster F --index I`.

It links to attention workers and routers with control frames only, and writes its URL to `run_dir/gateway-<index>.url`
once it listens, since port 0 means any free one.
"""

import asyncio
import os
import sys
from typing import Self

from common.config import ClusterConfig
from common.ids import Role
from common.model.manifest import build_manifest
from common.service import run_service
from common.transport.base import Handler, Hello, Transport
from common.transport.dial import keep_connected
from common.transport.factory import open_transport
from services.gateway.service import GatewayService


class LinkedGateway(GatewayService):
    """The gateway on the cluster's transport."""

    def __init__(self, config: ClusterConfig, index: int) -> None:
        super().__init__(config, index, self._keep_connected)
        self._spec = config.process(Role.GATEWAY, index)
        self._transport: Transport = open_transport(config)
        self._model_hash = build_manifest(
            config.model.path, cache_dir=config.model.cache_dir
        ).model_hash

    async def start(self: Self, tasks: asyncio.TaskGroup) -> None:
        """Listen, say where, dial."""
        await super().start(tasks)
        path = self._config.cluster.run_dir / f"{self._spec.id}.url"
        partial = path.with_suffix(".partial")
        partial.write_text(f"http://{self._config.gateway.host}:{self.port}\n")
        partial.replace(path)

    async def stop(self) -> None:
        """Answer what is left, then close the links."""
        await super().stop()
        await self._transport.close()

    async def _keep_connected(self, address: str, handler: Handler) -> None:
        await keep_connected(self._transport, address, self._hello, handler)

    def _hello(self) -> Hello:
        cluster = self._config.cluster
        return Hello(
            self._spec.id, self._spec.node, os.getpid(), self._model_hash, cluster.epoch,
            cluster.wire, data=False,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_service(LinkedGateway, Role.GATEWAY))
