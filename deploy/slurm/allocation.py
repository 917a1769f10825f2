"""From a cluster TOML and what the nodes of a Slurm allocation report to the TOML of one job. Pure.

Node k of the file is node k of the allocation; hosts in the file are for the other ways to start a cluster.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.config import (
    ATTENTION_PORT_OFFSET,
    FIRST_PORT,
    NODES_OF_ONE_ADDRESS,
    PORTS_PER_NODE,
    ClusterConfig,
    Node,
)
from common.errors import ConfigError
from common.ids import ProcessId, Role
from deploy.render.description import environment_of
from deploy.render.gpus import SHARE_HOW, assign, node_cards, num_workers

GATEWAY_PORT_OFFSET = PORTS_PER_NODE - 1  # where the TOML leaves the gateway's port open
_JOB_STRIDE = 13  # port ranges between consecutive jobs, which may share nodes


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one node says: its Slurm name, its place in the allocation, its cards as CUDA_VISIBLE_DEVICES names them,
    the first ports of ranges that are free there (best first), and a sentence when something is wrong."""

    name: str
    position: int
    gpus: tuple[str, ...] = ()
    first_ports: tuple[int, ...] = ()
    problem: str = ""


def first_ports(node: Node, node_id: int, job_id: int) -> list[int]:
    """Where a node's ports may begin: as the TOML says, or else any range, those of the job first."""
    if node.base_port:
        return [node.base_port]
    start = job_id * _JOB_STRIDE + node_id
    slots = [(start + i) % NODES_OF_ONE_ADDRESS for i in range(NODES_OF_ONE_ADDRESS)]
    return [FIRST_PORT + PORTS_PER_NODE * slot for slot in slots]


def ports(config: ClusterConfig, node_id: int, first_port: int) -> list[int]:
    """Every port that the node's processes would listen on."""
    node = config.nodes[node_id]
    numbers = [first_port + i for i in range(node.routers)]
    numbers += [first_port + ATTENTION_PORT_OFFSET + i for i in range(node.attention)]
    if node_id == 0 and not config.gateway.port:
        numbers.append(first_port + GATEWAY_PORT_OFFSET)
    return numbers


def check_size(config: ClusterConfig, num_nodes: int) -> None:
    """Raises ConfigError when the allocation has too few nodes."""
    if num_nodes < len(config.nodes):
        raise ConfigError(
            f"the allocation has {num_nodes} nodes, cluster {config.cluster.name} needs {len(config.nodes)}"
        )


def resolve(
    config: ClusterConfig,
    reports: Sequence[NodeReport],
    addresses: Mapping[str, str],
    job_dir: Path,
) -> ClusterConfig:
    """The cluster of this job: hosts, ports and GPUs filled in, secret and run directory its own.

    `addresses`: Slurm's address of each node. Raises ConfigError when the allocation does not do.
    """
    by_position = {report.position: report for report in reports}
    absent = [i for i in range(len(config.nodes)) if i not in by_position]
    if absent:
        raise ConfigError(f"node {absent[0]} of the allocation did not report")
    chosen = [by_position[i] for i in range(len(config.nodes))]
    wrong = [report for report in chosen if report.problem]
    if wrong:
        others = f" (and {len(wrong) - 1} more nodes with a problem)" if len(wrong) > 1 else ""
        raise ConfigError(f"node {wrong[0].name}: {wrong[0].problem}{others}")
    nodes: list[Node] = []
    for i, report in enumerate(chosen):
        host = addresses.get(report.name, report.name)
        taken = {node.base_port for node in nodes if node.host == host}
        free = [port for port in report.first_ports if port not in taken]
        if not free:
            raise ConfigError(_no_ports(config.nodes[i], i, report.name))
        gpus = _gpus(config, i, report)
        nodes.append(replace(config.nodes[i], host=host, base_port=free[0], gpus=gpus))
    port = config.gateway.port or nodes[0].base_port + GATEWAY_PORT_OFFSET
    return replace(
        config,
        nodes=tuple(nodes),
        gateway=replace(config.gateway, port=port),
        cluster=replace(config.cluster, run_dir=job_dir, secret_file=job_dir / "secret"),
    )


def cards_of(config: ClusterConfig, node_id: int) -> dict[ProcessId, int]:
    """The card of each process of a node, counted from 0 there: nodes of Slurm share none."""
    first = node_cards(config)[node_id].start
    assigned = assign(config)
    own = (spec.id for spec in config.processes() if spec.node == node_id)
    return {id_: assigned[id_] - first for id_ in own if id_ in assigned}


def environments(
    config: ClusterConfig, node_id: int, role: Role, gpus: Sequence[str], mps_dir: str | None
) -> dict[ProcessId, dict[str, str]]:
    """What to set for each process of a role on a node; `gpus` are its cards, `mps_dir` has the pipe of its MPS."""
    cards = cards_of(config, node_id)
    result = {}
    for spec in config.of_role(role):
        if spec.node == node_id:
            card = gpus[cards[spec.id]] if spec.id in cards else None
            result[spec.id] = environment_of(config, spec, card, mps_dir)
    return result


def node_addresses(shown: str) -> dict[str, str]:
    """Name -> address of every node in the output of `scontrol --oneliner show node`."""
    result = {}
    for line in shown.splitlines():
        fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if "NodeName" in fields:
            result[fields["NodeName"]] = fields.get("NodeAddr", fields["NodeName"])
    return result


def kill_wait_s(shown: str) -> float | None:
    """Seconds between SIGTERM and SIGKILL of a cancelled job, from `scontrol show config`; None if absent."""
    for line in shown.splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "KillWait":
            return float(value.split()[0])
    return None


def _gpus(config: ClusterConfig, node_id: int, report: NodeReport) -> int:
    node = config.nodes[node_id]
    if config.cluster.device != "cuda":
        return node.gpus
    workers = num_workers(node)
    needed = node.gpus or max(1, 1 if config.cluster.oversubscribe else workers)
    if len(report.gpus) < needed:
        how = "" if node.gpus or not report.gpus else f"; {SHARE_HOW}"
        raise ConfigError(
            f"node {report.name} has {len(report.gpus)} GPUs in this allocation, "
            f"nodes[{node_id}] needs {needed}{how}"
        )
    return node.gpus or min(len(report.gpus), max(1, workers))


def _no_ports(node: Node, node_id: int, name: str) -> str:
    if node.base_port:
        return (
            f"port {node.base_port} of node {name} or one after it is in use "
            f"(nodes[{node_id}].base_port)"
        )
    return f"node {name} has no free range of ports from {FIRST_PORT} up"
