"""The commands that deploy/README.md gives, for each host and for Slurm: they are what the tests run."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "deploy" / "README.md"
_WHEELS = re.compile(r"```sh\n# where there is internet\n(.*)\n")
_SLURM = re.compile(r"```sh\n# in the clone\n(.*?)```", re.DOTALL)
_BLOCK = re.compile(r"```sh\n# on (\S+)\n(.*?)```", re.DOTALL)


def commands_by_host() -> dict[str, list[str]]:
    """Address -> commands, in the order of the document."""
    blocks = _BLOCK.findall(README.read_text())
    return {host: text.strip().splitlines() for host, text in blocks}


def slurm_commands() -> list[str]:
    """From a clone to a completion under Slurm."""
    (text,) = _SLURM.findall(README.read_text())
    return str(text).strip().splitlines()


def wheels_command() -> str:
    """The command that makes the folder `wheels` for hosts without internet."""
    (command,) = _WHEELS.findall(README.read_text())
    return str(command)
