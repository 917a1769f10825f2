"""Write what starts a cluster elsewhere: systemd units or a Slurm script, from the same TOML that `atoll up` reads.

The directory must be new, empty or an earlier rendering, which is replaced whole. Nothing is written when the TOML is
wrong.

example: atoll render systemd --cluster deploy/clusters/two-hosts.toml --out rendered
"""

import argparse
import importlib
import shutil
import tempfile
from pathlib import Path

from common import config as cluster_config
from common.config_toml import Source
from common.errors import ConfigError
from deploy.render.error import UnrenderableError

HELP = "write systemd units or a Slurm script for a cluster"
# each is a module deploy/render/<target>.py: `render(config) -> {relative path: text}` may raise UnrenderableError
TARGETS = ("systemd", "slurm")
MARK = "atoll render"  # is in the first or second line of every file, so that a rendering is known as one


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("target", choices=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--cluster", type=Path, required=True, metavar="F", help="cluster TOML")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")


def run(arguments: argparse.Namespace) -> int:
    """Render, then write."""
    config = cluster_config.load(arguments.cluster)
    try:
        files = importlib.import_module(f"deploy.render.{arguments.target}").render(config)
    except UnrenderableError as exc:
        raise Source.read(arguments.cluster).error(exc.where, exc.sentence) from exc
    write_tree(arguments.out, files)
    print(f"{arguments.out}: {len(files)} files for {config.cluster.name}")
    return 0


def write_tree(directory: Path, files: dict[str, str]) -> None:
    """Replace a rendering by another, whole. Scripts are executable. Raises ConfigError when it cannot be written."""
    if (foreign := foreign_file(directory)) is not None:
        raise ConfigError(f"--out {directory}: {foreign} was not written by atoll render")
    try:
        directory.absolute().parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".rendering-", dir=directory.absolute().parent))
        try:
            for name, text in files.items():
                path = made / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                path.chmod(0o755 if text.startswith("#!") else 0o644)
            made.chmod(0o755)
            if directory.exists():
                shutil.rmtree(directory)
            made.rename(directory)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    except OSError as exc:
        raise ConfigError(f"--out {directory}: {exc.strerror}") from exc


def foreign_file(directory: Path) -> Path | None:
    """Something in it, or the path itself, that is no part of a rendering; None when there is no such thing."""
    if not directory.is_dir():
        return directory if directory.exists() else None
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or _is_marked(path)):
            return path
    return None


def _is_marked(path: Path) -> bool:
    with path.open(errors="replace") as file:
        return MARK in file.readline(500) + file.readline(500)
