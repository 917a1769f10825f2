"""FP8 row quantisation on the GPU, and its inverse: one pass over memory, one program per 16 blocks of 128 columns.

Floor: (bytes of x + 1 byte and 1/32 byte of scale per element) / copy bandwidth. Semantics: kernels/reference/quant.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import PROGRAMMATIC, after_predecessor
from kernels.reference.quant import BLOCK, SCALE_MIN, rows_view

_GROUP = 16  # blocks of one program: of 4 to 64 the best at 4,096 rows of 7,168


@triton.jit
def quotients(x, scale):
    """x [G, 128] / scale [G], all fp32, with the bits of div_rn wherever e4m3 does not make them zero.

    Its own steps: it would take the reciprocal anew for each number and ask each time whether they are exact: they
    are, once a small scale is out of the way. An infinite one makes zeros, of the other sign.
    """
    down = tl.where(scale < 2.0**-64, -(2.0**64), -1.0)
    by = -scale * down
    inverse = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [by], dtype=tl.float32, is_pure=True, pack=1
    )
    endless = scale == float("inf")
    minus = tl.where(endless, 0.0, tl.fma(-inverse, tl.fma(-by, inverse, 1.0), -inverse))[:, None]
    x = x * down[:, None]  # -x, so that -0 stays -0
    near = x * minus
    return tl.fma(minus, tl.fma(near, tl.where(endless, 0.0, by)[:, None], x), near)


@triton.jit
def quantise_blocks(x, SCALE_MIN: tl.constexpr):
    """Quantise blocks x [G, 128] fp32: e4m3 [G, 128] and scales [G]."""
    # The maximum over bit patterns: NaN is the largest of them, so a bad number reaches the scale.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, 448.0)
    scale = tl.where(scale < SCALE_MIN, SCALE_MIN, scale)
    return quotients(x, scale).to(tl.float8e4nv), scale


@triton.jit(do_not_specialize=["num_blocks"])
def _quantise(X, ROWS, SCALES, num_blocks, width, per_row, MIN: tl.constexpr, G: tl.constexpr):
    after_predecessor()
    b = tl.program_id(0) * G + tl.arange(0, G)
    row = (b // per_row).to(tl.int64)
    column = (b % per_row)[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = (b < num_blocks)[:, None] & (column < width)
    at = row[:, None] * width + column
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    q, scale = quantise_blocks(x, MIN)
    tl.store(ROWS + at, q, mask=inside)
    tl.store(SCALES + b, scale, mask=b < num_blocks)


@triton.jit(do_not_specialize=["num_blocks"])
def _dequantise(ROWS, SCALES, OUT, num_blocks, width, per_row, G: tl.constexpr):
    after_predecessor()
    b = tl.program_id(0) * G + tl.arange(0, G)
    row = (b // per_row).to(tl.int64)
    column = (b % per_row)[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = (b < num_blocks)[:, None] & (column < width)
    at = row[:, None] * width + column
    q = tl.load(ROWS + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(SCALES + b, mask=b < num_blocks, other=0.0)
    tl.store(OUT + at, q * scale[:, None], mask=inside)


def quantise_into(x: Tensor, rows: Tensor, scales: Tensor) -> None:
    """Quantise x [n, width] into given e4m3 rows [n, width] and fp32 scales [n, ceil(width / 128)], all contiguous."""
    n, width = x.shape
    per_row = -(-width // BLOCK)
    if n:
        # fill 132 SMs, with at least 4 blocks a program
        group = min(_GROUP, max(4, triton.next_power_of_2(n * per_row // 2112)))
        grid = (triton.cdiv(n * per_row, group),)
        _quantise[grid](
            x, rows, scales, n * per_row, width, per_row, SCALE_MIN, group, num_warps=4, **PROGRAMMATIC
        )  # fmt: skip


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise x [n, width] (bf16, fp32) to e4m3 rows [n, width] and fp32 scales [n, ceil(width / 128)]."""
    rows = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(x.shape[0], -(-x.shape[1] // BLOCK), device=x.device)
    quantise_into(x.contiguous(), rows, scales)
    return rows, scales


def quantise_rows(x: Tensor, payload: Tensor, *, rows_offset: int, scales_offset: int) -> None:
    """Quantise x [n, width] into `payload` (uint8): e4m3 rows at one byte offset, fp32 scales at another.

    Raises RuntimeError when rows or scales do not fit the payload.
    """
    n, width = x.shape
    rows = rows_view(payload, rows_offset, n, width, torch.float8_e4m3fn)
    scales = rows_view(payload, scales_offset, n, -(-width // BLOCK), torch.float32)
    quantise_into(x.contiguous(), rows, scales)


def dequantise(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply e4m3 rows [n, width] by their scales [n, ceil(width / 128)] in fp32; returns `dtype` [n, width]."""
    n, width = rows.shape
    out = torch.empty(n, width, dtype=dtype, device=rows.device)
    if n:
        blocks = n * scales.shape[1]
        grid = (triton.cdiv(blocks, _GROUP),)
        _dequantise[grid](
            rows, scales, out, blocks, width, scales.shape[1], _GROUP, num_warps=4, **PROGRAMMATIC
        )
    return out


def dequantise_rows(
    payload: Tensor, *, num_rows: int, width: int, rows_offset: int, scales_offset: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Read FP8 rows back from a payload (uint8), the inverse of `quantise_rows`: `dtype` [num_rows, width]."""
    rows = rows_view(payload, rows_offset, num_rows, width, torch.float8_e4m3fn)
    scales = rows_view(payload, scales_offset, num_rows, -(-width // BLOCK), torch.float32)
    return dequantise(rows, scales, dtype)
