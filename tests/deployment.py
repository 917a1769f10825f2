"""One suite over every way to start a cluster: local launcher, systemd, Slurm. The same TOML, the same promises.

Each way says by a `Deployment` how it is asked, how a process of it is killed and how it is stopped.
"""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tests.e2e.harness import Cluster
from tests.machine import ROOT, wait_for

TWO_HOSTS = ROOT / "deploy/clusters/two-hosts.toml"
PROMPTS = [[1, 17, 300, 42], [7] * 9, list(range(100, 130)), [5]]
NUM_TOKENS = 24
RESTART_S = 40.0


class Deployment(Protocol):
    """A running cluster of `two-hosts.toml`."""

    def try_sh(self, script: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) of a shell command where clients are."""

    def url(self) -> str:
        """Where clients find the gateway."""

    def pid_of(self, name: str) -> int:
        """The pid of a process there, 0 while it has none."""

    def kill(self, name: str) -> None:
        """kill -9."""

    def stop(self) -> None:
        """As an operator does; returns when it has stopped."""


def expected_tokens(directory: Path) -> list[list[int]]:
    """What every deployment must answer: the continuations of a cluster that nothing happens to."""
    arguments = ("--cluster", str(TWO_HOSTS), "--local", "--port", "0", "--run-dir", str(directory))
    with Cluster(*arguments) as local:
        return local.generate(PROMPTS, NUM_TOKENS)


def completions(deployment: Deployment) -> list[list[int]]:
    """Greedy continuations of PROMPTS, all asked for at once."""
    answers: list[tuple[int, str, str]] = [(1, "", "not asked")] * len(PROMPTS)

    def ask(i: int) -> None:
        body = {
            "model": "atoll-demo", "prompt": PROMPTS[i], "max_tokens": NUM_TOKENS, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        curl = "curl -sS --fail-with-body -H 'content-type: application/json'"
        url = f"{deployment.url()}/v1/completions"
        answers[i] = deployment.try_sh(f"{curl} -d '{json.dumps(body)}' {url}")

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(code == 0 for code, _, _ in answers), answers
    return [json.loads(out)["choices"][0]["token_ids"] for _, out, _ in answers]


def wait_until_ready(deployment: Deployment) -> None:
    """Until the gateway says that it serves."""
    ready = f"curl -sf {deployment.url()}/ready"
    wait_for("readiness", lambda: deployment.try_sh(ready)[0] == 0, 90)


def serves(deployment: Deployment, expected: list[list[int]]) -> None:
    """The same tokens as anywhere."""
    assert completions(deployment) == expected


def survives_a_kill(deployment: Deployment, name: str, expected: list[list[int]]) -> None:
    """kill -9 of an expert under load: no request lost, the process started again, the same tokens."""
    pid = deployment.pid_of(name)
    assert pid
    assert _under_load(deployment, lambda: deployment.kill(name)) == expected
    wait_for(f"a restart of {name}", lambda: deployment.pid_of(name) not in (0, pid), RESTART_S)
    wait_until_ready(deployment)
    serves(deployment, expected)


def drains(deployment: Deployment, expected: list[list[int]]) -> None:
    """What is in flight when it is stopped is finished."""
    assert _under_load(deployment, deployment.stop) == expected


def _under_load(deployment: Deployment, act: Callable[[], None]) -> list[list[int]]:
    """What clients got who were waiting when something happened."""
    answers: list[list[list[int]]] = []
    clients = threading.Thread(target=lambda: answers.append(completions(deployment)))
    clients.start()
    wait_for("the requests to run", lambda: _num_running(deployment) == len(PROMPTS), 30)
    act()
    clients.join()
    assert answers, "requests were lost"
    return answers[0]


def _num_running(deployment: Deployment) -> int:
    """Continuations at attention workers."""
    code, text, _ = deployment.try_sh(f"curl -sf {deployment.url()}/metrics")
    assert code == 0
    lines = [
        line.split() for line in text.splitlines() if line.startswith("atoll_requests_running")
    ]
    return sum(int(float(value)) for _, value in lines)
