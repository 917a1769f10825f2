"""What every GPU result file says of its machine and software."""

import datetime
import os
import subprocess
from importlib.metadata import version
from typing import Any

import torch


def gpu_facts() -> dict[str, Any]:
    """Cards, driver, versions, commit, date."""
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = [""]
    if cards:
        asked = subprocess.run(query, capture_output=True, text=True, check=False)
        driver = asked.stdout.split("\n")
    commit = os.environ.get("ATOLL_COMMIT", "")
    if not commit:
        asked = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        commit = asked.stdout.strip()
    return {
        "cards": cards, "driver": driver[0], "torch": torch.__version__, "ucxx": version("ucxx-cu13"),
        "commit": commit, "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip
