"""What a Slurm job does besides starting steps: look at its nodes, make its cluster TOML and secret, run its steps.

Everything of one life of a job is in its directory, which every node sees and only its user reads.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from common import config as cluster_config
from common.config import ClusterConfig
from common.errors import AtollError, ConfigError
from common.ids import Role
from deploy.local import cards, preflight
from deploy.local.mps import Mps, MpsError
from deploy.local.mps import stop as stop_mps
from deploy.local.part import Part
from deploy.local.run_dir import (
    LOGS,
    MPS,
    open_run_dir,
    require_private,
    write_atomically,
    write_secret,
)
from deploy.local.supervisor import Options, Supervisor
from deploy.render.description import describe
from deploy.render.gpus import shares_cards
from deploy.slurm import allocation
from deploy.slurm.allocation import NodeReport

CLUSTER_FILE = "cluster.toml"
SRUN = ("srun", "--quiet", "--overlap", "--mpi=none", "--input=none", "--ntasks-per-node=1")
_PROBE_S = 120.0
_MPS_START_S, _MPS_CHECK_S = 60.0, 10.0


def prepare(job_dir: Path) -> None:
    """Ask every node, then write the job's own cluster TOML and secret. Raises ConfigError when it cannot run here."""
    config = cluster_config.load(job_dir / CLUSTER_FILE)
    require_private(job_dir)
    allocation.check_size(config, int(_variable("SLURM_JOB_NUM_NODES")))
    reports = _ask_nodes(job_dir, len(config.nodes))
    shown = _output(["scontrol", "--oneliner", "show", "node", _variable("SLURM_JOB_NODELIST")])
    config = allocation.resolve(config, reports, allocation.node_addresses(shown), job_dir)
    (job_dir / LOGS).mkdir(exist_ok=True)
    write_secret(job_dir)
    write_atomically(job_dir / CLUSTER_FILE, config.to_toml())
    names = " ".join(r.name for r in sorted(reports, key=lambda r: r.position))
    print(f"{config.cluster.name} on {names}; logs in {job_dir / LOGS}", flush=True)
    _warn_of_short_kill_wait(config)


def probe(job_dir: Path) -> NodeReport:
    """What this node can offer. A problem is reported, not raised: another node says it better, and once."""
    name, node_id = _variable("SLURMD_NODENAME"), int(_variable("SLURM_NODEID"))
    gpus = cards.visible()
    try:
        config = cluster_config.load(job_dir / CLUSTER_FILE)
        _check_files(config)
        if node_id == 0 and config.gateway.port:
            preflight.check_port(config.gateway.host, config.gateway.port)
    except AtollError as exc:
        return NodeReport(name, node_id, gpus, problem=str(exc))
    node = config.nodes[node_id]
    firsts = allocation.first_ports(node, node_id, int(_variable("SLURM_JOB_ID")))
    free = [first for first in firsts if _are_free(allocation.ports(config, node_id, first))]
    return NodeReport(name, node_id, gpus, tuple(free))


def step(role: Role, job_dir: Path) -> int:
    """Run this node's processes of a role until told to stop; 0 at once when it has none."""
    config = cluster_config.load(job_dir / CLUSTER_FILE)
    node_id = int(_variable("SLURM_NODEID"))
    if not any(spec.node == node_id for spec in config.of_role(role)):
        return 0
    pipes = None
    if role is not Role.GATEWAY and shares_cards(allocation.cards_of(config, node_id)):
        pipes = _wait_for_mps(job_dir, node_id)
    own = allocation.environments(config, node_id, role, cards.visible(), pipes)
    deadline_s = describe(config).stop_deadline_s
    part = Part(own, job_dir / LOGS, config.nodes[node_id].host, deadline_s)
    ready_file = job_dir / "ready.json" if role is Role.GATEWAY else None
    run_dir = open_run_dir(None)  # on this node: sockets do not work on every shared file system
    try:
        config = replace(config, cluster=replace(config.cluster, run_dir=run_dir.path))
        return asyncio.run(Supervisor(config, run_dir, Options(ready_file, part=part)).run())
    finally:
        run_dir.close()


