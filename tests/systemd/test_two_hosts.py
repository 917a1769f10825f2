"""A cluster over two hosts under a real systemd, from the commands of deploy/README.md to the last file removed.

`make test-systemd` runs it and writes what was checked, and how long it took, to tests/systemd/result.json.
"""

import json
import os
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.deployment import (
    PROMPTS,
    drains,
    expected_tokens,
    serves,
    survives_a_kill,
    wait_until_ready,
)
from tests.machine import ROOT, Record, sh, wait_for
from tests.systemd.hosts import ADDRESSES, Host, two_hosts
from tests.systemd.readme import commands_by_host

URL = f"http://{ADDRESSES['atoll-a']}:8000"
EXPERTS = {"atoll-a": range(8), "atoll-b": range(8, 16)}
UNITS = {
    "atoll-a": ["router@0", "attention@0", "gateway", *(f"expert@{i}" for i in EXPERTS["atoll-a"])],
    "atoll-b": ["router@1", *(f"expert@{i}" for i in EXPERTS["atoll-b"])],
}
# what belongs to the machine and changes by itself or with any account or service
NOT_OURS = (
    *("/var/log/", "/var/lib/systemd/", "/tmp/", "/var/tmp/"),
    *("/root/.ssh", "/root/atoll", "/root/.python_history"),
    *("/etc/passwd-", "/etc/group-", "/etc/shadow-", "/etc/gshadow-", "/etc/.pwd.lock"),
    *("/etc/subuid-", "/etc/subgid-"),
)


class Units:
    """The cluster as a `Deployment`; clients are on the second host."""

    def __init__(self, hosts: dict[str, Host]) -> None:
        self._hosts = hosts
        self.try_sh = hosts["atoll-b"].try_sh

    def url(self) -> str:
        return URL

    def pid_of(self, name: str) -> int:
        host, unit = self._place(name)
        active = host.show(unit, "ActiveState") == "active"
        return int(host.show(unit, "MainPID")) if active else 0

    def kill(self, name: str) -> None:
        host, unit = self._place(name)
        host.sh(f"kill -9 {host.show(unit, 'MainPID')}")

    def stop(self) -> None:
        for host in self._hosts.values():  # the gateway's first; the pattern makes systemctl wait
            host.sh("systemctl stop atoll.target 'atoll-*'")

    def _place(self, name: str) -> tuple[Host, str]:
        unit = name.replace("-", "@")
        (host,) = (self._hosts[host] for host, units in UNITS.items() if unit in units)
        return host, f"atoll-{unit}.service"


def units_are_active(hosts: dict[str, Host]) -> None:
    for name, units in UNITS.items():
        for unit in units:
            assert hosts[name].show(f"atoll-{unit}.service", "ActiveState") == "active", unit
            assert hosts[name].show(f"atoll-{unit}.service", "NotifyAccess") == "main"
        active = hosts[name].sh(
            "systemctl list-units --plain --no-legend --state=active 'atoll*.service'"
        )
        assert len(active.splitlines()) == len(units)


def installed_as_said(host: Host) -> None:
    assert host.sh("stat -c '%a %U' /etc/atoll/secret") == "600 atoll\n"
    assert host.sh("systemctl is-enabled atoll.target") == "enabled\n"
    users = set(
        host.sh("ps -eo user:20,args | awk '/[a]toll run|[s]ervices\\./{print $1}'").split()
    )
    assert users == {"atoll"}
    assert "atoll" in host.sh("atoll --help")


def doctor_is_content(host: Host) -> None:
    """With a cluster that runs, from one of its hosts; then for a TOML of which the other host has another version."""
    code, out, err = host.try_sh("atoll doctor --cluster /etc/atoll/cluster.toml --json")
    assert code in (0, 1), err
    found = json.loads(out)
    failures = [f for lines in found.values() for f in lines if f["level"] == "failure"]
    assert (code, failures) == (0, [])
    assert set(found) == {"cluster", *ADDRESSES.values()}
    between = [f["text"] for f in found["cluster"] if f["check"] == "transfer tcp"]
    assert len(between) == 1
    assert "10.77.0.1 to 10.77.0.2 by tcp/eth0" in between[0]


def stuck_expert_is_noticed(host: Host, index: int) -> None:
    """The watchdog of one unit is set short by a drop-in, as an operator would."""
    unit = f"atoll-expert@{index}.service"
    drop_in = f"/run/systemd/system/{unit}.d"
    host.sh(f"mkdir {drop_in} && printf '[Service]\\nWatchdogSec=4\\n' >{drop_in}/short.conf")
    host.sh(f"systemctl daemon-reload && systemctl restart {unit}")
    before = host.show(unit, "NRestarts")
    time.sleep(10)
    assert host.show(unit, "NRestarts") == before, "an idle expert keeps its watchdog content"
    host.sh(f"kill -STOP {host.show(unit, 'MainPID')}")
    wait_for(
        "the watchdog",
        lambda: (
            host.show(unit, "NRestarts") != before and host.show(unit, "ActiveState") == "active"
        ),
        40,
    )
    assert "Watchdog timeout" in host.sh(f"journalctl -q --no-pager -u {unit}")
    host.sh(f"rm -r {drop_in} && systemctl daemon-reload")


