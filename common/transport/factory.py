"""The transport of a process, from the cluster's configuration."""

from common.config import LOCAL, ClusterConfig
from common.errors import ConfigError
from common.transport.base import Transport
from common.transport.environment import set_ucx_environment
from common.transport.link import LinkLimits
from common.transport.ucx import UcxTransport


def open_transport(config: ClusterConfig) -> Transport:
    """UCX with the cluster's secret and limits. Raises ConfigError when the secret cannot be read."""
    try:
        secret = config.secret_path.read_bytes().strip()
    except OSError as exc:
        raise ConfigError(f"cluster secret {config.secret_path}: {exc.strerror}") from exc
    set_ucx_environment(
        local=config.cluster.device == "cpu" and all(node.host == LOCAL for node in config.nodes)
    )
    limits = config.limits
    return UcxTransport(
        secret,
        link_limits=LinkLimits(
            window=limits.link_window, max_payload_nbytes=limits.max_payload_mb << 20
        ),
    )
