"""A cluster over two hosts under a real systemd, from the commands of deploy/README.md to the last file removed.

`make test-systemd` runs it and writes what was checked, and how long it took, to tests/systemd/result.json.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from deploy.local.models import DEMO_MODEL
from tests.e2e.harness import Cluster
from tests.systemd.hosts import ADDRESSES, ROOT, Host, sh, two_hosts, wait_for
from tests.systemd.readme import commands_by_host

URL = f"http://{ADDRESSES['atoll-a']}:8000"
PROMPTS = [[1, 17, 300, 42], [7] * 9, list(range(100, 130)), [5]]
NUM_TOKENS = 24
EXPERTS = {"atoll-a": range(8), "atoll-b": range(8, 16)}
UNITS = {
    "atoll-a": ["router@0", "attention@0", "gateway", *(f"expert@{i}" for i in EXPERTS["atoll-a"])],
    "atoll-b": ["router@1", *(f"expert@{i}" for i in EXPERTS["atoll-b"])],
}
# what belongs to the machine and changes by itself or with any account or service
NOT_OURS = (
    *("/var/log/", "/run/systemd/", "/run/log/", "/var/lib/systemd/", "/tmp/", "/var/tmp/"),
    *("/run/user", "/run/utmp", "/root/.ssh", "/root/atoll", "/root/.python_history"),
    *("/etc/passwd-", "/etc/group-", "/etc/shadow-", "/etc/gshadow-", "/etc/.pwd.lock"),
    *("/etc/subuid-", "/etc/subgid-"),
)


class Record:
    """The steps that passed, with their seconds."""

    def __init__(self) -> None:
        self.checks: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        seconds = round(time.monotonic() - started, 1)
        print(f"{seconds:6.1f} s  {what}", flush=True)
        self.checks.append({"what": what, "seconds": seconds})

    def write(self, path: Path, **facts: Any) -> None:
        commit = sh("git", "-C", ROOT, "rev-parse", "HEAD").strip()
        clean = not sh("git", "-C", ROOT, "status", "--porcelain", "--untracked-files=no").strip()
        head = {"date": datetime.now(UTC).date().isoformat(), "commit": commit, "clean": clean}
        path.write_text(json.dumps({**head, **facts, "checks": self.checks}, indent=1) + "\n")


def completions(
    host: Host, prompts: list[list[int]], num_tokens: int = NUM_TOKENS
) -> list[list[int]]:
    """Greedy continuations, all asked for at once by clients on a host."""
    answers: list[Any] = [None] * len(prompts)

    def ask(i: int) -> None:
        body = {
            "model": "atoll-demo", "prompt": prompts[i], "max_tokens": num_tokens, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        curl = (
            f"curl -sS --fail-with-body -H 'content-type: application/json' -d '{json.dumps(body)}'"
        )
        answers[i] = host.try_sh(f"{curl} {URL}/v1/completions")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(code == 0 for code, _, _ in answers), answers
    return [json.loads(out)["choices"][0]["token_ids"] for _, out, _ in answers]


def wait_until_ready(host: Host) -> None:
    wait_for("readiness", lambda: host.try_sh(f"curl -sf {URL}/ready")[0] == 0, 90)


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


def killed_expert_comes_back(host: Host, index: int, expected: list[list[int]]) -> None:
    unit = f"atoll-expert@{index}.service"
    pid = host.show(unit, "MainPID")
    answers: list[list[list[int]]] = []
    client = threading.Thread(target=lambda: answers.append(completions(host, PROMPTS)))
    client.start()
    time.sleep(0.3)
    host.sh(f"kill -9 {pid}")
    wait_for(
        "the restart",
        lambda: host.show(unit, "NRestarts") == "1" and host.show(unit, "ActiveState") == "active",
        30,
    )
    client.join()
    assert host.show(unit, "MainPID") not in (pid, "0")
    assert answers == [expected], "requests in flight while the expert was killed"
    assert completions(host, PROMPTS) == expected


def stuck_expert_is_noticed(host: Host, index: int, expected: list[list[int]]) -> None:
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
    assert completions(host, PROMPTS) == expected
    host.sh(f"rm -r {drop_in} && systemctl daemon-reload")


def stop_drains(hosts: dict[str, Host], expected: list[list[int]]) -> None:
    """Requests that run when the first host is stopped are finished; then each role stops before those it needs."""
    a, b = hosts["atoll-a"], hosts["atoll-b"]
    answers: list[list[list[int]]] = []
    client = threading.Thread(target=lambda: answers.append(completions(b, PROMPTS)))
    client.start()
    time.sleep(0.3)
    a.sh("systemctl stop atoll.target")
    client.join()
    assert answers == [expected]
    b.sh("systemctl stop atoll.target")
    ended = [
        [int(a.show(f"atoll-{unit}", "InactiveEnterTimestampMonotonic")) for unit in units]
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


def upgrade_and_back(hosts: dict[str, Host], expected: list[list[int]]) -> None:
    b = hosts["atoll-b"]
    old = b.sh("readlink /opt/atoll/current").strip()
    author = ("-c", "user.name=t", "-c", "user.email=t@t")
    sh("git", "-C", b.root / "root/atoll", *author, "commit", "-q", "--allow-empty", "-m", "next")
    b.sh("deploy/install.sh")
    new = b.sh("readlink /opt/atoll/current").strip()
    assert new != old
    b.sh("systemctl restart atoll.target")
    hosts["atoll-a"].sh("systemctl start atoll.target")
    wait_until_ready(b)
    assert new in b.sh(f"cat /proc/{b.show('atoll-router@1', 'MainPID')}/maps"), (
        "the new version runs"
    )
    assert completions(b, PROMPTS) == expected
    b.sh("/opt/atoll/current/install.sh --rollback")
    assert b.sh("readlink /opt/atoll/current").strip() == old
    b.sh("systemctl restart atoll.target")
    wait_until_ready(b)
    assert completions(b, PROMPTS) == expected


def uninstalled(host: Host, before: set[str]) -> None:
    host.sh("/opt/atoll/current/install.sh --uninstall")
    nothing_runs(host)
    left = {path for path in host.files() - before if not path.startswith(NOT_OURS)}
    assert left == set()


@pytest.mark.systemd
def test_cluster_over_two_hosts() -> None:
    record = Record()
    with Cluster("--model", str(DEMO_MODEL), "--wire", "fp32") as local:
        expected = local.generate(PROMPTS, NUM_TOKENS)
    started = time.monotonic()
    with two_hosts() as hosts:
        record.checks.append(
            {
                "what": "two Debian hosts booted by systemd",
                "seconds": round(time.monotonic() - started, 1),
            }
        )
        a, b = hosts.values()
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
        with record.step(
            f"{len(PROMPTS)} completions of {NUM_TOKENS} tokens equal those of a local atoll up"
        ):
            assert completions(b, PROMPTS) == expected
        with record.step(
            "kill -9 of an expert under load: restarted, no request lost, same tokens"
        ):
            killed_expert_comes_back(b, 12, expected)
        with record.step("SIGSTOP of an expert: restarted by the watchdog, same tokens"):
            stuck_expert_is_noticed(b, 15, expected)
        with record.step(
            "systemctl stop atoll.target: requests in flight finished, roles stopped in order"
        ):
            stop_drains(hosts, expected)
        with record.step("stopped: no process, socket or file of a run left"):
            for host in hosts.values():
                nothing_runs(host)
        with record.step("a mistake in the TOML: one sentence, exit code 2, no restart"):
            bad_input_is_one_sentence(b)
        with record.step("upgrade and rollback of one host, same tokens"):
            upgrade_and_back(hosts, expected)
        with record.step("uninstalled on both hosts: no file, account or unit left"):
            for host in hosts.values():
                uninstalled(host, before[host.name])
        versions = {
            "systemd": a.sh("systemctl --version").split()[1],
            "python": a.sh("python3 -V").split()[1],
        }
    if out := os.environ.get("ATOLL_SYSTEMD_RESULT"):
        record.write(ROOT / out, **versions)
