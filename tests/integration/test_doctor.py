"""`atoll doctor` as a command, and its measured transfers, against real faults."""

import asyncio
import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from common.model.small import write_small_model
from common.transport.carriers import LinkClass
from deploy.doctor import judge_devices, read_model, transfers
from deploy.doctor.finding import Level
from tests.doctor_facts import cpu_host

ROOT = Path(__file__).parents[2]
PROBE = (sys.executable, "-m", transfers.PROBE)
CLUSTER = """\
[cluster]
secret_file = "{directory}/secret"
[model]
path = "{directory}/model"
[gateway]
port = {port}
"""
# stands for ssh: the same arguments, another process on this machine, and for host-b another clock
SSH = """\
#!/bin/sh
while [ "$1" != -- ]; do shift; done
case $2 in
host-b) export PYTHONPATH={directory}/skewed:$PYTHONPATH ;;
host-c) echo "ssh: connect to host host-c port 22: No route to host" >&2; exit 255 ;;
esac
shift 2
exec sh -c "$*"
"""
SKEW = "import time\nreal = time.time\ntime.time = lambda: real() + 45\n"


@pytest.fixture
def site(tmp_path):
    """A directory with a checkpoint, its hashes, a secret, and an `ssh` and `atoll` to be found first."""
    model = write_small_model(tmp_path / "model", num_experts=4)
    value = read_model.sha256(model / "model.safetensors")
    (model / "SHA256SUMS").write_text(f"{value}  model.safetensors\n")
    (tmp_path / "secret").write_text("0123456789abcdef" * 4)
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "skewed").mkdir()
    (tmp_path / "skewed/sitecustomize.py").write_text(SKEW)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(SSH.format(directory=tmp_path))
    atoll = f'#!/bin/sh\nexec {sys.executable} -m deploy.cli "$@"\n'
    (tmp_path / "bin/atoll").write_text(atoll)
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    return tmp_path


def write_cluster(site, *hosts, port):
    text = CLUSTER.format(directory=site, port=port)
    for i, host in enumerate(hosts):
        text += f'[[nodes]]\nhost = "{host}"\nattention = 1\nexperts = 2\nbase_port = {port + 1 + 10 * i}\n'
    (site / "cluster.toml").write_text(text)
    return site / "cluster.toml"


def listen(*ports):
    """On the first free one. Ports that the kernel gives out itself would not stay free: any connection takes one."""
    for port in ports:
        with contextlib.suppress(OSError):
            return socket.create_server(("0.0.0.0", port))
    raise AssertionError(f"none of {ports} is free")


def doctor(site, *arguments, shell=""):
    """Exit code, findings by host, and how it looked."""
    command = shlex.join([str(site / "bin/atoll"), "doctor", "--json", *map(str, arguments)])
    environment = os.environ | {"PATH": f"{site}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", shell + command], env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def failures(findings):
    return {f["check"]: f for f in findings if f["level"] == "failure"}


def test_four_faults_of_a_host_are_found_and_their_repairs_repair_them(site):
    with listen(32_000, 32_010, 32_020) as server:
        cluster = write_cluster(site, "127.0.0.1", port=server.getsockname()[1])
        (site / "secret").chmod(0o644)
        weights = site / "model/model.safetensors"
        whole = weights.read_bytes()
        os.truncate(weights, len(whole) - 100)
        code, found = doctor(site, "--cluster", cluster, shell="ulimit -Sn 70; ")
    wrong = failures(found["127.0.0.1"])
    assert (code, set(wrong)) == (1, {"fd limit", "ports", "secret", "checkpoint"})
    assert "in use by" in wrong["ports"]["text"]
    assert "mode 0644" in wrong["secret"]["text"]
    assert "truncated" in wrong["checkpoint"]["text"]
    # the port is free again and the file copied again; the other two as the doctor says
    weights.write_bytes(whole)
    subprocess.run(["sh", "-c", wrong["secret"]["fix"]], check=True)
    assert wrong["fd limit"]["fix"].startswith("ulimit -n ")
    code, found = doctor(
        site, "--cluster", cluster, shell=f"ulimit -Sn 70; {wrong['fd limit']['fix']}; "
    )
    assert (code, failures(found["127.0.0.1"])) == (0, {})
    measured = {f["check"] for f in found["127.0.0.1"] if f["check"].startswith("transfer")}
    assert measured == {"transfer self", "transfer shm", "transfer tcp"}


