"""Weights as DeepSeek-V3 stores them: e4m3 with one fp32 scale for each 128x128 block."""

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128  # rows and columns that share one scale
FP8_MAX = 448.0  # largest finite e4m3
rounding = True  # what `rounded` does; off only to measure, after training, what FP8 costs


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, cols] -> e4m3 of the same shape and fp32 scales [ceil(rows/128), ceil(cols/128)], value = q * scale."""
    rows, cols = weight.shape
    padded = pad(weight.float(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    tall, wide = (size // BLOCK for size in padded.shape)
    blocks = padded.view(tall, BLOCK, wide, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp(min=1e-12) / FP8_MAX
    quantized = (blocks / scale).to(torch.float8_e4m3fn)
    return quantized.flatten(2, 3).flatten(0, 1)[:rows, :cols], scale[:, 0, :, 0]


def dequantize(quantized: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `quantize`, in fp32 and exact: an e4m3 value times its scale, rounded once."""
    scales = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return quantized.float() * scales[: quantized.shape[0], : quantized.shape[1]]


def rounded(weight: Tensor) -> Tensor:
    """[..., rows, cols] as it will be after storing it; the gradient passes as if nothing had been rounded.

    Leading dimensions are stacked along the rows, so they need `rows` to be a multiple of 128.
    """
    if not rounding:
        return weight
    with torch.no_grad():
        error = dequantize(*quantize(weight.flatten(0, -2))).view_as(weight) - weight
    return weight + error


def dequantize_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors in fp32: what has a `weight_scale_inv` is dequantised, the rest converted."""
    suffix = "_scale_inv"
    return {
        name: dequantize(value, tensors[name + suffix])
        if name + suffix in tensors
        else value.float()
        for name, value in tensors.items()
        if not name.endswith(suffix)
    }
