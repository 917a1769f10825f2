"""Projections of the attention side on the GPU. Semantics: kernels/reference/projection.py.

`fp8_linear` reads the weight once: up to `STREAM_ROWS` rows that is all the work (`stream_linear`), above it is torch's
block-scaled product where the shapes allow. Floor: max(bytes / read bandwidth, 2 * M * N * K / FP8 peak).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from kernels.block_gemm import tile_gemm
from kernels.expert_ffn import scaled_product
from kernels.stream import STREAM_ROWS, stream_linear


def fp8_linear(rows: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """rows e4m3 [M, K] with scales fp32 [M, ceil(K / 128)] times weight e4m3 [N, K] transposed: bf16 [M, N].

    weight_scales fp32 [ceil(N / 128), ceil(K / 128)]; scales multiply, products are added in fp32. K a multiple of 16.
    """
    m, (n, k) = rows.shape[0], weight.shape
    if m <= STREAM_ROWS:
        return stream_linear(rows, scales, weight, weight_scales)
    if n % 128 or k % 128:
        out = torch.empty(m, n, dtype=torch.bfloat16, device=rows.device)
        tile_gemm(rows, scales, weight, weight_scales, out, 1)
        return out
    if m % 4:  # the scales of a block of columns must start at multiples of 16 bytes
        rows = pad(rows.view(torch.uint8), (0, 0, 0, -m % 4)).view(rows.dtype)
        scales = pad(scales, (0, 0, 0, -m % 4))
    return scaled_product(rows, scales.t().contiguous().t(), weight, weight_scales)[:m]


@triton.jit
def _rope_queries(
    Q, COS, SIN, OUT, heads, q_width, out_width, q_start, out_start, HALF: tl.constexpr,
    H: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * H + tl.arange(0, H)
    i = tl.arange(0, HALF)
    ok = (head < heads)[:, None]
    at = Q + (row * heads + head)[:, None] * q_width + q_start
    if INTERLEAVED:
        real = tl.load(at + 2 * i[None, :], mask=ok, other=0.0).to(tl.float32)
        imaginary = tl.load(at + 2 * i[None, :] + 1, mask=ok, other=0.0).to(tl.float32)
    else:
        real = tl.load(at + i[None, :], mask=ok, other=0.0).to(tl.float32)
        imaginary = tl.load(at + HALF + i[None, :], mask=ok, other=0.0).to(tl.float32)
    cos = tl.load(COS + row * HALF + i)[None, :]
    sin = tl.load(SIN + row * HALF + i)[None, :]
    to = OUT + (row * heads + head)[:, None] * out_width + out_start
    tl.store(to + i[None, :], real * cos - imaginary * sin, mask=ok)
    tl.store(to + HALF + i[None, :], imaginary * cos + real * sin, mask=ok)


def rope_queries(
    query: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, nope: int, interleaved: bool
) -> None:
    """Rotate the last part of each head of query [rows, heads, nope + rope] into the last part of out's.

    out [rows, heads, any + rope]: what stands before the last `rope` columns stays. cos and sin fp32 [rows, rope / 2],
    rope a power of two. query and out are contiguous.
    """
    rows, heads, width = query.shape
    rope = width - nope
    if rows:
        group = min(32, triton.next_power_of_2(heads))
        _rope_queries[(rows, triton.cdiv(heads, group))](
            query, cos, sin, out, heads, width, out.shape[2], nope, out.shape[2] - rope, rope // 2,
            group, interleaved, num_warps=4,
        )  # fmt: skip
