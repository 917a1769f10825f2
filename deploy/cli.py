"""The `atoll` command. Each subcommand is a module with `HELP`, `configure(parser)` and `run(arguments) -> exit code`.

Exit codes: 0 done; 1 something crashed; 2 the input is wrong. A mistake is one sentence on stderr.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import shtab

from common.errors import AtollError, Rejected

COMMANDS = ("up", "run", "render", "slurm", "doctor", "demo", "trace", "plan", "rebalance")

_EXAMPLES = """\
examples:
  atoll demo
  atoll up --model /models/deepseek --port 8000
  atoll --print-completion bash > /etc/bash_completion.d/atoll

Every command has --help with examples of its own.
"""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Print one sentence and exit with code 2."""
        self.exit(2, f"atoll: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="atoll",
        description="Serve Mixture-of-Experts models, one expert per GPU.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shtab.add_argument_to(parser, "--print-completion", "print completion for a shell")
    subparsers = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", help="one of:"
    )
    for name in COMMANDS:
        module = importlib.import_module(f"deploy.{name}_command")
        subparser = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(subparser)
        subparser.set_defaults(run=module.run)
        _complete_paths(subparser)
    return parser


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Tell the shells which options take a file or a directory."""
    for action in parser._actions:
        if action.type is Path:
            directory = action.metavar in ("D", "DIR")
            action.complete = shtab.DIRECTORY if directory else shtab.FILE  # type: ignore[attr-defined]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except AtollError as exc:
        print(f"atoll: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, Rejected) else 1


if __name__ == "__main__":
    raise SystemExit(main())
