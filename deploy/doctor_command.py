"""Look for what is wrong: on this machine, or with --cluster on every host of a cluster.

Looks at Python, torch, driver and GPUs, peer access, NICs and their distance to the GPUs, the UCX that is loaded,
MPS, limits, ports, clocks, secret, checkpoint and GPUDirect RDMA, and measures a transfer over every class of link.
Every line is ok, warning or failure, the last two with the command that repairs it. Exit code 1: there is a failure.

Hosts are asked over ssh; inside a Slurm job by srun, as nodes of its allocation in the order of the TOML.

examples:
  atoll doctor
  atoll doctor --cluster /etc/atoll/cluster.toml
  atoll doctor --cluster cluster.toml --via srun --json
  atoll doctor --model /models/deepseek --full
"""

import argparse
import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from common.config import LOCAL, ClusterConfig, local_cluster
from common.errors import ConfigError
from common.transport.carriers import LinkClass, expected_class
from deploy.doctor import (
    facts,
    judge_cluster,
    judge_devices,
    judge_host,
    read_gpus,
    read_host,
    transfers,
)
from deploy.doctor.collect import collect
from deploy.doctor.finding import Finding, Level
from deploy.doctor.hosts import Way, in_allocation, in_job, measure_between, read_cluster, visit
from deploy.doctor.need import Need, need_of
from deploy.local.models import DEMO_MODEL
from deploy.render.description import describe

HELP = "look for what is wrong, here or on every host of a cluster"
_COLOURS = {Level.OK: "32", Level.WARNING: "33", Level.FAILURE: "31"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--cluster", type=Path, metavar="F", help="cluster TOML: ask every host of it"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="checkpoint, without --cluster")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="what it shall run on, without --cluster (cuda where torch and driver offer it)",
    )
    parser.add_argument(
        "--via", choices=("ssh", "srun"), help="how hosts are reached (ssh; in a Slurm job srun)"
    )
    parser.add_argument(
        "--program", default="atoll", metavar="P", help="atoll on the hosts, for ssh (atoll)"
    )
    parser.add_argument("--host", metavar="H", help="only this host of the cluster")
    parser.add_argument(
        "--full", action="store_true", help="hash the whole checkpoint, whatever its size"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    # what a doctor asks of the one on another host
    parser.add_argument("--facts", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--salt", default="", help=argparse.SUPPRESS)
    parser.add_argument("--transfer", choices=("sender", "receiver"), help=argparse.SUPPRESS)
    parser.add_argument(
        "--link-class", type=LinkClass, default=LinkClass.TCP, help=argparse.SUPPRESS
    )


def run(arguments: argparse.Namespace) -> int:
    """1 when something fails."""
    if arguments.transfer:
        return _become_probe(arguments.transfer, arguments.link_class)
    for name in ("model", "device"):
        if getattr(arguments, name) is not None and arguments.cluster is not None:
            raise ConfigError(f"--{name} cannot be combined with --cluster, set it in the file")
    if arguments.model is not None and not arguments.model.is_dir():
        raise ConfigError(f"--model {arguments.model}: no such directory")
    if arguments.host is not None and arguments.cluster is None:
        raise ConfigError("--host needs --cluster")
    if arguments.cluster is None:
        found = asyncio.run(_this_machine(arguments))
    else:
        config = read_cluster(arguments.cluster)
        if arguments.facts:
            return _print_facts(config, arguments)
        found = asyncio.run(_whole_cluster(config, arguments))
    (_print_json if arguments.json else _print_lines)(found)
    return int(any(f.level is Level.FAILURE for lines in found.values() for f in lines))


def judge_all(host: facts.Host, need: Need) -> list[Finding]:
    """Everything that one host shows."""
    return [*judge_host.judge(host, need), *judge_devices.judge(host, need)]


async def _this_machine(arguments: argparse.Namespace) -> dict[str, list[Finding]]:
    """As the host of what `atoll up` starts without options."""
    config = local_cluster(
        arguments.model or DEMO_MODEL, ep=16, nodes=2, attention=2, experts_per_gpu=1, microbatches=2, wire="fp8",
        port=8000, run_dir=Path("/run/atoll"),
    )  # fmt: skip
    if (arguments.device or _device()) == "cuda":
        config = replace(config, cluster=replace(config.cluster, device="cuda"))
    salt = secrets.token_hex(8)
    need = need_of(config, LOCAL, in_job=False)
    host = await collect(LOCAL, need, salt=salt, full=arguments.full)
    return {"this machine": judge_all(host, need)}


def _device() -> str:
    """What this machine offers, without loading torch."""
    if read_host.software_version("torch").endswith("+cpu"):
        return "cpu"
    return "cuda" if read_gpus.nvidia(Path()).gpus else "cpu"


def _print_facts(config: ClusterConfig, arguments: argparse.Namespace) -> int:
    """For the doctor that asks: facts, then the clock, which must be the last thing read."""
    name = arguments.host or LOCAL
    need = need_of(config, name, in_job=in_job())
    host = asyncio.run(collect(name, need, salt=arguments.salt, full=arguments.full))
    print(facts.to_json(host), flush=True)
    print(json.dumps({"clock": time.time()}), flush=True)
    return 0


def _become_probe(role: str, link_class: LinkClass) -> int:
    """One end of a transfer between hosts; over whatever network device UCX chooses."""
    environment = {**os.environ, **transfers.environment_of(link_class)}
    os.execve(sys.executable, [sys.executable, "-m", transfers.PROBE, role], environment)


async def _whole_cluster(
    config: ClusterConfig, arguments: argparse.Namespace
) -> dict[str, list[Finding]]:
    kind = arguments.via or ("srun" if in_job() else "ssh")
    if kind == "srun":
        config = in_allocation(config)
    names = [host.name for host in describe(config).hosts]
    if arguments.host is not None:
        names = [describe(config).host(arguments.host).name]
    way, salt = Way(kind, arguments.program), secrets.token_hex(8)
    visits = await asyncio.gather(
        *(visit(name, way, config, salt=salt, full=arguments.full) for name in names)
    )
    between: Sequence[facts.Transfer] = ()
    reached = [v.host for v in visits if v.host is not None]
    if len(reached) > 1:
        has_rdma = all(
            any(nic.rdma and nic.is_active for nic in h.nics) and h.ucx.has_ib_module
            for h in reached
        )
        link_class = expected_class(same_host=False, device="cpu", has_rdma=has_rdma)
        between = await measure_between(way, [h.name for h in reached], link_class)
    found = {"cluster": judge_cluster.judge(list(visits), list(between))}
    return found | {h.name: judge_all(h, need_of(config, h.name, in_job=in_job())) for h in reached}


def _print_json(found: dict[str, list[Finding]]) -> None:
    document = {name: [asdict(finding) for finding in lines] for name, lines in found.items()}
    print(json.dumps(document, indent=1))


def _print_lines(found: dict[str, list[Finding]]) -> None:
    for name, findings in found.items():
        print(f"{name}:")
        for finding in findings:
            level = f"{finding.level:<7}"
            if sys.stdout.isatty():
                level = f"\x1b[{_COLOURS[finding.level]}m{level}\x1b[0m"
            print(f"  {level}  {finding.check}: {finding.text}")
            if finding.fix:
                print(f"           fix: {finding.fix}")
    levels = [finding.level for lines in found.values() for finding in lines]
    counts = [f"{levels.count(level)} {level}" for level in Level]
    print(", ".join(counts))
