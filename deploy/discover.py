"""What the TOML leaves open of a topology, from what its hosts show: cards, NICs' speeds, shared NVLink. Pure."""

from collections.abc import Mapping
from dataclasses import replace

from common.config import ClusterConfig, Node
from common.placement.topology import GPUS
from deploy.doctor.facts import Host, Nic


def completed(config: ClusterConfig, hosts: Mapping[str, Host]) -> ClusterConfig:
    """The same cluster with `gpu`, `nic_gbit_s` and `nvlink_domain` of nodes where the TOML says nothing of them.

    `hosts` by name; what is not there, or does not show, stays open. Nodes on one host whose cards all see each other
    over NVLink are one NVLink domain.
    """
    nodes = tuple(_completed(config, node, hosts.get(node.host)) for node in config.nodes)
    domains = {name: 1_000 + i for i, name in enumerate(hosts) if _is_one_domain(hosts[name])}
    taken = {node.nvlink_domain for node in config.nodes}
    shared = [node.host for node in config.nodes]
    nodes = tuple(
        replace(node, nvlink_domain=domains[node.host])
        if node.nvlink_domain < 0
        and shared.count(node.host) > 1
        and domains.get(node.host, -1) not in taken | {-1}
        else node
        for node in nodes
    )
    return replace(config, nodes=nodes)


def _completed(config: ClusterConfig, node: Node, host: Host | None) -> Node:
    if host is None:
        return node
    if not node.gpu and not config.topology.gpu and config.cluster.device == "cuda":
        names = {card.name for card in host.nvidia.gpus}
        known = [gpu for gpu in GPUS if gpu != "cpu" and any(gpu in name.split() for name in names)]
        if len(names) == 1 and known:
            node = replace(node, gpu=known[0])
    speeds = [nic.gb_per_s for nic in _of_rails(node, host)]
    if not node.nic_gbit_s and speeds and min(speeds) > 0:
        node = replace(node, nic_gbit_s=8 * min(speeds))
    return node


def _of_rails(node: Node, host: Host) -> list[Nic]:
    """The NICs that the node's routers are bound to; all active ones with RDMA, else all, where they are not bound."""
    active = [nic for nic in host.nics if nic.is_active]
    if node.rails:
        return [nic for nic in active if {nic.name, nic.rdma} & set(node.rails)]
    return [nic for nic in active if nic.rdma] or active


def _is_one_domain(host: Host) -> bool:
    pairs = host.nvidia.pairs
    return bool(pairs) and all(pair.nvlink_gb_per_s > 0 for pair in pairs)
