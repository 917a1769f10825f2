"""Start a cluster, stream one completion, show what it cost, stop.

example: atoll demo
"""

import argparse

HELP = "start a cluster, stream a completion, show figures"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo."""
    del arguments
    return 0
