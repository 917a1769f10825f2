"""A cluster under a real Slurm, from the commands of deploy/README.md to requeueing, and `atoll doctor` through srun.

`make test-slurm` runs it and writes what was checked, and how long it took, to tests/slurm/result.json.
"""

import json
import os
import re
import shlex
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
from tests.slurm.daemons import NODES, Slurm, four_nodes, processes_of
from tests.systemd.readme import slurm_commands

START_S = 120.0


class Job:
    """The cluster of one job as a `Deployment`; clients are on the machine that Slurm's nodes are on."""

    def __init__(self, slurm: Slurm, clone: Path, job_id: str) -> None:
        self.id = job_id
        self.slurm, self.clone = slurm, clone

    def try_sh(self, script: str) -> tuple[int, str, str]:
        return self.slurm.try_sh(script, self.clone)

    def log(self) -> str:
        return (self.clone / f"atoll-{self.id}.log").read_text()

    def directory(self, restarts: int = 0) -> Path:
        return self.clone / f"atoll-{self.id}.{restarts}"

    def url(self) -> str:
        return re.findall(r"ready at (http\S+)", self.log())[-1]

    def pid_of(self, name: str) -> int:
        mark = Path(self.slurm.environment["TMPDIR"])
        for pid in processes_of(mark):
            if Path(f"/proc/{pid}/comm").read_text().strip() == name:
                return pid
        return 0

    def kill(self, name: str) -> None:
        os.kill(self.pid_of(name), 9)

    def stop(self) -> None:
        self.slurm.sh(f"scancel {self.id}", self.clone)
        self.ended("CANCELLED")

    def ended(self, *states: str, limit_s: float = 120.0) -> None:
        """Until it is in one of the states and none of its processes is left."""
        mark = Path(self.slurm.environment["TMPDIR"])
        wait_for(
            f"job {self.id} {' or '.join(states)}",
            lambda: self.slurm.job(self.id)["JobState"] in states,
            limit_s,
        )
        wait_for("the end of its processes", lambda: not atoll_processes(mark), 30)


def atoll_processes(mark: Path) -> list[str]:
    """Command lines of every process of a job."""
    lines = []
    for pid in processes_of(mark):
        command = Path(f"/proc/{pid}/cmdline")
        text = command.read_bytes().replace(b"\0", b" ").decode() if command.exists() else ""
        if ("atoll" in text and "slurm" in text) or "zygote" in text or "slurm_script" in text:
            lines.append(text)
    return lines


def submit(slurm: Slurm, clone: Path, *options: str, script: str = "rendered/atoll.sbatch") -> Job:
    """A submitted job."""
    said = slurm.sh(f"sbatch {shlex.join(options)} {script}", clone)
    return Job(slurm, clone, said.split()[-1])


def ready(job: Job, times: int = 1) -> None:
    """Until it has said where it serves so many times."""

    def said() -> bool:
        log = job.clone / f"atoll-{job.id}.log"
        return log.exists() and log.read_text().count("ready at http") == times

    wait_for(f"job {job.id} to serve", said, START_S)
    wait_until_ready(job)


def from_the_readme(slurm: Slurm, clone: Path, record: Record) -> Job:
    """Its commands in one shell, as a user types them; the first reaches the package index."""
    setup, *rest = slurm_commands()
    with record.step(setup):
        slurm.sh(setup, clone, online=True)
    with record.step("; ".join(rest)):
        out = slurm.sh("set -e; " + "\n".join(rest), clone)
    assert len(json.loads(out.splitlines()[-1])["choices"][0]["text"]) > 16
    return Job(slurm, clone, re.findall(r"Submitted batch job (\d+)", out)[0])


def is_private(job: Job) -> None:
    """What a job leaves in a shared directory while it runs: nobody else may read it."""
    assert job.directory().stat().st_mode & 0o777 == 0o700
    assert (job.directory() / "secret").stat().st_mode & 0o777 == 0o600
    names = {path.stem for path in (job.directory() / "logs").iterdir()}
    assert names == {
        "gateway-0",
        "attention-0",
        "router-0",
        "router-1",
        *(f"expert-{i}" for i in range(16)),
    }


def leaves_only_logs(job: Job, restarts: int = 0) -> None:
    """No secret, no cluster TOML, no ready file."""
    assert [path.name for path in job.directory(restarts).iterdir()] == ["logs"]


def requeued(job: Job, expected: list[list[int]]) -> None:
    """Drains, ends, and serves again from another directory with another secret."""
    secret = (job.directory() / "secret").read_text()
    job.slurm.sh(f"scontrol requeue {job.id}", job.clone)
    ready(job, times=2)
    serves(job, expected)
    assert (job.directory(1) / "secret").read_text() != secret
    leaves_only_logs(job)


