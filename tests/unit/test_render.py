"""What all renderings of a cluster TOML have in common, and `atoll render` itself."""

import subprocess
from pathlib import Path

import pytest

from common import config as cluster_config
from common.ids import Role
from deploy.cli import main
from deploy.render import systemd
from deploy.render.description import describe

CLUSTERS = sorted((Path(__file__).parents[2] / "deploy/clusters").glob("*.toml"))
GPU = """\
[model]
path = "/srv/model"
[cluster]
device = "cuda"
[[nodes]]
host = "a"
experts = 6
attention = 2
gpus = 8
[[nodes]]
host = "a"
experts = 1
attention = 0
gpus = 1
"""


@pytest.fixture(params=CLUSTERS, ids=lambda path: path.stem)
def cluster(request):
    return request.param


def render(target, cluster, out):
    return main(["render", target, "--cluster", str(cluster), "--out", str(out)])


def test_every_process_is_on_its_host_in_start_order(cluster):
    config = cluster_config.load(cluster)
    description = describe(config)
    assert len(description.hosts) == len({node.host for node in config.nodes})
    described = {p.id: host.name for host in description.hosts for p in host.processes}
    assert described == {s.id: config.nodes[s.node].host for s in config.processes()}
    for host in description.hosts:
        roles = [list(Role).index(process.id.role) for process in host.processes]
        assert roles == sorted(roles)


def test_cards_are_dealt_out_within_a_node(tmp_path):
    path = tmp_path / "gpu.toml"
    path.write_text(GPU)
    (host,) = describe(cluster_config.load(path)).hosts
    cards = {str(process.id): process.gpu for process in host.processes}
    assert (cards["attention-0"], cards["attention-1"]) == (0, 1)
    assert [cards[f"expert-{i}"] for i in range(7)] == [2, 3, 4, 5, 6, 7, 8]
    assert (cards["router-0"], cards["router-1"], cards["gateway-0"]) == (0, 8, None)
    assert host.shares_gpus
    environment = host.processes[0].environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert environment["CUDA_MPS_PIPE_DIRECTORY"] == "/run/atoll/mps"


def test_systemd_accepts_the_units(cluster, tmp_path):
    assert render("systemd", cluster, tmp_path / "out") == 0
    units = [p for p in (tmp_path / "out").iterdir() if p.suffix in (".service", ".target")]
    assert len([p for p in units if p.suffix == ".service"]) >= 4
    verified = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


def test_each_unit_file_of_a_host_is_rendered(cluster):
    files = systemd.render(cluster_config.load(cluster))
    for host in describe(cluster_config.load(cluster)).hosts:
        _, *units = files[f"{host.name}/enable"].splitlines()
        for unit in units:
            name, _, suffix = unit.partition("@")
            assert (f"{name}@.service" if suffix else name) in files
        for process in host.processes:
            assert systemd.unit_of(process) in units


def test_a_rendering_is_replaced_and_nothing_else(cluster, tmp_path, capsys):
    out = tmp_path / "out"
    assert render("systemd", cluster, out) == 0
    (out / "old-host").mkdir()
    (out / "old-host/enable").write_text("# Written by atoll render systemd\n")
    assert render("systemd", cluster, out) == 0
    assert not (out / "old-host").exists()
    (out / "mine.txt").write_text("notes\n")
    assert render("systemd", cluster, out) == 2
    assert "mine.txt was not written by atoll render" in capsys.readouterr().err
    assert (out / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
