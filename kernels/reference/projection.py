"""Projections of the attention side: FP8 matrix products, and queries put together for the latent space."""

import torch
from torch import Tensor

from kernels.reference.expert_ffn import dequantise_weight
from kernels.reference.linear import linear
from kernels.reference.quant import dequantise
from kernels.reference.rope import apply_rope


def fp8_linear(rows: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """rows e4m3 [M, K] with scales fp32 [M, ceil(K / 128)] times weight e4m3 [N, K] transposed: bf16 [M, N].

    weight_scales fp32 [ceil(N / 128), ceil(K / 128)]; scales multiply, products are added in fp32.
    """
    x = dequantise(rows, scales, torch.float32)
    wide = dequantise_weight(weight, weight_scales)
    return linear(x, wide, out=weight.shape[0]).to(torch.bfloat16)


def rope_queries(
    query: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, nope: int, interleaved: bool
) -> None:
    """Rotate the last part of each head of query [rows, heads, nope + rope] into the last part of out's.

    out [rows, heads, any + rope]: what stands before the last `rope` columns stays. cos and sin fp32 [rows, rope / 2].
    """
    rope = query.shape[2] - nope
    rotated = apply_rope(
        query[..., nope:].float(), cos[:, None], sin[:, None], interleaved=interleaved
    )
    out[..., out.shape[2] - rope :] = rotated.to(out.dtype)