def doctor(job: Job, cluster: str, nodes: int) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """Exit code and findings by host, inside an allocation of so many nodes."""
    command = f"salloc --quiet --nodes={nodes} .venv/bin/atoll doctor --cluster {cluster} --json"
    code, out, err = job.try_sh(command)
    assert code in (0, 1), err
    return code, json.loads(out)


def failures(findings: list[dict[str, str]]) -> dict[str, str]:
    return {f["check"]: f["text"] for f in findings if f["level"] == "failure"}


def doctor_finds_what_is_wrong(job: Job) -> None:
    """On each of four nodes through srun: nothing at first, then a checkpoint that one file is missing from."""
    code, found = doctor(job, "deploy/clusters/four-nodes.toml", 4)
    assert (code, set(found)) == (0, {"cluster", *NODES}), {
        n: failures(f) for n, f in found.items()
    }
    checks = {finding["check"] for finding in found["n3"]}
    assert checks >= {"python", "ucx", "memlock", "fd limit", "checkpoint", "transfer tcp"}
    assert "transfer tcp" in {finding["check"] for finding in found["cluster"]}
    weights = job.clone / "deploy/demo/model/model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    try:
        code, found = doctor(job, "deploy/clusters/four-nodes.toml", 4)
    finally:
        sh("git", "-C", job.clone, "checkout", "-q", "--", weights)
    assert code == 1
    assert all("checkpoint" in failures(found[name]) for name in NODES)
    code, out, err = job.try_sh(
        "salloc --quiet --nodes=2 .venv/bin/atoll doctor --cluster deploy/clusters/four-nodes.toml"
    )
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == "atoll: the cluster has 4 nodes, the Slurm job only 2"


def mistakes_are_one_sentence(slurm: Slurm, clone: Path) -> None:
    """What only the nodes can know ends the job with exit code 2 and one line in its log."""
    script = (clone / "rendered/atoll.sbatch").read_text()
    for old, new, sentence in (
        (f'path = "{clone}/deploy/clusters/../demo/model"', 'path = "/no/model"',
         "atoll: node n1: /no/model/config.json does not exist there (model.path) (and 1 more nodes with a problem)"),
        ('wire = "fp32"', 'wire = "fp16"', "cluster.wire must be one of fp8, bf16, fp32, not 'fp16'"),
    ):  # fmt: skip
        assert script.count(old) == 1
        (clone / "wrong.sbatch").write_text(script.replace(old, new))
        job = submit(slurm, clone, script="wrong.sbatch")
        job.ended("FAILED")
        assert slurm.job(job.id)["ExitCode"] == "2:0"
        (line,) = job.log().splitlines()
        assert line.startswith("atoll: ")
        assert line.endswith(sentence)


def a_lost_step_ends_the_job(job: Job) -> None:
    """kill -9 of what supervises a role on a node: nothing restarts that, so the job must not pretend to serve."""
    mark = Path(job.slurm.environment["TMPDIR"])
    for pid in processes_of(mark):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"step" in words and b"expert" in words and b"srun" not in words[0]:
            os.kill(pid, 9)
            break
    job.ended("FAILED")


@pytest.mark.slurm
def test_cluster_in_a_job(tmp_path: Path) -> None:
    record = Record()
    tmp_path.chmod(0o700)
    expected = expected_tokens(tmp_path)
    with four_nodes() as slurm:
        clone = slurm.directory / "atoll"
        sh("git", "clone", "-q", f"file://{ROOT}", clone)
        job = from_the_readme(slurm, clone, record)
        with record.step("a private directory, a secret with mode 0600, a log of each process"):
            is_private(job)
        with record.step(f"{len(PROMPTS)} completions equal those of a local atoll up"):
            serves(job, expected)
        with record.step(
            "kill -9 of an expert under load: restarted, no request lost, same tokens"
        ):
            survives_a_kill(job, "expert-12", expected)
        with record.step(
            "scontrol requeue: drained, serves again with another secret, same tokens"
        ):
            requeued(job, expected)
        with record.step("scancel: requests in flight finished, nothing left but logs"):
            drains(job, expected)
            leaves_only_logs(job, restarts=1)
        with record.step("before its time limit: drained, exit code 0"):
            job = submit(slurm, clone, "--time=3")
            ready(job)
            job.ended("COMPLETED", limit_s=240)
            leaves_only_logs(job)
        with record.step("kill -9 of a step: the job ends as failed, nothing left"):
            job = submit(slurm, clone)
            ready(job)
            a_lost_step_ends_the_job(job)
        with record.step("mistakes that only the nodes see: one sentence, exit code 2"):
            mistakes_are_one_sentence(slurm, clone)
        with record.step(
            "atoll doctor on four nodes through srun: well, then a truncated checkpoint"
        ):
            doctor_finds_what_is_wrong(job)
        versions = {
            "slurm": slurm.sh("sinfo --version", clone).split()[1],
            "python": slurm.sh(".venv/bin/python -V", clone).split()[1],
        }
    if out := os.environ.get("ATOLL_SLURM_RESULT"):
        record.write(ROOT / out, **versions)
