"""C sources compiled for this Python, once per machine, where there is a C compiler.

Compiled at first use, as Triton compiles its launchers, so that an install needs no compiler and no build step. Whoever
uses one has the same in Python. ATOLL_COMPILED=0 goes without; CFLAGS stands for -O2.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_COMPILE_S = 60.0


@functools.cache
def compiled(
    source: Path, *, needs: tuple[str, ...] = (), headers: tuple[Path, ...] = ()
) -> Any | None:  # noqa: ANN401  -- a module of another language
    """The module in a C file, compiled if need be; None where it cannot be had, with the reason in the log.

    `needs`: packages whose `include` folder has headers that the source includes. `headers`: of those, what lies in
    other folders of ours.
    """
    if os.environ.get("ATOLL_COMPILED") == "0":
        return None
    try:
        return _load(source.stem, _built(source, needs, headers, _cache()))
    except (OSError, ImportError, RuntimeError, subprocess.SubprocessError) as exc:
        log.warning("%s is not compiled, its slower form in Python goes on: %s", source.name, exc)
        return None


def _built(
    source: Path, needs: tuple[str, ...], headers: tuple[Path, ...], directory: Path
) -> Path:
    """The library's file. Raises OSError, RuntimeError or SubprocessError."""
    include = [sysconfig.get_paths()["include"], *map(_headers_of, needs)]
    flags = shlex.split(os.environ.get("CFLAGS", "-O2"))
    beside = sorted(source.parent.glob("*.h"))
    texts = [path.read_bytes() for path in (source, *beside, *headers)]
    key = hashlib.sha256(repr((texts, sys.version, include, flags)).encode())
    target = directory / f"{source.stem}-{key.hexdigest()[:16]}.so"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:  # what lies there is executed
        raise RuntimeError(f"{directory} is not ours alone to write")
    if target.exists():
        return target
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("there is no C compiler (cc, gcc or clang)")
    with tempfile.TemporaryDirectory(dir=directory) as scratch:  # others may compile it too
        output = Path(scratch) / target.name
        command = [compiler, *flags, "-shared", "-fPIC", *(f"-I{path}" for path in include)]
        done = subprocess.run(
            [*command, str(source), "-o", str(output)],
            capture_output=True, text=True, timeout=_COMPILE_S, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(
                f"{compiler} cannot compile {source.name}: {done.stderr.strip()[:500]}"
            )
        output.replace(target)
    return target


def _cache() -> Path:
    """In the directory that systemd gives a unit, else in the user's."""
    base = os.environ.get("CACHE_DIRECTORY") or Path("~/.cache/atoll").expanduser()
    return Path(base) / "compiled"


def _headers_of(package: str) -> str:
    spec = importlib.util.find_spec(package)
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / "include").is_dir():
            return str(Path(place) / "include")
    raise RuntimeError(f"the headers of {package} are not installed")


def _load(name: str, path: Path) -> Any:  # noqa: ANN401
    loader = ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
