"""The transport of a process, from the cluster's configuration."""

from functools import partial

from common.config import LOCAL, ClusterConfig
from common.errors import ConfigError
from common.transport.base import Hello, Transport
from common.transport.carriers import LinkClass, expected_class, has_rdma_devices
from common.transport.environment import set_ucx_environment
from common.transport.link import LinkLimits
from common.transport.ucx import UcxTransport


def open_transport(config: ClusterConfig, *, net_device: str = "") -> Transport:
    """UCX with the cluster's secret and limits, bound to one NIC if `net_device` names it.

    Raises ConfigError when the secret cannot be read.
    """
    try:
        secret = config.secret_path.read_bytes().strip()
    except OSError as exc:
        raise ConfigError(f"cluster secret {config.secret_path}: {exc.strerror}") from exc
    set_ucx_environment(
        local=config.cluster.device == "cpu" and all(node.host == LOCAL for node in config.nodes),
        net_device=net_device,
    )
    limits = config.limits
    return UcxTransport(
        secret,
        link_limits=LinkLimits(
            window=limits.link_window, max_payload_nbytes=limits.max_payload_mb << 20
        ),
        expected_class=partial(_expected_class, config, has_rdma_devices()),
    )


def _expected_class(config: ClusterConfig, has_rdma: bool, mine: Hello, peer: Hello) -> LinkClass:
    """What should carry a link between two processes of the cluster."""
    hosts = [config.nodes[hello.node].host for hello in (mine, peer)]
    same_host = hosts[0] == hosts[1]
    return expected_class(same_host=same_host, device=config.cluster.device, has_rdma=has_rdma)
