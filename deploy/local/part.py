"""The share of a cluster that one supervisor runs where others run the rest: in Slurm, one role on one node.

There SIGTERM reaches every process of every node at once. So that what is in flight can finish all the same, workers
are stopped by another signal, and experts and routers only once no attention worker listens any more.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.config import ClusterConfig
from common.ids import ProcessId, Role
from common.transport.address import Address

STOP_SIGNAL = "USR1"  # a key of common.service.STOP_SIGNALS
_POLL_S = 0.2
_CONNECT_S = 2.0


@dataclass(frozen=True, slots=True)
class Part:
    """Which processes, each with what is set in its environment. Clients reach the gateway here at `host`.

    `log_dir` gets a file per process. A stop takes at most `stop_deadline_s`, twice that where there is an upstream.
    """

    environments: Mapping[ProcessId, Mapping[str, str]]
    log_dir: Path
    host: str
    stop_deadline_s: float

    def url(self, config: ClusterConfig) -> str:
        """Where clients find the gateway, when it is in this part."""
        host = config.gateway.host
        return f"http://{self.host if host in ('', '0.0.0.0') else host}:{config.gateway.port}"

    def upstream(self, config: ClusterConfig) -> tuple[str, ...]:
        """Addresses of those who may still send work here while they drain."""
        if any(process.role in (Role.EXPERT, Role.ROUTER) for process in self.environments):
            return tuple(spec.address for spec in config.of_role(Role.ATTENTION))
        return ()


async def until_silent(addresses: tuple[str, ...], *, within_s: float) -> bool:
    """Wait until nobody listens on any of them; False when somebody still does at the end."""
    try:
        async with asyncio.timeout(within_s):
            for address in addresses:
                while await _listens(Address.parse(address)):  # noqa: ASYNC110  -- asks another host
                    await asyncio.sleep(_POLL_S)
    except TimeoutError:
        return False
    return True


async def _listens(address: Address) -> bool:
    try:
        async with asyncio.timeout(_CONNECT_S):
            if address.path:
                _, writer = await asyncio.open_unix_connection(address.path)
            else:
                _, writer = await asyncio.open_connection(address.host, address.port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True
