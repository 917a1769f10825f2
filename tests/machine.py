"""For tests that set up real daemons or hosts on this machine: commands, packages, waiting, and what was checked."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def sh(*command: str | Path, **options: object) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, **options
    )  # type: ignore[call-overload]
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return str(done.stdout)


def install(tools: Mapping[str, str]) -> None:
    """Debian packages (values) of the programs (keys) that are missing; their daemons are not started."""
    missing = sorted({package for tool, package in tools.items() if shutil.which(tool) is None})
    if not missing:
        return
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        sh("apt-get", "update", "-q", env=environment)
        sh("apt-get", "install", "-y", "-q", "--no-install-recommends", *missing, env=environment)
    finally:
        if ours:
            policy.unlink()


def wait_for(what: str, condition: Callable[[], Any], limit_s: float) -> Any:
    """Poll until `condition()` is true; its value is returned."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {limit_s} s")


class Record:
    """The steps that passed, with their seconds."""

    def __init__(self) -> None:
        self.checks: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        seconds = round(time.monotonic() - started, 1)
        print(f"{seconds:6.1f} s  {what}", flush=True)
        self.checks.append({"what": what, "seconds": seconds})

    def write(self, path: Path, **facts: Any) -> None:
        """The committed result: when, of which commit, and every step."""
        commit = sh("git", "-C", ROOT, "rev-parse", "HEAD").strip()
        clean = not sh("git", "-C", ROOT, "status", "--porcelain", "--untracked-files=no").strip()
        head = {"date": datetime.now(UTC).date().isoformat(), "commit": commit, "clean": clean}
        path.write_text(json.dumps({**head, **facts, "checks": self.checks}, indent=1) + "\n")
