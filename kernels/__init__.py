"""Compute kernels: Triton on GPUs, torch references everywhere (torch and triton only, no other import of ours)."""

# Hugging Face's optional package is also called `kernels`; transformers 5.3 parses this version and
# raises InvalidVersion when a package of that name has none (regression test: tests/unit/test_names.py).
__version__ = "0.0.0"
