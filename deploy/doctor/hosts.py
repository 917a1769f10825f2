"""Asks the hosts of a cluster: how a command gets to one, and the exchange with the doctor that runs there.

The one there gets the cluster TOML on stdin and prints its facts, then a line with its clock: when that line arrives
here tells how far the two clocks are apart.
"""

import asyncio
import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common import config as cluster_config
from common.config import LOCAL, ClusterConfig
from common.errors import ConfigError, WireError
from common.transport.carriers import LinkClass
from deploy.doctor import facts, transfers
from deploy.doctor.judge_cluster import Visit

ANSWER_S = 120.0
_SSH = ("ssh", "-oBatchMode=yes", "-oConnectTimeout=10")
_SRUN = ("srun", "--quiet", "--overlap", "--mpi=none", "--unbuffered", "--nodes=1", "--ntasks=1")
_LOOPBACK = (LOCAL, "localhost", "127.0.0.1", "::1")
_MAX_ANSWER = 16 << 20


@dataclass(frozen=True, slots=True)
class Way:
    """How commands get to the hosts: `kind` is ssh or srun, `program` the atoll there (ssh)."""

    kind: str
    program: str = "atoll"

    def command(self, host: str, arguments: Sequence[str]) -> tuple[str, ...]:
        """What to execute here so that `atoll ARGUMENTS` runs there."""
        if self.kind == "srun":
            own = str(Path(sys.argv[0]).absolute())  # the same file there
            return (*_SRUN, f"--nodelist={host}", own, *arguments)
        if is_here(host):
            return (sys.executable, "-m", "deploy.cli", *arguments)
        return (*_SSH, "--", host, shlex.join([self.program, *arguments]))


def is_here(host: str) -> bool:
    """True when an address of that name is one of this machine."""
    if host in _LOOPBACK or host == socket.gethostname():
        return True
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as sock:
            sock.bind(address)
    except OSError:
        return False
    return True


def in_job() -> bool:
    """True inside a Slurm job, where ports and secret are chosen at its start."""
    return "SLURM_JOB_ID" in os.environ


def in_allocation(config: ClusterConfig) -> ClusterConfig:
    """The cluster on the nodes of this Slurm job, in their order. Raises ConfigError when they are too few."""
    listed = os.environ.get("SLURM_JOB_NODELIST", "")
    if not listed:
        return config
    try:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as exc:
        raise ConfigError(f"scontrol show hostnames {listed}: {exc}") from exc
    names = shown.stdout.split()
    if len(names) < len(config.nodes):
        raise ConfigError(
            f"the cluster has {len(config.nodes)} nodes, the Slurm job only {len(names)}"
        )
    nodes = (replace(node, host=name) for node, name in zip(config.nodes, names, strict=False))
    return replace(config, nodes=tuple(nodes))


async def visit(name: str, way: Way, config: ClusterConfig, *, salt: str, full: bool) -> Visit:
    """The facts of one host. Whatever goes wrong is in the visit's `problem`."""
    arguments = ["doctor", "--facts", "--host", name, "--cluster", "-", "--salt", salt]
    command = way.command(name, [*arguments, "--full"] if full else arguments)
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_MAX_ANSWER,
        )
    except OSError as exc:
        return Visit(name, None, f"{command[0]}: {exc.strerror}", f"apt-get install {way.kind}")
    try:
        seconds = ANSWER_S * (60 if full else 1)
        return await asyncio.wait_for(_ask(name, process, config, command), seconds)
    except TimeoutError:
        return Visit(name, None, f"no answer within {ANSWER_S:g} s", shlex.join(command))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def _ask(
    name: str, process: asyncio.subprocess.Process, config: ClusterConfig, command: Sequence[str]
) -> Visit:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with contextlib.suppress(OSError):  # it says on stderr why it went
        process.stdin.write(config.to_toml().encode())
        await process.stdin.drain()
        process.stdin.close()
    lines: list[bytes] = []
    skew_s = uncertainty_s = 0.0
    asked = b'{"clock":'
    while line := await process.stdout.readline():
        if line.startswith(asked):
            told = json.loads(line)
            skew_s = told["clock"] - time.time()
            uncertainty_s = 0.1  # of a line through ssh or srun
        elif line.startswith(b"{"):
            lines.append(line)
    if not lines:
        words = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
        said = words[-1] if words else f"exit code {await process.wait()}"
        return Visit(name, None, said, shlex.join(command[:-1]) + " true")
    try:
        host = facts.from_json(lines[0].decode())
    except (WireError, UnicodeDecodeError) as exc:
        return Visit(name, None, str(exc), "install the same version of Atoll on every host")
    return Visit(name, host, skew_s=skew_s, uncertainty_s=uncertainty_s)


async def measure_between(
    way: Way, names: Sequence[str], link_class: LinkClass
) -> list[facts.Transfer]:
    """From the first host to each other one."""
    first, *others = names
    ends = [
        transfers.Ends(
            link_class,
            f"{first} to {other}",
            way.command(first, ["doctor", "--transfer", "sender", "--link-class", link_class]),
            way.command(other, ["doctor", "--transfer", "receiver", "--link-class", link_class]),
            {},
        )
        for other in others
    ]
    return list(await transfers.measure_all(ends))


def read_cluster(path: Path) -> ClusterConfig:
    """From a file, "-" is stdin. Raises ConfigError."""
    if str(path) != "-":
        return cluster_config.load(path)
    try:
        return cluster_config.parse(tomllib.loads(sys.stdin.read()), source="stdin")
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"stdin: {exc}") from exc
