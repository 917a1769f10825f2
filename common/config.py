"""One TOML describes a cluster; this file turns it into one frozen tree. Nothing else reads configuration.

    [cluster]   name, wire, epoch, run_dir, secret_file, device, oversubscribe, trace_events, spin_us
    [model]     path, served_name, cache_dir
    [placement] experts_per_gpu, plan, dispatch, routers_divide, expert_slices, rebalance_every_s, rebalance_gain,
                rebalance_patience
    [topology]  gpu, nic_gbit_s, uplink_gbit_s
    [attention] microbatches, page_tokens, max_batch_tokens, max_requests, max_context, cache_tokens,
                gate_bias_max
    [gateway]   host, port, api_key_file, max_queued
    [limits]    block_deadline_s, max_payload_mb, link_window, start_deadline_s, watchdog_s, drain_deadline_s
    [[nodes]]   host, attention, experts, routers, rails, gpus, base_port, gpu, nic_gbit_s, nvlink_domain, leaf
                (one table per node, node id = position)

Every process is named by role and index; indices count over nodes in order. A process on a node whose `host` is
"local" listens on a Unix socket in `run_dir`, elsewhere on tcp at the node's first port + an offset fixed by role and
index. Without a base_port a node's first port follows from its node id, so that nodes may share an address.
Relative paths are relative to the file's directory. How the TOML is read and checked is in `common/config_toml.py`.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import config_toml
from common.errors import ConfigError
from common.ids import ProcessId, Role

LOCAL = "local"
ATTENTION_PORT_OFFSET = 100
PORTS_PER_NODE = 2 * ATTENTION_PORT_OFFSET
FIRST_PORT = 10_000  # of node 0
NODES_OF_ONE_ADDRESS = (
    110  # node ids that far apart share ports; up to 32000, below the ephemeral ones
)
EXACT_ON_CPU = "fp32, the exact mode, is computed on CPU only"
MAX_UNIX_PATH = 107  # bytes, sockaddr_un without its final zero


def _in(default: float, low: float, high: float) -> Any:  # noqa: ANN401  -- as dataclasses.field
    """A field with a default that must lie in [low, high]."""
    return field(default=default, metadata={"range": (low, high)})


def _one_of(default: str, *choices: str) -> Any:  # noqa: ANN401
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True, slots=True)
class ClusterSection:
    """`epoch` numbers the membership; `run_dir` holds sockets, secret and logs of this host."""

    name: str = "atoll"
    wire: str = _one_of("fp8", "fp8", "bf16", "fp32")
    epoch: int = _in(1, 0, 2**31 - 1)
    run_dir: Path = Path("/run/atoll")
    secret_file: Path | None = None  # default: run_dir/secret
    device: str = _one_of("cpu", "cpu", "cuda")
    oversubscribe: bool = False  # attention and expert workers may outnumber the GPUs
    # microseconds of polling after each message before a process sleeps; -1: 1000 on GPUs, 0 on CPU
    spin_us: int = _in(-1, -1, 1_000_000)
    trace_events: int = _in(
        0, 0, 1 << 24
    )  # spans that each process keeps for its trace file; 0: none


@dataclass(frozen=True, slots=True)
class ModelSection:
    """`path` is a Hugging Face directory; `served_name` what clients call it (default: the directory's name)."""

    path: Path
    served_name: str = ""
    cache_dir: Path = field(default_factory=lambda: Path("~/.cache/atoll").expanduser())  # hashes


@dataclass(frozen=True, slots=True)
class PlacementSection:
    """At most `experts_per_gpu` experts of a layer on a worker: 1 is Atoll's layout, more is the traditional one.

    `plan` is a file of `atoll plan`; without it expert e of every layer is on worker e // experts_per_gpu. `dispatch`
    hierarchical sends a row to a node once and gets the node's sum back; unicast, the baseline, sends a copy per expert
    and gets every expert's answer. `expert_slices` cuts every expert along its hidden dimension into so many,
    each placed as an expert of its own.
    `routers_divide` says what each router of a node has a part of: destinations (every router gets every block, and
    sends its rows to some of the nodes and experts), or blocks (every block goes to the router that has fewest).
    Every `rebalance_every_s` (0: never) the gateway looks for a better plan and carries it out once it found one that
    is better by `rebalance_gain` or more for `rebalance_patience` times in a row.
    """

    experts_per_gpu: int = _in(1, 1, 4096)
    plan: Path | None = None
    rebalance_every_s: float = _in(0.0, 0.0, 1e6)
    rebalance_gain: float = _in(0.1, 0.0, 1.0)
    rebalance_patience: int = _in(3, 1, 1000)
    expert_slices: int = _in(1, 1, 64)
    dispatch: str = _one_of("hierarchical", "hierarchical", "unicast")
    routers_divide: str = _one_of("destinations", "destinations", "blocks")


@dataclass(frozen=True, slots=True)
class TopologySection:
    """What nodes have unless their tables say otherwise, for `atoll plan`; speeds are per direction.

    `gpu` is a name of `common.placement.topology.GPUS` (default: H100, or cpu on CPU devices), `nic_gbit_s` the speed
    of one NIC, `uplink_gbit_s` of a leaf switch to the others (0: no limit).
    """

    gpu: str = ""
    nic_gbit_s: float = _in(400.0, 0.001, 1e5)
    uplink_gbit_s: float = _in(0.0, 0.0, 1e7)


@dataclass(frozen=True, slots=True)
class AttentionSection:
    """Bounds of one attention worker. `max_context` 0 means the model's own limit.

    `gate_bias_max` is by how much at most a gate may lower an overloaded expert's score before it chooses: 0 keeps the
    model's own outputs, anything else does not.
    """

    microbatches: int = _in(2, 1, 8)
    page_tokens: int = _in(64, 1, 4096)
    max_batch_tokens: int = _in(1024, 1, 1 << 20)
    max_requests: int = _in(64, 1, 1 << 16)
    max_context: int = _in(0, 0, 1 << 24)
    cache_tokens: int = _in(32768, 1, 1 << 30)
    gate_bias_max: float = _in(0.0, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class GatewaySection:
    """Port 0 takes any free one. `max_queued` requests wait at most, the next gets 429."""

    host: str = "127.0.0.1"
    port: int = _in(8000, 0, 65535)
    api_key_file: Path | None = None
    max_queued: int = _in(1024, 0, 1 << 20)


@dataclass(frozen=True, slots=True)
class LimitsSection:
    """Deadlines and bounds of the data plane and of a process's life.

    `start_deadline_s` is how long a process may load, `drain_deadline_s` how long a stopping one may finish its work;
    one whose event loop gives no sign for `watchdog_s` is restarted.
    """

    block_deadline_s: float = _in(30.0, 0.01, 3600.0)
    max_payload_mb: int = _in(256, 1, 4096)
    link_window: int = _in(64, 1, 65536)
    start_deadline_s: float = _in(900.0, 1.0, 86400.0)
    watchdog_s: float = _in(60.0, 1.0, 3600.0)
    drain_deadline_s: float = _in(8.0, 0.0, 3600.0)


@dataclass(frozen=True, slots=True)
class Node:
    """One host of the cluster. `base_port` 0 takes one by node id; `gpus` are its own, 0 means as many as are found.

    `gpu`, `nic_gbit_s`: "" and 0 mean as in [topology]. Nodes with the same `nvlink_domain` (0 or more) share NVLink.
    """

    host: str = LOCAL
    attention: int = _in(1, 0, 99)
    experts: int = _in(0, 0, 4096)
    routers: int = _in(1, 1, 8)
    rails: tuple[
        str, ...
    ] = ()  # a NIC per router (UCX_NET_DEVICES), e.g. "mlx5_0:1"; empty: UCX chooses
    gpus: int = _in(0, 0, 64)
    base_port: int = _in(0, 0, 65535 - PORTS_PER_NODE)
    gpu: str = ""
    nic_gbit_s: float = _in(0.0, 0.0, 1e5)
    nvlink_domain: int = _in(-1, -1, 1 << 20)
    leaf: int = _in(0, 0, 1 << 20)

    def first_port(self, node_id: int) -> int:
        """Where its ports begin: routers listen on this + 0.., attention workers on this + ATTENTION_PORT_OFFSET.."""
        return self.base_port or FIRST_PORT + PORTS_PER_NODE * (node_id % NODES_OF_ONE_ADDRESS)


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process of the cluster and where it listens ("" for roles that only dial out).

    `rail` counts a node's routers; `net_device` is the NIC that a router is bound to ("": not bound).
    """

    id: ProcessId
    node: int
    address: str
    rail: int = 0
    net_device: str = ""


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """The whole tree."""

    model: ModelSection
    nodes: tuple[Node, ...]
    cluster: ClusterSection = field(default_factory=ClusterSection)
    placement: PlacementSection = field(default_factory=PlacementSection)
    topology: TopologySection = field(default_factory=TopologySection)
    attention: AttentionSection = field(default_factory=AttentionSection)
    gateway: GatewaySection = field(default_factory=GatewaySection)
    limits: LimitsSection = field(default_factory=LimitsSection)

    @property
    def secret_path(self) -> Path:
        """Where the cluster secret is read from."""
        return self.cluster.secret_file or self.cluster.run_dir / "secret"

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        return self.model.served_name or self.model.path.name

    @property
    def num_expert_workers(self) -> int:
        """Expert processes over all nodes."""
        return sum(node.experts for node in self.nodes)

    def to_toml(self) -> str:
        """The document that `load` reads back as an equal tree."""
        return config_toml.render(self)

    def processes(self) -> list[ProcessSpec]:
        """Every process, in start order: routers, experts, attention workers, gateway."""
        specs: list[ProcessSpec] = []
        for role in (Role.ROUTER, Role.EXPERT, Role.ATTENTION):
            index = 0
            for node_id, node in enumerate(self.nodes):
                for local in range(_count(node, role)):
                    address = self._address(role, index, node_id, local)
                    rail = local if role is Role.ROUTER else 0
                    device = node.rails[local] if role is Role.ROUTER and node.rails else ""
                    specs.append(
                        ProcessSpec(ProcessId(role, index), node_id, address, rail, device)
                    )
                    index += 1
        specs.append(ProcessSpec(ProcessId(Role.GATEWAY, 0), 0, ""))
        return specs

    def process(self, role: Role, index: int) -> ProcessSpec:
        """One process. Raises ConfigError when the cluster has no such process."""
        for spec in self.processes():
            if spec.id == ProcessId(role, index):
                return spec
        raise ConfigError(f"the cluster has no {role}-{index}")

    def of_role(self, role: Role) -> list[ProcessSpec]:
        """All processes of one role, by index."""
        return [spec for spec in self.processes() if spec.id.role is role]

    def routers_of(self, node: int) -> list[ProcessSpec]:
        """The routers of a node, by rail."""
        return [spec for spec in self.of_role(Role.ROUTER) if spec.node == node]

    @property
    def routers_divide_blocks(self) -> bool:
        """Each router of a node has blocks of its own, and sends them everywhere."""
        return self.placement.routers_divide == "blocks"

    def _address(self, role: Role, index: int, node_id: int, local: int) -> str:
        node = self.nodes[node_id]
        if role is Role.EXPERT:
            return ""  # experts only dial out
        if node.host == LOCAL:
            return f"unix:{self.cluster.run_dir}/{role}-{index}.sock"
        offset = ATTENTION_PORT_OFFSET if role is Role.ATTENTION else 0
        return f"tcp://{node.host}:{node.first_port(node_id) + offset + local}"


def _count(node: Node, role: Role) -> int:
    if role is Role.ROUTER:
        return node.routers
    return node.experts if role is Role.EXPERT else node.attention


def load(path: Path) -> ClusterConfig:
    """Read a cluster TOML. Raises ConfigError naming file, line and key."""
    source = config_toml.Source.read(path)
    return _checked(config_toml.build(ClusterConfig, source), source)


def parse(document: dict[str, Any], *, source: str) -> ClusterConfig:
    """Check a parsed document and build the tree. Raises ConfigError naming `source` and the key."""
    origin = config_toml.Source(source, document)
    return _checked(config_toml.build(ClusterConfig, origin), origin)


def local_cluster(
    model: Path, *, ep: int, nodes: int, attention: int, experts_per_gpu: int, microbatches: int,
    wire: str, port: int, run_dir: Path, routers: int = 1, routers_divide: str = "destinations",
    host: str = "127.0.0.1", api_key_file: Path | None = None, gate_bias_max: float = 0.0,
) -> ClusterConfig:  # fmt: skip
    """A cluster of virtual nodes on this host: `ep` expert and `attention` attention workers, spread contiguously,
    and `routers` on each node, which divide what `routers_divide` says.

    The first nodes get one more where the counts do not divide; a node may stay without experts or without attention
    workers. Raises ConfigError on a value out of range.
    """
    if nodes < 1:
        raise ConfigError(f"a cluster needs at least 1 node, not {nodes}")
    counts = zip(_spread(attention, nodes), _spread(ep, nodes), strict=True)
    config = ClusterConfig(
        model=ModelSection(path=model),
        nodes=tuple(Node(attention=a, experts=e, routers=routers) for a, e in counts),
        cluster=ClusterSection(wire=wire, run_dir=run_dir),
        placement=PlacementSection(experts_per_gpu=experts_per_gpu, routers_divide=routers_divide),
        attention=AttentionSection(microbatches=microbatches, gate_bias_max=gate_bias_max),
        gateway=GatewaySection(host=host, port=port, api_key_file=api_key_file),
    )
    source = config_toml.Source("local cluster", {})
    config_toml.check_values(config, source)
    return _checked(config, source)


def _spread(count: int, nodes: int) -> list[int]:
    each, rest = divmod(count, nodes)
    return [each + (i < rest) for i in range(nodes)]


def _checked(config: ClusterConfig, source: config_toml.Source) -> ClusterConfig:
    """What no single value shows: the cluster as a whole. Raises ConfigError."""
    if not config.nodes:
        raise source.error("", "at least one [[nodes]] table is needed")
    if config.num_expert_workers < 1:
        raise source.error("nodes[0].experts", "at least one node needs experts")
    if not any(node.attention for node in config.nodes):
        raise source.error("nodes[0].attention", "at least one node needs an attention worker")
    if config.cluster.wire == "fp32" and config.cluster.device != "cpu":
        raise source.error("cluster.wire", EXACT_ON_CPU)
    if config.cluster.wire == "fp32" and config.attention.gate_bias_max:
        raise source.error(
            "attention.gate_bias_max",
            "changes which experts are chosen, and fp32, the exact mode, promises the model's own choice",
        )
    local = {node.host == LOCAL for node in config.nodes}
    for where, host in _hosts(config):
        if not host or any(c.isspace() or c in "/@" for c in host):
            raise source.error(where, f"{host!r} is not a host name or address")
        remote = where.startswith("nodes") and host not in (LOCAL, "localhost", "127.0.0.1")
        if remote and len(local) == 2:
            raise source.error(
                where, 'a cluster with "local" nodes cannot have others on the network'
            )
    for i, node in enumerate(config.nodes):
        if node.rails and len(node.rails) != node.routers:
            raise source.error(
                f"nodes[{i}].rails", f"names {len(node.rails)} NICs for {node.routers} routers"
            )
    counts = dict.fromkeys(node.routers for node in config.nodes)
    if config.routers_divide_blocks and len(counts) > 1:
        raise source.error(
            "placement.routers_divide",
            f"blocks needs as many routers on every node, not {' and '.join(map(str, counts))}",
        )
    _check_addresses(config, source)
    return config


def _hosts(config: ClusterConfig) -> list[tuple[str, str]]:
    hosts = [(f"nodes[{i}].host", node.host) for i, node in enumerate(config.nodes)]
    return [("gateway.host", config.gateway.host), *hosts]


def _check_addresses(config: ClusterConfig, source: config_toml.Source) -> None:
    addresses = [spec.address for spec in config.processes() if spec.address]
    gateway_host = config.nodes[0].host if config.gateway.host == "0.0.0.0" else config.gateway.host
    if config.gateway.port:
        addresses.append(f"tcp://{gateway_host}:{config.gateway.port}")
    for address, count in Counter(addresses).items():
        if count > 1:
            raise source.error("nodes", f"{count} processes would listen on {address}")
        path = address.removeprefix("unix:")
        if path != address and len(path.encode()) > MAX_UNIX_PATH:
            raise source.error(
                "cluster.run_dir", f"too long for a Unix socket ({MAX_UNIX_PATH} bytes): {path}"
            )
