"""Launches of many-row FP8 products (tile_hopper): which units are cut, an expert."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import PROGRAMMATIC, after_predecessor
from kernels.stream import WORKERS, blocks_of
from kernels.tile_hopper import tile_units

PAIRS = WORKERS // 2


def tiles_pay(num_rows: int, hidden: int) -> bool:
    """Whether an expert's tiles fill all SMs, and few of them are of rows that are not there: the library is slower."""
    columns, blocks = hidden // 128, -(-num_rows // 128)
    return columns >= 16 and -(-blocks // 2) * columns >= 48 and (blocks % 2 == 0 or blocks >= 13)


def whole(units: int) -> int:
    """How many of `units` are not cut in two: whole rounds of all pairs, and a last one that is more than half full."""
    rest = units % PAIRS
    return units - rest if 2 * rest <= PAIRS else units


def multiply(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, out: Tensor,
    out_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Multiply x e4m3 [M, K] with w e4m3 [N, K]: to out bf16 [M, N].

    With out_scales w has gate and up rows, and SwiGLU's e4m3 goes to out [M, N / 2]. x_scales and out_scales are fp32
    [blocks, M'], M' a multiple of 256 and at least M, as `turned` makes them. K and N / 2 are multiples of 128.
    """
    m, (num_rows, k) = x.shape[0], w.shape
    swiglu, kb, stride = out_scales is not None, k // 128, x_scales.shape[1]
    width = num_rows // 2 if swiglu else num_rows
    row_blocks, columns = -(-m // 256), -(-width // (128 if swiglu else 256))
    units = row_blocks * columns
    big = whole(units) if swiglu or kb % 4 == 0 else units
    sub_rows, sub_tiles = (width, width // 128) if swiglu else (128, 1)
    tile_units[(min(PAIRS, 2 * units - big),)](
        blocks_of(w, 128 if swiglu else 64), blocks_of(x, 64 if swiglu else 128), x_scales, w_scales, out,
        x_scales if out_scales is None else out_scales, m, stride, width, kb, units, big, row_blocks, columns,
        sub_rows, sub_tiles, w_scales.shape[0], swiglu, num_warps=4, maxnreg=168, **PROGRAMMATIC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "kb"])
def _turn(SCALES, OUT, M, kb, stride):
    after_predecessor()
    row = tl.program_id(0) * 32 + tl.arange(0, 32)
    block = tl.program_id(1) * 64 + tl.arange(0, 64)
    inside = (row < M)[:, None] & (block < kb)[None, :]
    scales = tl.load(SCALES + row[:, None] * kb + block[None, :], mask=inside, other=0.0)
    tl.store(OUT + block[None, :] * stride + row[:, None], scales, mask=inside)


def turned(scales: Tensor) -> Tensor:
    """Scales [M, blocks] as [blocks, M'], M' the next multiple of 256: those of a block of columns are together."""
    m, kb = scales.shape
    out = torch.empty(kb, -(-m // 256) * 256, device=scales.device)
    grid = (triton.cdiv(m, 32), triton.cdiv(kb, 64))
    _turn[grid](scales, out, m, kb, out.shape[1], num_warps=4, **PROGRAMMATIC)
    return out


def tile_expert(
    rows: Tensor, scales: Tensor, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor,
    down_scales: Tensor,
) -> Tensor:  # fmt: skip
    """As expert_ffn.expert_ffn, where width and hidden are multiples of 128: three launches."""
    m, (width, hidden) = rows.shape[0], down.shape
    x_scales = turned(scales)
    q = torch.empty(m, hidden, dtype=torch.float8_e4m3fn, device=rows.device)
    q_scales = torch.empty(hidden // 128, x_scales.shape[1], device=rows.device)
    multiply(rows, x_scales, gate_up, gate_up_scales, q, q_scales)
    out = torch.empty(m, width, dtype=torch.bfloat16, device=rows.device)
    multiply(q, q_scales, down, down_scales, out)
    return out
