"""Test modules of this folder share `ffn_cases` and `markers` by name."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
