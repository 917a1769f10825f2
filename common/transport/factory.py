"""The transport of a process, from the cluster's configuration."""

from common.config import ClusterConfig, ProcessSpec
from common.errors import ConfigError
from common.transport.base import Transport
from common.transport.ucx import UcxTransport


def open_transport(config: ClusterConfig, spec: ProcessSpec) -> Transport:
    """UCX with the cluster's secret and limits. Raises ConfigError when the secret cannot be read."""
    try:
        secret = config.secret_path.read_bytes().strip()
    except OSError as exc:
        raise ConfigError(f"cluster secret {config.secret_path}: {exc.strerror}") from exc
    return UcxTransport(
        secret,
        max_payload_nbytes=config.limits.max_payload_mb << 20,
        window=config.limits.link_window,
    )
