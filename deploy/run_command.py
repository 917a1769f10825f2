"""Run one service of a cluster in this process, as systemd and Slurm do.

SIGTERM drains and stops it. Exit code 2 means that the input is wrong and a restart cannot help.

example: atoll run expert --cluster cluster.toml --index 3
"""

import argparse
import runpy
import sys
from pathlib import Path

from common.ids import Role
from common.obs.log import LEVELS

HELP = "run one service of a cluster in this process"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("role", type=Role, choices=list(Role), metavar="ROLE", help=", ".join(Role))
    parser.add_argument("--cluster", type=Path, required=True, metavar="F", help="cluster TOML")
    parser.add_argument("--index", type=int, required=True, metavar="I", help="which of its role")
    parser.add_argument(
        "--log-level",
        choices=LEVELS,
        default="info",
        metavar="LEVEL",
        help=f"{', '.join(LEVELS)} (info)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Become the service; its exit code is ours."""
    module = f"services.{arguments.role}"
    options = ["--cluster", str(arguments.cluster), "--index", str(arguments.index)]
    sys.argv = [module, *options, "--log-level", arguments.log_level]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0
