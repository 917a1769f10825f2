"""Test modules of this folder share `ffn_cases`, `markers` and `kernel_report` by name."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "bench")]
