"""One cluster TOML, three renderings, one meaning: the same processes on the same nodes and cards, in the same order.

What runs is compared in tests/deployment.py; here, what each rendering says.
"""

import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from common import config as cluster_config
from common.config import LOCAL, ClusterConfig, ModelSection
from common.ids import Role
from deploy.local import cards
from deploy.local.run_dir import RunDir
from deploy.local.supervisor import STOP_ORDER, Options, Supervisor
from deploy.render import slurm, systemd
from deploy.render.description import describe
from deploy.slurm import allocation
from deploy.slurm.allocation import NodeReport
from deploy.up_command import on_this_machine

CLUSTERS = sorted((Path(__file__).parents[2] / "deploy/clusters").glob("*.toml"))
# GPUs, two rails on one host, one node that runs no attention worker, workers that share cards
GPUS = """\
[cluster]
name = "gpus"
device = "cuda"
oversubscribe = true
[model]
path = "/srv/model"
[limits]
drain_deadline_s = 21
[[nodes]]
host = "a"
attention = 2
experts = 6
routers = 2
rails = ["mlx5_0:1", "mlx5_1:1"]
gpus = 4
[[nodes]]
host = "b"
attention = 0
experts = 2
gpus = 2
"""


@dataclass(frozen=True)
class Meaning:
    """What a rendering says: of each process its node, card (None without) and whether it uses MPS."""

    processes: dict[str, tuple[int, str | None, bool]]
    start_order: list[Role]
    config: ClusterConfig
    environments: dict[str, dict[str, str]]


def of_process(node, environment):
    return node, environment.get("CUDA_VISIBLE_DEVICES"), "CUDA_MPS_PIPE_DIRECTORY" in environment


def local(config):
    """`atoll up --cluster F --local`, on a machine with the cards of all hosts together."""
    here = on_this_machine(config, Path("/run/atoll"))
    here = replace(
        here,
        nodes=tuple(replace(n, gpus=m.gpus) for n, m in zip(here.nodes, config.nodes, strict=True)),
    )
    environments = {}
    if config.cluster.device == "cuda":
        count = sum(node.gpus for node in here.nodes)
        dealt, _ = cards.deal(here, [str(i) for i in range(count)], Path("/run/atoll"))
        environments = {str(id_): dict(env) for id_, env in dealt.items()}
    supervisor = Supervisor(here, RunDir(Path("/run/atoll"), False, -1), Options())
    first = [sum(node.gpus for node in here.nodes[:i]) for i in range(len(here.nodes))]
    processes = {}
    for name, worker in supervisor._workers.items():
        node, card, mps = of_process(worker.spec.node, environments.get(name, {}))
        # each host counts its own from 0
        processes[name] = node, None if card is None else str(int(card) - first[node]), mps
    order = list(dict.fromkeys(worker.role for worker in supervisor._workers.values()))
    return Meaning(
        processes,
        order,
        cluster_config.parse(tomllib.loads(here.to_toml()), source="up"),
        environments,
    )


def units(config):
    """What install.sh puts on each host."""
    files = systemd.render(config)
    hosts = {node.host: i for i, node in enumerate(config.nodes)}
    environments, nodes = {}, {}
    for path, text in files.items():
        host, _, name = path.partition("/env/")
        if name:
            lines = [line for line in text.splitlines() if not line.startswith("#")]
            environments[name] = dict(line.split("=", 1) for line in lines)
            nodes[name] = hosts[host]
    if len(hosts) < len(config.nodes):  # several nodes on one host
        nodes = {str(spec.id): spec.node for spec in config.processes()}
    processes = {name: of_process(nodes[name], env) for name, env in environments.items()}
    after = {
        role: len(
            re.findall(
                r"atoll-\w+\.target", re.search("^After=(.*)$", files[unit], re.MULTILINE)[1]
            )
        )
        for role in Role
        if (unit := "atoll-gateway.service" if role is Role.GATEWAY else f"atoll-{role}@.service")
    }
    loaded = cluster_config.parse(tomllib.loads(files["cluster.toml"]), source="units")
    return Meaning(processes, sorted(after, key=after.__getitem__), loaded, environments)


def job(config):
    """What the steps of a job run, on nodes with the cards that the TOML wants."""
    (script,) = slurm.render(config).values()
    text = script.split("END_OF_CLUSTER_TOML' || exit 1\n")[1].split("\nEND_OF_CLUSTER_TOML")[0]
    loaded = cluster_config.parse(tomllib.loads(text), source="job")
    reports = [
        NodeReport(f"n{i}", i, tuple(map(str, range(node.gpus))), (12_000,))
        for i, node in enumerate(loaded.nodes)
    ]
    resolved = allocation.resolve(loaded, reports, {}, Path("/job"))
    processes, environments = {}, {}
    for i, report in enumerate(reports):
        for role in Role:
            for id_, environment in allocation.environments(
                resolved, i, role, report.gpus, "/mps"
            ).items():
                environments[str(id_)] = environment
                processes[str(id_)] = of_process(i, environment)
    steps = re.search("^for step in (.*); do$", script, re.MULTILINE)[1]
    order = [Role(role) for role in re.findall(r"--role (\w+)", steps)]
    return Meaning(processes, order, loaded, environments)


@pytest.fixture(
    params=[*CLUSTERS, GPUS], ids=lambda it: it.stem if isinstance(it, Path) else "gpus"
)
def config(request, tmp_path):
    path = request.param
    if not isinstance(path, Path):
        path = tmp_path / "gpus.toml"
        path.write_text(request.param)
    return cluster_config.load(path)


@pytest.fixture(params=[local, units, job], ids=["local", "systemd", "slurm"])
def rendering(request):
    return request.param


def test_the_same_processes_on_the_same_nodes_and_cards(config, rendering):
    hosts = {node.host for node in config.nodes}
    described = {
        str(process.id): (process.node, None if process.gpu is None else str(process.gpu))
        for host in describe(config).hosts
        for process in host.processes
    }
    meaning = rendering(config)
    assert {name: place[:2] for name, place in meaning.processes.items()} == described
    assert len(hosts) in (1, len(config.nodes))
    shares = config.cluster.device == "cuda"
    assert all(mps == (shares and card is not None) for _, card, mps in meaning.processes.values())


def test_the_same_start_order(config, rendering):
    assert rendering(config).start_order == list(Role)


def test_every_process_reads_the_same_cluster(config, rendering):
    """Apart from what says where it runs."""

    def essence(it):
        return replace(
            it,
            cluster=replace(it.cluster, run_dir=Path(), secret_file=None),
            model=ModelSection(Path(), it.model.served_name, Path()),
            gateway=replace(it.gateway, host=""),
            nodes=tuple(replace(node, host=LOCAL) for node in it.nodes),
        )

    assert essence(rendering(config).config) == essence(config)


def test_supervisors_elsewhere_set_the_same_variables(config):
    hosts, nodes = units(config).environments, job(config).environments
    assert set(hosts) == set(nodes)
    for name in hosts:
        local_only = {"CUDA_MPS_PIPE_DIRECTORY"}
        if all(node.host == LOCAL for node in config.nodes):  # nodes of Slurm are never on one host
            local_only |= {variable for variable in hosts[name] if variable.startswith("UCX")}
            local_only |= {variable for variable in nodes[name] if variable.startswith("UCX")}
        ours = {k: v for k, v in hosts[name].items() if k not in local_only}
        assert ours == {k: v for k, v in nodes[name].items() if k not in local_only}


def test_a_stop_waits_as_long_and_goes_from_clients_to_experts(config):
    deadline_s = describe(config).stop_deadline_s
    unit = systemd.render(config)["atoll-expert@.service"]
    assert f"TimeoutStopSec={deadline_s:g}\n" in unit
    assert slurm.drain_s(config) > 2 * deadline_s
    assert next(iter(STOP_ORDER)) is Role.GATEWAY
    assert list(STOP_ORDER)[1] is Role.ATTENTION
