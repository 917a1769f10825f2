"""The share of a cluster that one supervisor runs where others run the rest: in Slurm, one role on one node.

There SIGTERM reaches every process of every node at once. So that what is in flight can finish all the same, workers
are stopped by another signal, and experts and routers only once no attention worker listens any more.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from common.config import ClusterConfig
from common.ids import ProcessId, Role
from common.service import STOP_DEADLINE_S
from common.transport.address import Address

STOP_SIGNAL = "USR1"
STOP_MARGIN_S = 2.0  # between the last thing a process does by itself and SIGKILL
_POLL_S = 0.2
_CONNECT_S = 2.0


@dataclass(frozen=True, slots=True)
class Part:
    """`gpus` are the names of the node's cards as CUDA_VISIBLE_DEVICES takes them; clients reach the node at `host`."""

    processes: frozenset[ProcessId]
    log_dir: Path
    host: str
    gpus: tuple[str, ...] = ()

    def url(self, config: ClusterConfig) -> str:
        """Where clients find the gateway, when it is in this part."""
        host = config.gateway.host
        return f"http://{self.host if host in ('', '0.0.0.0') else host}:{config.gateway.port}"


def upstream(config: ClusterConfig, roles: frozenset[Role]) -> tuple[str, ...]:
    """Addresses of those who may still send work to processes of these roles while they drain."""
    if roles & {Role.EXPERT, Role.ROUTER}:
        return tuple(spec.address for spec in config.of_role(Role.ATTENTION))
    return ()


def stop_limit_s(config: ClusterConfig) -> float:
    """Seconds from the stop signal to SIGKILL; upstream has as long before that."""
    return config.limits.drain_deadline_s + STOP_DEADLINE_S + STOP_MARGIN_S


async def until_silent(addresses: tuple[str, ...], *, within_s: float) -> bool:
    """Wait until nobody listens on any of them; False when somebody still does at the end."""
    try:
        async with asyncio.timeout(within_s):
            for address in addresses:
                while await _listens(Address.parse(address)):
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
