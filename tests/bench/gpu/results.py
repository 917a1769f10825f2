"""What the record wrote, in tests/bench/results/gpu."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "gpu"


def read(name: str) -> dict[str, Any]:
    """One of its files."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found
