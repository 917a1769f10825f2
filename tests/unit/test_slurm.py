"""Slurm: the rendered script as text, and how an allocation becomes hosts, ports and GPUs."""

import functools
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from common import config as cluster_config
from common.errors import ConfigError
from common.ids import Role
from deploy.cli import main
from deploy.render import slurm
from deploy.render.description import describe
from deploy.slurm import allocation
from deploy.slurm.allocation import NodeReport

CLUSTERS = sorted((Path(__file__).parents[2] / "deploy/clusters").glob("*.toml"))
JOB = Path("/scratch/atoll-7.0")
THREE = """\
[cluster]
name = "three"
device = "{device}"
oversubscribe = {oversubscribe}
[model]
path = "/srv/model"
[gateway]
port = {port}
[[nodes]]
attention = 2
experts = 2
gpus = {gpus}
[[nodes]]
attention = 0
experts = 2
gpus = {gpus}
base_port = {base_port}
[[nodes]]
attention = 1
experts = 2
gpus = {gpus}
"""


@pytest.fixture
def three(tmp_path):
    def load(*, device="cpu", port=8000, gpus=0, base_port=0, oversubscribe=True):
        path = tmp_path / "three.toml"
        values = {"device": device, "port": port, "gpus": gpus, "base_port": base_port}
        path.write_text(THREE.format(**values, oversubscribe=str(oversubscribe).lower()))
        return cluster_config.load(path)

    return load


def report(config, node_id, *, job_id=7, **changes):
    first = allocation.first_ports(config.nodes[node_id], node_id, job_id)
    facts = NodeReport(f"n{node_id + 1}", node_id, ("4", "5"), tuple(first))
    return replace(facts, **changes)


def resolve(config, *reports, addresses=None):
    return allocation.resolve(config, reports, addresses or {}, JOB)


# ---- the script -------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda path: path.stem)
def test_renders_bash_only_and_carries_the_cluster(cluster, tmp_path):
    out = tmp_path / "out"
    assert main(["render", "slurm", "--cluster", str(cluster), "--out", str(out)]) == 0
    (script,) = out.iterdir()
    text = script.read_text()
    assert text.startswith("#!/bin/bash\n")
    assert script.stat().st_mode & 0o111
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    config = cluster_config.load(cluster)
    assert config.to_toml() in text
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in text.splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["nodes"] == str(len(config.nodes))
    assert options["signal"] == f"B:TERM@{slurm.drain_s(config)}"
    assert "requeue" in options
    assert main(["render", "slurm", "--cluster", str(cluster), "--out", str(out)]) == 0


def test_the_job_is_told_early_enough_to_drain_twice(three):
    config = three()
    assert slurm.drain_s(config) > 2 * describe(config).stop_deadline_s


@pytest.mark.parametrize(("gpus", "asked"), [(3, "=3"), (0, "=4")])
def test_gpus_of_the_fullest_node_are_asked_for(three, gpus, asked):
    (text,) = slurm.render(three(device="cuda", gpus=gpus)).values()
    assert f"#SBATCH --gpus-per-node{asked}\n" in text
    (text,) = slurm.render(three(gpus=gpus)).values()
    assert "gpus" not in text.partition("[model]")[0]


@pytest.mark.parametrize("name", ["a b", "x;rm", "", "-n", "$(id)"])
def test_a_name_that_cannot_be_a_jobs(three, name):
    config = three()
    config = replace(config, cluster=replace(config.cluster, name=name))
    with pytest.raises(ConfigError, match="cannot be a job's name"):
        slurm.render(config)


# ---- the allocation ---------------------------------------------------------------------------


def test_hosts_ports_and_directory_come_from_the_allocation(three):
    config = three(port=0)
    addresses = {"n1": "10.0.0.1", "n2": "10.0.0.2"}
    resolved = resolve(config, *(report(config, i) for i in (2, 0, 1)), addresses=addresses)
    assert [node.host for node in resolved.nodes] == ["10.0.0.1", "10.0.0.2", "n3"]
    assert resolved.cluster.run_dir == JOB
    assert resolved.secret_path == JOB / "secret"
    first = resolved.nodes[0].base_port
    assert resolved.gateway.port == first + allocation.GATEWAY_PORT_OFFSET
    assert resolved.gateway.port in allocation.ports(config, 0, first)
    assert {spec.address for spec in resolved.processes()} >= {f"tcp://10.0.0.1:{first + 101}"}


def test_a_gateway_port_of_the_file_is_kept(three):
    config = three(port=8123)
    assert resolve(config, *(report(config, i) for i in range(3))).gateway.port == 8123
    assert 8123 not in allocation.ports(config, 0, 10_000)


def test_nodes_of_one_address_and_jobs_side_by_side_share_no_port(three):
    config = three()
    same = dict.fromkeys(("n1", "n2", "n3"), "127.0.0.1")
    used: set[int] = set()
    for job_id in (7, 8, 9):
        reports = [report(config, i, job_id=job_id) for i in range(3)]
        resolved = resolve(config, *reports, addresses=same)
        ports = [
            port
            for i, node in enumerate(resolved.nodes)
            for port in allocation.ports(config, i, node.base_port)
        ]
        assert len(set(ports)) == len(ports)
        assert not used & set(ports)
        used |= set(ports)


