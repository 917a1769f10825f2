"""How the gateway's links are kept: over the cluster's transport, control frames only."""

import os

from common.config import ClusterConfig
from common.ids import Role
from common.model.manifest import cluster_manifest
from common.transport.base import Handler, Hello, Transport
from common.transport.dial import keep_connected
from common.transport.factory import open_transport


class ClusterDialler:
    """Raises ConfigError or ModelError at once, not when dialling."""

    def __init__(
        self, config: ClusterConfig, index: int, transport: Transport | None = None
    ) -> None:
        spec = config.process(Role.GATEWAY, index)
        # Both ends of a link must serve the same model.
        manifest = cluster_manifest(config)
        self._hello = Hello(
            process=spec.id,
            node=spec.node,
            pid=os.getpid(),
            model=manifest.model_hash,
            epoch=config.cluster.epoch,
            wire=config.cluster.wire,
            data=False,
        )
        self._transport = transport or open_transport(config, data=False)

    async def keep(self, address: str, handler: Handler) -> None:
        """Keep one link open for ever; ends only by cancellation."""
        await keep_connected(self._transport, address, lambda: self._hello, handler)

    async def close(self) -> None:
        """Close all links and the transport."""
        await self._transport.close()