def stopped_in_order(host: Host) -> None:
    """Each role before those it needs."""
    ended = [
        [int(host.show(f"atoll-{unit}", "InactiveEnterTimestampMonotonic")) for unit in units]
        for units in (["gateway"], ["attention@0"], [f"expert@{i}" for i in range(8)], ["router@0"])
    ]
    assert all(max(former) <= min(latter) for former, latter in pairwise(ended)), ended


def nothing_runs(host: Host) -> None:
    assert host.processes() == []
    assert host.sh("systemctl --failed --plain --no-legend") == ""
    assert "python" not in host.sh("ss -Hlnptx")
    assert host.sh("find /run/atoll /run/atoll-* /dev/shm -mindepth 1 2>/dev/null || true") == ""


def bad_input_is_one_sentence(host: Host) -> None:
    unit = f"atoll-expert@{EXPERTS[host.name][0]}.service"
    host.sh(
        "cp /etc/atoll/cluster.toml /tmp/good && sed -i 's/^wire = .*/wire = \"fp16\"/' /etc/atoll/cluster.toml"
    )
    assert host.try_sh(f"systemctl start {unit}")[0] != 0
    assert (host.show(unit, "ExecMainStatus"), host.show(unit, "NRestarts")) == ("2", "0")
    assert "cluster.wire must be one of fp8, bf16, fp32, not 'fp16'" in host.sh(
        f"journalctl -q --no-pager -u {unit}"
    )
    host.sh("mv /tmp/good /etc/atoll/cluster.toml && systemctl reset-failed")
    code, out, err = host.try_sh("deploy/install.sh --cluster none.toml")
    assert (code, out) == (2, "")
    assert err == "install.sh: cluster TOML none.toml: no such file (--cluster)\n"


def upgrade_and_back(hosts: dict[str, Host], units: Units, expected: list[list[int]]) -> None:
    b = hosts["atoll-b"]
    old = b.sh("readlink /opt/atoll/current").strip()
    author = ("-c", "user.name=t", "-c", "user.email=t@t")
    sh("git", "-C", b.root / "root/atoll", *author, "commit", "-q", "--allow-empty", "-m", "next")
    b.sh("deploy/install.sh")
    new = b.sh("readlink /opt/atoll/current").strip()
    assert new != old
    b.sh("systemctl restart atoll.target")
    hosts["atoll-a"].sh("systemctl start atoll.target")
    wait_until_ready(units)
    assert new in b.sh(f"cat /proc/{b.show('atoll-router@1', 'MainPID')}/maps"), (
        "the new version runs"
    )
    serves(units, expected)
    b.sh("/opt/atoll/current/install.sh --rollback")
    assert b.sh("readlink /opt/atoll/current").strip() == old
    b.sh("systemctl restart atoll.target")
    wait_until_ready(units)
    serves(units, expected)


def uninstalled(host: Host, before: set[str]) -> None:
    host.sh("/opt/atoll/current/install.sh --uninstall")
    nothing_runs(host)
    new = host.files() - before
    # logins and systemd itself come and go in /run; whatever is ours there bears our name
    passing = {path for path in new if path.startswith("/run/") and "atoll" not in path}
    left = {path for path in new - passing if not path.startswith(NOT_OURS)}
    assert left == set()


@pytest.mark.systemd
def test_cluster_over_two_hosts(tmp_path: Path) -> None:
    record = Record()
    tmp_path.chmod(0o700)
    expected = expected_tokens(tmp_path)
    started = time.monotonic()
    with two_hosts() as hosts:
        seconds = round(time.monotonic() - started, 1)
        record.checks.append({"what": "two Debian hosts booted by systemd", "seconds": seconds})
        a, b = hosts.values()
        units = Units(hosts)
        before = {host.name: host.files() for host in hosts.values()}
        for address, commands in commands_by_host().items():
            host = next(host for host in hosts.values() if host.address == address)
            for command in commands:
                with record.step(f"{host.name}: {command}"):
                    host.sh(command)
        with record.step("every unit active, run by the service user, secret 0600"):
            units_are_active(hosts)
            installed_as_said(a)
            installed_as_said(b)
        with record.step(f"{len(PROMPTS)} completions equal those of a local atoll up"):
            serves(units, expected)
        with record.step(
            "kill -9 of an expert under load: restarted, no request lost, same tokens"
        ):
            survives_a_kill(units, "expert-12", expected)
            assert b.show("atoll-expert@12.service", "NRestarts") == "1"
        with record.step("SIGSTOP of an expert: restarted by the watchdog, same tokens"):
            stuck_expert_is_noticed(b, 15)
            serves(units, expected)
        with record.step("atoll doctor --cluster over ssh: both hosts without a failure"):
            doctor_is_content(a)
        with record.step("systemctl stop: requests in flight finished, roles stopped in order"):
            drains(units, expected)
            stopped_in_order(a)
        with record.step("stopped: no process, socket or file of a run left"):
            for host in hosts.values():
                nothing_runs(host)
        with record.step("a mistake in the TOML: one sentence, exit code 2, no restart"):
            bad_input_is_one_sentence(b)
        with record.step("upgrade and rollback of one host, same tokens"):
            upgrade_and_back(hosts, units, expected)
        with record.step("uninstalled on both hosts: no file, account or unit left"):
            for host in hosts.values():
                uninstalled(host, before[host.name])
        versions = {
            "systemd": a.sh("systemctl --version").split()[1],
            "python": a.sh("python3 -V").split()[1],
        }
    if out := os.environ.get("ATOLL_SYSTEMD_RESULT"):
        record.write(ROOT / out, **versions)
