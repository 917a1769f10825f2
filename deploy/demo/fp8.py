"""Weights as they will be after storing them as DeepSeek-V3 does: e4m3 with one fp32 scale for each 128x128 block."""

import torch
from torch import Tensor

from common.model.loader import dequantise
from common.model.writer import quantise_blocks

BLOCK = (128, 128)  # rows and columns that share one scale
rounding = True  # what `rounded` does; off only to measure, after training, what FP8 costs


def rounded(weight: Tensor) -> Tensor:
    """[..., rows, cols] after storing; the gradient passes as if nothing had been rounded.

    Leading dimensions are stacked along the rows, so they need `rows` to be a multiple of 128.
    """
    if not rounding:
        return weight
    with torch.no_grad():
        flat = weight.flatten(0, -2)
        error = dequantise(*quantise_blocks(flat, BLOCK), BLOCK).view_as(weight) - weight
    return weight + error
