"""What a cluster is made of: nodes, GPUs, NVLink domains, NICs (rails), leaf switches, and how fast they are. Pure.

Bandwidths are bytes per second in one direction, latencies seconds; every link is full duplex. Figures marked measured
are this project's own (kernels/results, tests/bench); the others are datasheets'.
"""

from dataclasses import dataclass

from common.config import ClusterConfig
from common.errors import ConfigError

GBIT = 1e9 / 8


@dataclass(frozen=True, slots=True)
class Gpu:
    """What an expert can reach on a card: FP8 FLOP/s, NVLink bytes/s."""

    name: str
    flops: float
    nvlink: float  # to the node's switch, one direction; PCIe where there is no NVLink


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 1044e12, 450e9),  # measured (NVLink: datasheet)
        Gpu("H200", 1274e12, 392e9),  # measured
        # the reference card of the project's mission: 60 % of 400 TFLOP/s
        Gpu("reference", 240e12, 450e9),
        Gpu("H20", 296e12, 450e9),  # datasheet
        Gpu("L40S", 733e12, 32e9),  # datasheet, PCIe 4.0 x16
        Gpu("B200", 4500e12, 900e9),  # datasheet
        # one core of a small machine; keeps the same code honest on laptops
        Gpu("cpu", 30e9, 5e9),
    )
}


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One node. `rails` NICs of `nic` bytes/s each; `domain` is its NVLink domain, `leaf` its leaf switch."""

    attention: int
    experts: int
    gpu: Gpu
    rails: int
    nic: float
    domain: int
    leaf: int


@dataclass(frozen=True, slots=True)
class Topology:
    """The cluster as placement and planner see it. `uplink`: bytes/s of a leaf switch to the spine, 0 without limit."""

    nodes: tuple[NodeSpec, ...]
    uplink: float = 0.0

    def __post_init__(self) -> None:
        """Raises ConfigError for a cluster that cannot serve, or whose links have no speed."""
        if not any(node.experts for node in self.nodes):
            raise ConfigError("the topology has no expert GPU")
        if not any(node.attention for node in self.nodes):
            raise ConfigError("the topology has no attention GPU")
        for i, node in enumerate(self.nodes):
            if min(node.attention, node.experts) < 0 or node.rails < 1 or node.nic <= 0:
                raise ConfigError(
                    f"node {i} of the topology needs at least one rail and a NIC speed above 0"
                )

    def __repr__(self) -> str:
        experts = sum(node.experts for node in self.nodes)
        attention = sum(node.attention for node in self.nodes)
        domains, leaves = ({f(n) for n in self.nodes} for f in (_domain, _leaf))
        return (
            f"<Topology [{len(self.nodes)} nodes | {experts} experts' and {attention} attention GPUs"
            f" | {len(domains)} NVLink domains | {len(leaves)} leaves]>"
        )

    @property
    def worker_nodes(self) -> tuple[int, ...]:
        """Node of each expert worker, as in `Plan.nodes`."""
        return tuple(i for i, node in enumerate(self.nodes) for _ in range(node.experts))

    @property
    def worker_speeds(self) -> tuple[float, ...]:
        """FLOP/s of each expert worker's GPU against the fastest's."""
        fastest = max(node.gpu.flops for node in self.nodes if node.experts)
        return tuple(node.gpu.flops / fastest for node in self.nodes for _ in range(node.experts))

    @property
    def sources(self) -> tuple[float, ...]:
        """Share of the tokens that start on each node: its share of the attention workers."""
        total = sum(node.attention for node in self.nodes)
        return tuple(node.attention / total for node in self.nodes)


def _domain(node: NodeSpec) -> int:
    return node.domain


def _leaf(node: NodeSpec) -> int:
    return node.leaf


def uniform(
    nodes: int, experts: int, *, attention: int = 1, gpu: str = "H100", rails: int = 1, nic: float = 400 * GBIT
) -> Topology:  # fmt: skip
    """`nodes` equal nodes under one leaf switch, each its own NVLink domain, with `experts` expert GPUs each."""
    return Topology(
        tuple(NodeSpec(attention, experts, GPUS[gpu], rails, nic, i, 0) for i in range(nodes))
    )


def cluster_topology(config: ClusterConfig) -> Topology:
    """What the cluster TOML says, with the defaults of `[topology]`. Raises ConfigError for a GPU nobody knows."""
    section = config.topology
    nodes = []
    for i, node in enumerate(config.nodes):
        name = node.gpu or section.gpu or ("cpu" if config.cluster.device == "cpu" else "H100")
        if name not in GPUS:
            raise ConfigError(f"nodes[{i}].gpu {name!r} is not one of {', '.join(GPUS)}")
        nodes.append(
            NodeSpec(
                attention=node.attention,
                experts=node.experts,
                gpu=GPUS[name],
                rails=node.routers,
                nic=(node.nic_gbit_s or section.nic_gbit_s) * GBIT,
                domain=i if node.nvlink_domain < 0 else -1 - node.nvlink_domain,
                leaf=node.leaf,
            )
        )
    return Topology(tuple(nodes), section.uplink_gbit_s * GBIT)
