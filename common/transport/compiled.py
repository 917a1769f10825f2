"""`port.c` compiled for this Python, once per machine: where there is a C compiler, else None.

Compiled at first use, as Triton compiles its launchers, so that an install needs no compiler and no build step.
ATOLL_COMPILED=0 goes without.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("port.c")
_CACHE = Path("~/.cache/atoll/compiled")
_COMPILE_S = 60.0


@functools.cache
def compiled_port() -> Any | None:  # noqa: ANN401  -- a module of another language
    """The module, compiled if need be; None where it cannot be had, with the reason in the log."""
    if os.environ.get("ATOLL_COMPILED") == "0":
        return None
    try:
        return _load(_built(_CACHE.expanduser()))
    except (OSError, ImportError, RuntimeError, subprocess.SubprocessError) as exc:
        log.warning("messages go through UCXX's Python API, which costs more of them: %s", exc)
        return None


def _built(directory: Path) -> Path:
    """The library's file. Raises OSError, RuntimeError or SubprocessError."""
    headers = _ucx_headers()
    key = hashlib.sha256(_SOURCE.read_bytes() + sys.version.encode() + str(headers).encode())
    target = directory / f"port-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("there is no C compiler (cc, gcc or clang)")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    python = sysconfig.get_paths()["include"]
    with tempfile.TemporaryDirectory(dir=directory) as scratch:  # others may compile it too
        output = Path(scratch) / "port.so"
        command = [compiler, "-O2", "-shared", "-fPIC", f"-I{python}", f"-I{headers}"]
        done = subprocess.run(
            [*command, str(_SOURCE), "-o", str(output)],
            capture_output=True, text=True, timeout=_COMPILE_S, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"{compiler} cannot compile port.c: {done.stderr.strip()[:500]}")
        output.replace(target)
    return target


def _ucx_headers() -> Path:
    spec = importlib.util.find_spec("libucx")
    places = [Path(p) / "include" for p in (spec and spec.submodule_search_locations) or ()]
    for place in [*places, Path("/usr/include"), Path("/usr/local/include")]:
        if (place / "ucp/api/ucp.h").exists():
            return place
    raise RuntimeError("UCX's headers are not installed")


def _load(path: Path) -> Any:  # noqa: ANN401
    loader = ExtensionFileLoader("port", str(path))
    spec = importlib.util.spec_from_loader("port", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