def run_mps(job_dir: Path) -> int:
    """Keep MPS running on this node until told to stop, and then until its last client is gone; a step of its own,
    since Slurm ends whatever a step has started when the step ends. 0 at once where no processes share a card.
    """
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    config = cluster_config.load(job_dir / CLUSTER_FILE)
    node_id = int(_variable("SLURM_NODEID"))
    numbers = allocation.cards_of(config, node_id) if node_id < len(config.nodes) else {}
    if not shares_cards(numbers):
        return 0
    visible = cards.visible()
    used = [visible[number] for number in sorted(set(numbers.values()))]
    run_dir = open_run_dir(None)
    try:
        mps = Mps(run_dir.path / MPS, job_dir / LOGS / f"mps-{node_id}", used)
        warned = ""
        while True:
            try:
                mps.ensure()
            except MpsError as exc:
                if str(exc) != warned:
                    print(f"warning: node {node_id} shares GPUs without MPS: {exc}", flush=True)
                warned = str(exc)
            write_atomically(_mps_file(job_dir, node_id), f"{mps.pipes}\n")
            if told.wait(_MPS_CHECK_S):
                break
        stop_mps(mps.pipes, 2 * describe(config).stop_deadline_s)
    finally:
        run_dir.close()
    return 0


def _mps_file(job_dir: Path, node_id: int) -> Path:
    return job_dir / f"mps-{node_id}"


def _wait_for_mps(job_dir: Path, node_id: int) -> str:
    """Where its pipe is on this node, once the step that starts it has done what it can."""
    deadline = time.monotonic() + _MPS_START_S
    while not (file := _mps_file(job_dir, node_id)).exists():
        if time.monotonic() > deadline:
            raise ConfigError(f"the MPS step of node {node_id} did not start in {_MPS_START_S:g} s")
        time.sleep(0.1)
    return file.read_text().strip()


def _ask_nodes(job_dir: Path, num_nodes: int) -> list[NodeReport]:
    """One report per node of the first `num_nodes`. Raises ConfigError for a node that gives none."""
    size = (f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--wait=0")
    command = [*SRUN, *size, *program(), "probe", "--job-dir", str(job_dir)]
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_PROBE_S
        )
    except subprocess.TimeoutExpired as exc:
        raise ConfigError(f"the nodes did not answer within {_PROBE_S:g} s") from exc
    reports = []
    for line in asked.stdout.splitlines():
        with contextlib.suppress(ValueError, TypeError):
            fields = json.loads(line)
            lists = {"gpus": tuple(fields["gpus"]), "first_ports": tuple(fields["first_ports"])}
            reports.append(NodeReport(**{**fields, **lists}))
    if len(reports) < num_nodes:
        silent = num_nodes - len(reports)
        words = [line for line in asked.stderr.splitlines() if "error" in line]
        raise ConfigError(
            f"{silent} of {num_nodes} nodes did not report; do they see {program()[0]}? {' '.join(words[:1])}"
        )
    return reports


def print_report(report: NodeReport) -> None:
    """For `_ask_nodes`: one line of JSON."""
    print(json.dumps(asdict(report)), flush=True)


def program() -> tuple[str, ...]:
    """How this program is called on another node: the same file there."""
    return str(Path(sys.argv[0]).absolute()), "slurm"


def _check_files(config: ClusterConfig) -> None:
    """Raises ConfigError naming what this node does not see."""
    needed = [("model.path", config.model.path / "config.json")]
    if config.gateway.api_key_file is not None:
        needed.append(("gateway.api_key_file", config.gateway.api_key_file))
    if config.placement.plan is not None:
        needed.append(("placement.plan", config.placement.plan))
    for key, path in needed:
        if not path.is_file():
            raise ConfigError(f"{path} does not exist there ({key})")


def _are_free(ports: Sequence[int]) -> bool:
    try:
        for port in ports:
            preflight.check_port("0.0.0.0", port)
    except ConfigError:
        return False
    return True


def _warn_of_short_kill_wait(config: ClusterConfig) -> None:
    kill_wait_s = allocation.kill_wait_s(_output(["scontrol", "show", "config"]))
    needed_s = describe(config).stop_deadline_s
    if kill_wait_s is not None and kill_wait_s < needed_s:
        print(
            f"warning: this Slurm kills {kill_wait_s:g} s after scancel (KillWait), streams may need {needed_s:g} s",
            flush=True,
        )


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ConfigError(f"{' '.join(command)}: {exc}") from exc
    if done.returncode != 0:
        raise ConfigError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _variable(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise ConfigError(f"{name} is not set: this command is for inside a Slurm job") from None
