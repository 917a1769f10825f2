"""The systemd rendering: life cycle, limits, order and hardening of the units, and the script that delays restarts."""

import configparser
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from common import config as cluster_config
from common.ids import Role
from deploy.cli import main
from deploy.render import systemd
from deploy.render.description import describe
from tests.systemd.readme import README, commands_by_host, slurm_commands

ROOT = Path(__file__).parents[2]
SERVICES = [
    "atoll-gateway.service",
    "atoll-router@.service",
    "atoll-attention@.service",
    "atoll-expert@.service",
]
GOOD = """\
[model]
path = "/srv/model"
[cluster]
device = "cpu"
[limits]
start_deadline_s = 77
watchdog_s = 33
drain_deadline_s = 20
[[nodes]]
host = "a"
experts = 2
"""


GPU = GOOD.replace('"cpu"', '"cuda"').replace("experts = 2", "experts = 2\ngpus = 3")


def unit(text):
    """Section -> key -> value; a key that is given twice keeps its last value."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=["="])
    parser.optionxform = str
    parser.read_string(text)
    return parser


@pytest.fixture
def rendering(tmp_path):
    def render(text=GOOD):
        path = tmp_path / "cluster.toml"
        path.write_text(text)
        return systemd.render(cluster_config.load(path))

    return render


@pytest.mark.parametrize("name", SERVICES)
def test_life_of_a_service(rendering, name):
    service = unit(rendering()[name])["Service"]
    assert (service["Type"], service["NotifyAccess"], service["Restart"]) == (
        "notify",
        "main",
        "on-failure",
    )
    assert (service["TimeoutStartSec"], service["WatchdogSec"], service["TimeoutStopSec"]) == (
        "77",
        "33",
        "25",
    )
    assert service["RestartPreventExitStatus"] == "2"
    assert (service["KillMode"], service["User"]) == ("mixed", "atoll")
    assert (service["LimitMEMLOCK"], service["LimitNOFILE"]) == ("infinity", "65536")
    role = name.removeprefix("atoll-").partition(".")[0].partition("@")[0]
    index = "0" if role == "gateway" else "%i"
    assert (
        service["ExecStart"]
        == f"/usr/bin/env atoll run {role} --cluster /etc/atoll/cluster.toml --index {index}"
    )
    assert service["EnvironmentFile"] == f"/etc/atoll/env/{role}-{index}"


def test_a_role_starts_after_and_stops_before_those_it_needs(rendering):
    files = rendering()
    for position, role in enumerate(Role):
        name = SERVICES[[Role.GATEWAY, Role.ROUTER, Role.ATTENTION, Role.EXPERT].index(role)]
        section = unit(files[name])["Unit"]
        own = "atoll.target" if role is Role.GATEWAY else f"atoll-{role}.target"
        assert section["Before"] == section["PartOf"] == own
        assert section["After"].split()[2:] == [f"atoll-{r}.target" for r in list(Role)[:position]]
        if role is not Role.GATEWAY:
            assert own in unit(files["atoll.target"])["Unit"]["Wants"].split()
            assert unit(files[own])["Unit"]["PartOf"] == "atoll.target"


def test_devices_are_closed_except_for_the_gpus(rendering):
    cpu = rendering()["atoll-expert@.service"]
    gpu = rendering(GPU)
    assert "PrivateDevices=yes" in cpu
    assert "DeviceAllow" not in cpu
    assert "PrivateDevices" not in gpu["atoll-expert@.service"]
    assert "DeviceAllow=char-nvidia* rw" in gpu["atoll-expert@.service"]
    assert "atoll-mps.service" in gpu["a/enable"].splitlines()
    assert "atoll-mps.service" not in rendering()["a/enable"].splitlines()


def test_the_rendered_toml_is_the_cluster_with_the_paths_of_an_installed_system(
    rendering, tmp_path
):
    files = rendering()
    (tmp_path / "rendered.toml").write_text(files["cluster.toml"])
    config = cluster_config.load(tmp_path / "rendered.toml")
    assert config.secret_path == Path("/etc/atoll/secret")
    assert config.model.cache_dir == Path("/var/cache/atoll")
    assert config.nodes == cluster_config.load(tmp_path / "cluster.toml").nodes
    assert systemd.render(config) == files, "rendering the rendered file changes nothing"
    assert "d /run/atoll 0750 atoll atoll -" in files["tmpfiles.conf"]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"/srv/model"', '"model"', ":2: model.path is /tmp/"),
        (
            '"/srv/model"',
            '"/home/me/model"',
            ":2: model.path is /home/me/model, but units see nothing of /home",
        ),
        (
            "[cluster]",
            '[cluster]\nsecret_file = "/root/secret"',
            ":4: cluster.secret_file is /root/secret",
        ),
        ('"cpu"', '"cuda"', ":9: nodes[0].gpus"),
        ("[cluster]", '[cluster]\nname = "two words"', ":4: cluster.name"),
        ("[cluster]", '[cluster]\nname = "%i"', ":4: cluster.name"),
        ("[cluster]", '[cluster]\nname = "a\\nb"', ":4: cluster.name"),
        ("[cluster]", '[cluster]\nrun_dir = "/run/two words"', ":4: cluster.run_dir"),
        ('"a"', '".."', ":10: nodes[0].host"),
    ],
)
def test_mistake_is_one_sentence_with_file_line_and_key(tmp_path, capsys, old, new, sentence):
    path = tmp_path / "cluster.toml"
    path.write_text(GOOD.replace(old, new))
    out = tmp_path / "out"
    assert main(["render", "systemd", "--cluster", str(path), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"atoll: {path}{sentence}")
    assert error.count("\n") == 1
    assert not out.exists()


def exposure(path):
    """Of a unit file, as systemd computes it: 0 (none) to 10."""
    command = ["systemd-analyze", "security", "--offline=true", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.rstrip().rpartition("\n")[2].split(":")[1].split()[0])


def test_hardening_is_what_the_readme_says(rendering, tmp_path):
    scores = {}
    for device, text in (("CPU", GOOD), ("GPU", GPU)):
        files = rendering(text)
        for name in (*SERVICES, "atoll-mps.service"):
            (tmp_path / name).write_text(files[name])
            scores[device, name] = exposure(tmp_path / name)
    said = re.search(r"(\S+) on hosts without GPUs, (\S+) with, (\S+) for MPS", README.read_text())
    cpu, gpu, mps = map(float, said.groups())
    for (device, name), score in scores.items():
        limit = mps if "mps" in name else gpu if device == "GPU" else cpu
        assert score <= limit, (device, name)


class Restarts:
    """`restart-backoff` as systemd runs it, with a `sleep` that says how long it was asked to wait."""

    def __init__(self, directory):
        (directory / "bin").mkdir()
        sleep = directory / "bin/sleep"
        sleep.write_text(f'#!/bin/sh\necho "$1" >>{directory}/slept\n')
        sleep.chmod(0o755)
        self.directory = directory
        self.count = directory / "short-runs"

    def start(self):
        """Seconds that this start waited."""
        environment = {
            "RUNTIME_DIRECTORY": str(self.directory),
            "PATH": f"{self.directory}/bin:{os.environ['PATH']}",
        }
        slept = self.directory / "slept"
        slept.unlink(missing_ok=True)
        subprocess.run([ROOT / "deploy/restart-backoff"], check=True, env=environment)
        return int(slept.read_text()) if slept.exists() else 0


def test_restarts_become_rare_and_a_long_run_forgets_them(tmp_path):
    restarts = Restarts(tmp_path)
    assert [restarts.start() for _ in range(10)] == [0, 0, 1, 2, 4, 8, 16, 30, 30, 30]
    an_hour_ago = time.time() - 3600
    os.utime(restarts.count, (an_hour_ago, an_hour_ago))
    assert [restarts.start() for _ in range(3)] == [0, 0, 1]


def test_readme_needs_at_most_five_commands():
    config = cluster_config.load(ROOT / "deploy/clusters/two-hosts.toml")
    commands = commands_by_host()
    assert list(commands) == [host.name for host in describe(config).hosts]
    assert all(1 <= len(lines) <= 5 for lines in commands.values())
    assert 1 <= len(slurm_commands()) <= 5
