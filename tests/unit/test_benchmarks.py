"""Benchmarks can at least be imported: few of them run here, and no type checker reads them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORT = """
import importlib, sys
sys.path[:0] = [".", "tests/bench"]  # those that stand alone import one another by their bare names
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name)
"""


def test_every_benchmark_can_be_imported():
    paths = sorted((ROOT / "tests/bench").rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *names],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == names
    assert len(names) > 30
