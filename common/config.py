"""One TOML describes a cluster; this file turns it into one frozen tree. Nothing else reads configuration.

    [cluster]   name, wire, epoch, run_dir, secret_file
    [model]     path, served_name
    [placement] experts_per_gpu
    [attention] microbatches, page_tokens, max_batch_tokens, max_requests, max_context
    [gateway]   host, port, api_key_file, max_queued
    [limits]    block_deadline_s, max_payload_mb, link_window
    [[nodes]]   host, attention, experts, routers, base_port   (one table per node, node id = position)

Every process is named by role and index; indices count over nodes in order. A process on a node whose `host` is
"local" listens on a Unix socket in `run_dir`, elsewhere on tcp at base_port + an offset fixed by role and index.
"""

import difflib
import tomllib
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from common.errors import ConfigError
from common.ids import ProcessId, Role

LOCAL = "local"


@dataclass(frozen=True, slots=True)
class ClusterSection:
    """`epoch` numbers the membership; `run_dir` holds sockets, secret and logs of this host."""

    name: str = "atoll"
    wire: str = "fp8"
    epoch: int = 1
    run_dir: Path = Path("/run/atoll")
    secret_file: Path | None = None  # default: run_dir/secret
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class ModelSection:
    """`path` is a Hugging Face directory; `served_name` what clients call it (default: the directory's name)."""

    path: Path
    served_name: str = ""


@dataclass(frozen=True, slots=True)
class PlacementSection:
    """1 is Atoll's layout, more is the traditional one."""

    experts_per_gpu: int = 1


@dataclass(frozen=True, slots=True)
class AttentionSection:
    """Bounds of one attention worker. `max_context` 0 means the model's own limit."""

    microbatches: int = 2
    page_tokens: int = 64
    max_batch_tokens: int = 1024
    max_requests: int = 64
    max_context: int = 0
    cache_tokens: int = 32768


@dataclass(frozen=True, slots=True)
class GatewaySection:
    """Port 0 takes any free one. `max_queued` requests wait at most, the next gets 429."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    max_queued: int = 1024


@dataclass(frozen=True, slots=True)
class LimitsSection:
    """Deadlines and bounds of the data plane."""

    block_deadline_s: float = 30.0
    max_payload_mb: int = 256
    link_window: int = 64


@dataclass(frozen=True, slots=True)
class Node:
    """One host of the cluster."""

    host: str = LOCAL
    attention: int = 1
    experts: int = 0
    routers: int = 1
    base_port: int = 7600


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process of the cluster and where it listens ("" for roles that only dial out)."""

    id: ProcessId
    node: int
    address: str


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """The whole tree."""

    model: ModelSection
    nodes: tuple[Node, ...]
    cluster: ClusterSection = field(default_factory=ClusterSection)
    placement: PlacementSection = field(default_factory=PlacementSection)
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

    def processes(self) -> list[ProcessSpec]:
        """Every process, in start order: routers, experts, attention workers, gateway."""
        specs: list[ProcessSpec] = []
        for role in (Role.ROUTER, Role.EXPERT, Role.ATTENTION):
            for node_id, node in enumerate(self.nodes):
                for local in range(_count(node, role)):
                    index = sum(spec.id.role is role for spec in specs)
                    address = self._address(role, index, node, local)
                    specs.append(ProcessSpec(ProcessId(role, index), node_id, address))
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

    def router_of(self, node: int) -> ProcessSpec:
        """The router that serves a node. Raises ConfigError when it has none."""
        for spec in self.of_role(Role.ROUTER):
            if spec.node == node:
                return spec
        raise ConfigError(f"node {node} has no router")

    def _address(self, role: Role, index: int, node: Node, local: int) -> str:
        if role is Role.EXPERT:
            return ""  # experts only dial out
        if node.host == LOCAL:
            return f"unix:{self.cluster.run_dir}/{role}-{index}.sock"
        return (
            f"tcp://{node.host}:{node.base_port + local + (100 if role is Role.ATTENTION else 0)}"
        )


def _count(node: Node, role: Role) -> int:
    if role is Role.ROUTER:
        return node.routers
    return node.experts if role is Role.EXPERT else node.attention


def load(path: Path) -> ClusterConfig:
    """Read a cluster TOML. Raises ConfigError naming file and key."""
    try:
        document = tomllib.loads(path.read_text())
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    return parse(document, source=str(path))


def parse(document: dict[str, Any], *, source: str) -> ClusterConfig:
    """Check a parsed document and build the tree. Raises ConfigError naming `source` and the key."""
    known = {f.name for f in fields(ClusterConfig)}
    _reject_unknown(document, known, source, "")
    nodes = document.get("nodes")
    if not isinstance(nodes, list) or not nodes:
        raise ConfigError(f"{source}: at least one [[nodes]] table is needed")
    if "model" not in document:
        raise ConfigError(f"{source}: [model] with a path is needed")
    sections: dict[str, Any] = {}
    for name, section_type in get_type_hints(ClusterConfig).items():
        if name != "nodes" and name in document:
            sections[name] = _section(section_type, document[name], source, name)
    sections["nodes"] = tuple(
        _section(Node, node, source, f"nodes[{i}]") for i, node in enumerate(nodes)
    )
    config = ClusterConfig(**sections)
    _check(config, source)
    return config


def _reject_unknown(table: dict[str, Any], known: set[str], source: str, where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{source}: unknown key {where + key!r}{hint}")


def _section(section_type: type, table: Any, source: str, where: str) -> Any:  # noqa: ANN401
    if not isinstance(table, dict):
        raise ConfigError(f"{source}: {where} must be a table")
    hints = get_type_hints(section_type)
    _reject_unknown(table, set(hints), source, where + ".")
    values: dict[str, Any] = {}
    for f in fields(section_type):
        if f.name in table:
            values[f.name] = _value(hints[f.name], table[f.name], source, f"{where}.{f.name}")
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{source}: {where}.{f.name} is needed")
    return section_type(**values)


def _value(hint: Any, value: Any, source: str, where: str) -> Any:  # noqa: ANN401
    if hint is Path or hint == Path | None:
        if not isinstance(value, str):
            raise ConfigError(f"{source}: {where} must be a path")
        return Path(value).expanduser()
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{source}: {where} must be {hint.__name__}, not {value!r}")
    return value


def _check(config: ClusterConfig, source: str) -> None:
    def need(condition: bool, sentence: str) -> None:
        if not condition:
            raise ConfigError(f"{source}: {sentence}")

    need(config.cluster.wire in ("fp8", "bf16", "fp32"), "cluster.wire must be fp8, bf16 or fp32")
    need(config.placement.experts_per_gpu >= 1, "placement.experts_per_gpu must be at least 1")
    need(1 <= config.attention.microbatches <= 8, "attention.microbatches must be 1 to 8")
    need(config.num_expert_workers >= 1, "at least one node needs experts")
    need(
        any(node.attention for node in config.nodes), "at least one node needs an attention worker"
    )
    need(0 <= config.gateway.port < 65536, "gateway.port must be 0 to 65535")
    for i, node in enumerate(config.nodes):
        need(node.routers == 1, f"nodes[{i}].routers must be 1")
        need(min(node.attention, node.experts) >= 0, f"nodes[{i}] has a negative count")