def test_every_host_is_asked_over_ssh_and_what_differs_is_found(site):
    with listen(32_200, 32_230, 32_260) as server:
        port = server.getsockname()[1]
    cluster = write_cluster(site, "host-a", "host-b", "host-c", port=port)
    code, found = doctor(site, "--cluster", cluster)
    assert (code, set(found)) == (1, {"cluster", "host-a", "host-b"})
    wrong = failures(found["cluster"])
    assert set(wrong) == {"reached", "clock skew"}
    assert wrong["reached"]["text"] == (
        "host-c: ssh: connect to host host-c port 22: No route to host"
    )
    assert wrong["reached"]["fix"].endswith("-- host-c true")
    skew_s = float(
        re.fullmatch(r"host-b and host-a are (\S+) s apart", wrong["clock skew"]["text"])[1]
    )
    assert 40 < skew_s < 50, "45 and the time between the two readings"
    (between,) = [f for f in found["cluster"] if f["check"] == "transfer tcp"]
    assert "host-a to host-b by tcp/" in between["text"]


def measure(link_class, sender, receiver, **environment):
    ends = transfers.Ends(link_class, "", sender, receiver, environment)
    (found,) = asyncio.run(transfers.measure_all([ends]))
    return found


def judged(found):
    return judge_devices.transfer(found, judge_devices.reference(found, cpu_host()))


def test_a_transfer_over_another_class_than_asked_for_fails():
    tcp = transfers.environment_of(LinkClass.TCP, devices="lo")
    found = measure(LinkClass.SHM, (*PROBE, "sender"), (*PROBE, "receiver"), **tcp)
    assert found.carriers == ("tcp/lo",)
    assert judged(found).level is Level.FAILURE
    assert "not what was asked for" in judged(found).text


def test_a_transport_that_this_ucx_lacks_fails():
    rc = transfers.environment_of(LinkClass.RDMA, devices="mlx5_0:1")
    found = measure(LinkClass.RDMA, (*PROBE, "sender"), (*PROBE, "receiver"), **rc)
    assert found.problem
    assert judged(found).level is Level.FAILURE


def test_a_twin_that_dies_fails_with_its_last_words():
    twin = (sys.executable, "-c", "raise SystemExit('no such card')")
    found = measure(LinkClass.TCP, (*PROBE, "sender"), twin, UCX_TLS="tcp,self")
    assert found.problem == "no such card"
    assert judged(found).level is Level.FAILURE


def test_a_twin_that_hangs_fails_in_time(monkeypatch):
    monkeypatch.setattr(transfers, "DEADLINE_S", 2)
    twin = (sys.executable, "-c", "input()")
    found = measure(LinkClass.TCP, (*PROBE, "sender"), twin, UCX_TLS="tcp,self")
    assert found.problem == "nothing came back within 2 s"


def test_bytes_that_arrive_changed_fail():
    twin = """
from common.transport import transfer_probe as probe
seen = probe.Memory.is_whole
def changed(memory):
    memory.blocks[2][-1] += 1
    return seen(memory)
probe.Memory.is_whole = changed
probe.main("receiver")
"""
    tcp = transfers.environment_of(LinkClass.TCP, devices="lo")
    found = measure(LinkClass.TCP, (*PROBE, "sender"), (sys.executable, "-c", twin), **tcp)
    assert found.problem == "what arrived was not what was sent"


def test_a_ucx_that_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "ucxx.py").write_text("raise ImportError('libucp.so.0: cannot open')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    found = asyncio.run(transfers.about())
    assert "libucp.so.0: cannot open" in found.problem
