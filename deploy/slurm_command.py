"""The parts of a job that `atoll render slurm` has written; its script calls them, nobody needs to by hand.

  prepare   on the first node: ask every node of the allocation, write the job's cluster TOML and secret
  probe     on every node: print what it has as JSON
  mps       on every node of GPUs: NVIDIA's MPS, as long as the steps below have processes there
  step      on every node: run its processes of one role, restart the dead, drain on SIGTERM

example: atoll slurm step --role expert --job-dir atoll-12.0
"""

import argparse
from pathlib import Path

from common.errors import ConfigError
from common.ids import Role
from deploy.slurm import job

HELP = "inside a Slurm job: prepare it, run its steps"
ACTIONS = ("prepare", "probe", "mps", "step")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    parser.add_argument(
        "--job-dir", type=Path, required=True, metavar="D", help="directory of this job"
    )
    parser.add_argument(
        "--role", type=Role, choices=list(Role), metavar="ROLE", help="for step: " + ", ".join(Role)
    )


def run(arguments: argparse.Namespace) -> int:
    """One of the actions."""
    job_dir = arguments.job_dir.absolute()
    if arguments.action == "prepare":
        job.prepare(job_dir)
        return 0
    if arguments.action == "probe":
        job.print_report(job.probe(job_dir))
        return 0
    if arguments.action == "mps":
        return job.run_mps(job_dir)
    if arguments.role is None:
        raise ConfigError("atoll slurm step needs --role")
    return job.step(arguments.role, job_dir)
