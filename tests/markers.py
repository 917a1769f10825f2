"""The only file that asks what hardware a test has."""

import pytest
import torch


def on_gpu(test):
    """Mark a test that needs a CUDA device: skipped, not failed, where there is none."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))
