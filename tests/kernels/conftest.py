"""Test modules of this folder share `ffn_cases`, `markers`, `kernel_report` and `kernel_targets` by name."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "bench")]