def test_the_same_free_range_goes_to_one_node_of_an_address(three):
    config = three()
    reports = [report(config, i, first_ports=(12_000, 12_200, 12_400)) for i in range(3)]
    same = dict.fromkeys(("n1", "n2", "n3"), "127.0.0.1")
    resolved = resolve(config, *reports, addresses=same)
    assert [node.base_port for node in resolved.nodes] == [12_000, 12_200, 12_400]
    apart = resolve(config, *reports)
    assert [node.base_port for node in apart.nodes] == [12_000] * 3


def test_every_range_is_tried_and_stays_below_the_ephemeral_ports(three):
    node = three().nodes[0]
    firsts = allocation.first_ports(node, 5, 123_456)
    assert len(set(firsts)) == len(firsts) > 100
    assert all(first > 1024 and first + 200 <= 32_768 for first in firsts)
    assert allocation.first_ports(three(base_port=7600).nodes[1], 1, 7) == [7600]


def test_cards_are_those_of_the_allocation(three):
    config = three(device="cuda")
    resolved = resolve(config, *(report(config, i) for i in range(3)))
    assert [node.gpus for node in resolved.nodes] == [2, 2, 2]
    ask = functools.partial(allocation.environments, resolved, gpus=("4", "5"), mps_dir="/run/mps")
    for node_id, role, cards in [
        (0, Role.ATTENTION, ["4", "4"]),
        (0, Role.EXPERT, ["5", "5"]),
        (1, Role.EXPERT, ["4", "5"]),
        (2, Role.ROUTER, ["4"]),
    ]:
        environments = ask(node_id=node_id, role=role).values()
        assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == cards
        assert {e["CUDA_MPS_PIPE_DIRECTORY"] for e in environments} == {"/run/mps"}
    same = dict.fromkeys(("n1", "n2", "n3"), "127.0.0.1")  # each still counts its own cards from 0
    beside = resolve(config, *(report(config, i) for i in range(3)), addresses=same)
    cards = allocation.environments(beside, 2, Role.EXPERT, ("4", "5"), None).values()
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in cards] == ["5", "5"]
    (gateway,) = ask(node_id=0, role=Role.GATEWAY).values()
    assert not any(name.startswith("CUDA") for name in gateway)
    assert ask(node_id=1, role=Role.ATTENTION) == {}


def test_mps_has_a_step_where_there_are_gpus(three):
    (text,) = slurm.render(three(device="cuda", gpus=3)).values()
    assert "for step in 'mps' 'step --role router' 'step --role expert'" in text
    (text,) = slurm.render(three()).values()
    assert "for step in 'step --role router'" in text


@pytest.mark.parametrize(
    ("options", "changes", "sentence"),
    [
        ({}, {"problem": "/srv/model/config.json does not exist there (model.path)"},
         r"^node n2: /srv/model/config.json does not exist there \(model.path\)$"),
        ({}, {"first_ports": ()}, "^node n2 has no free range of ports from 10000 up$"),
        ({"base_port": 7600}, {"first_ports": ()},
         r"^port 7600 of node n2 or one after it is in use \(nodes\[1\].base_port\)$"),
        ({"device": "cuda", "gpus": 2}, {"gpus": ("0",)},
         r"^node n2 has 1 GPUs in this allocation, nodes\[1\] needs 2$"),
        ({"device": "cuda"}, {"gpus": ()}, r"^node n2 has 0 GPUs in this allocation, .* needs 1$"),
        ({"device": "cuda", "oversubscribe": False}, {},
         r"^node n1 has 2 GPUs in this allocation, nodes\[0\] needs 4; sharing them needs cluster"),
        ({}, {"position": 3}, "^node 1 of the allocation did not report$"),
    ],
)  # fmt: skip
def test_an_allocation_that_does_not_do(three, options, changes, sentence):
    config = three(**options)
    reports = [report(config, 0), report(config, 1, **changes), report(config, 2)]
    with pytest.raises(ConfigError, match=sentence):
        resolve(config, *reports)


def test_one_sentence_for_the_same_problem_on_every_node(three):
    config = three()
    reports = [report(config, i, problem="no model") for i in range(3)]
    with pytest.raises(ConfigError, match=r"^node n1: no model .and 2 more nodes with a problem.$"):
        resolve(config, *reports)


def test_too_few_nodes(three):
    allocation.check_size(three(), 3)
    with pytest.raises(ConfigError, match=r"^the allocation has 2 nodes, cluster three needs 3$"):
        allocation.check_size(three(), 2)


def test_what_scontrol_says():
    shown = (
        "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.1 Port=1\nNodeName=n2 NodeAddr=n2.net OS=a b=c\n\n"
    )
    assert allocation.node_addresses(shown) == {"n1": "10.0.0.1", "n2": "n2.net"}
    assert allocation.kill_wait_s("KeepAliveTime = x\nKillWait                = 30 sec\n") == 30.0
    assert allocation.kill_wait_s("") is None


# ---- the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["step", "--job-dir", "here"], "atoll slurm step needs --role"),
        (["prepare", "--job-dir", "no-such-job"], "no-such-job/cluster.toml"),
        (["probe", "--job-dir", "here"], "SLURMD_NODENAME is not set: this command is for inside a Slurm job"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(arguments, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    assert main(["slurm", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert sentence in error
