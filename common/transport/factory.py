"""The transport of a process, from the cluster's configuration."""

import os
from collections import Counter
from functools import partial

from common.config import LOCAL, ClusterConfig
from common.errors import ConfigError
from common.transport.base import Hello, Transport
from common.transport.buffers import BufferPool
from common.transport.carriers import LinkClass, expected_class, has_rdma_devices
from common.transport.environment import set_ucx_environment
from common.transport.link import LinkLimits
from common.transport.seam import Seam
from common.transport.ucx import UcxTransport

# longer than a decode step's longest gap (sampling, a prefill), so that a block finds everybody awake: with 1 ms
# a round trip took 2.7 ms where it takes 2.1 with this (128 tokens, two H100, 2026-11-25)
_DEVICE_SPIN_US, _CROWDED_SPIN_US = 20_000, 1000


def open_transport(config: ClusterConfig, *, data: bool = True, net_device: str = "") -> Transport:
    """UCX with the cluster's secret and limits, bound to one NIC if `net_device` names it.

    Rows lie in device memory where the cluster computes there. `data` False: control links only, no device is touched.
    Raises ConfigError when the secret cannot be read.
    """
    try:
        secret = config.secret_path.read_bytes().strip()
    except OSError as exc:
        raise ConfigError(f"cluster secret {config.secret_path}: {exc.strerror}") from exc
    cluster, limits = config.cluster, config.limits
    local = all(node.host == LOCAL for node in config.nodes)
    on_device = cluster.device != "cpu" and data
    set_ucx_environment(local=local, device=cluster.device, net_device=net_device)
    spin_us = cluster.spin_us
    if spin_us < 0:
        spin_us = device_spin_us(config, len(os.sched_getaffinity(0))) if on_device else 0
    pool, seam = _device_buffers(cluster.device) if on_device else (BufferPool(), Seam())
    return UcxTransport(
        secret,
        link_limits=LinkLimits(
            window=limits.link_window, max_payload_nbytes=limits.max_payload_mb << 20
        ),
        expected_class=partial(_expected_class, config, has_rdma_devices()),
        spin_us=spin_us,
        pool=pool,
        seam=seam,
    )


def device_spin_us(config: ClusterConfig, num_cores: int) -> int:
    """How long to poll: only where each process of the fullest host has a core of its own, else for a moment."""
    hosts = Counter(config.nodes[process.node].host for process in config.processes())
    return _DEVICE_SPIN_US if max(hosts.values()) < num_cores else _CROWDED_SPIN_US


def _expected_class(config: ClusterConfig, has_rdma: bool, mine: Hello, peer: Hello) -> LinkClass:
    """What should carry a link between two processes of the cluster."""
    hosts = [config.nodes[hello.node].host for hello in (mine, peer)]
    same_host = hosts[0] == hosts[1]
    return expected_class(same_host=same_host, device=config.cluster.device, has_rdma=has_rdma)


def _device_buffers(device: str) -> tuple[BufferPool, Seam]:
    # loaded here: gateways and CPU clusters need no torch for their messages
    from common.transport.device import DevicePool, open_context, open_seam

    open_context(device)
    return DevicePool(device), open_seam(device)
