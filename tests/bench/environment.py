"""Where a measurement was made: commit, date, processor, versions."""

import os
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def facts() -> dict[str, Any]:
    """What a reader needs to judge or repeat a figure; `load` is the one-minute load average at the end."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = next(
        line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "commit": commit.stdout.strip(), "date": datetime.now(UTC).date().isoformat(),
        "cpu": model, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1),
        "torch": version("torch"), "ucxx": version("ucxx-cu13"),
    }  # fmt: skip
