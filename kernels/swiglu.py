"""The steps between and after the two products of an expert: sums of runs, SwiGLU and requantisation.

h = silu(gate) * up in fp32, quantised to e4m3 with 1x128 scales; gate and up come as sums of runs (see block_gemm) or
as one matrix [M, 2 * hidden]. Floor: bytes in and out / copy bandwidth; at few rows everything stays in L2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.block_gemm import Cut, sum_of_runs
from kernels.quant import quantise_blocks
from kernels.reference.quant import SCALE_MIN


@triton.jit
def _swiglu(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _swiglu_runs(
    PARTIAL, Q, S, M, hidden, units, workers, slots, kb, half_tiles,
    PAIR: tl.constexpr, RUNS: tl.constexpr, R: tl.constexpr, MIN: tl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    gdc_wait()
    tile = tl.program_id(0)
    row = tl.program_id(1) * R + tl.arange(0, R)
    ok = row < M
    gate = sum_of_runs(PARTIAL, tile, 0, row, ok, M, units, workers, slots, kb, PAIR, RUNS)
    up = sum_of_runs(PARTIAL, tile, 1, row, ok, M, units, workers, slots, kb, PAIR, RUNS)
    column = tile * 128 + tl.arange(0, 128)
    inside = ok[:, None] & (column < hidden)[None, :]
    q, scale = quantise_blocks(tl.where(inside, _swiglu(gate, up), 0.0), MIN)
    tl.store(Q + row[:, None] * hidden + column[None, :], q, mask=inside)
    tl.store(S + row * half_tiles + tile, scale, mask=ok)


@triton.jit
def _store_runs(
    PARTIAL, OUT, M, width, units, workers, slots, kb, PAIR: tl.constexpr, RUNS: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    gdc_wait()
    tile = tl.program_id(0)
    row = tl.program_id(1) * R + tl.arange(0, R)
    ok = row < M
    group, sub = tile // PAIR, tile % PAIR
    total = sum_of_runs(PARTIAL, group, sub, row, ok, M, units, workers, slots, kb, PAIR, RUNS)
    column = tile * 128 + tl.arange(0, 128)
    inside = ok[:, None] & (column < width)[None, :]
    tl.store(OUT + row[:, None] * width + column[None, :], total, mask=inside)


@triton.jit
def _swiglu_dense(
    BOTH, Q, S, num_blocks, hidden, per_row, s_row, s_block, MIN: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    b = tl.program_id(0) * G + tl.arange(0, G)
    row = (b // per_row).to(tl.int64)
    block = b % per_row
    column = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = (b < num_blocks)[:, None] & (column < hidden)
    at = row[:, None] * (2 * hidden) + column
    gate = tl.load(BOTH + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(BOTH + at + hidden, mask=inside, other=0.0).to(tl.float32)
    q, scale = quantise_blocks(_swiglu(gate, up), MIN)
    tl.store(Q + row[:, None] * hidden + column, q, mask=inside)
    tl.store(S + row * s_row + block * s_block, scale, mask=b < num_blocks)


def swiglu_runs(partial: Tensor, c: Cut, hidden: int) -> tuple[Tensor, Tensor]:
    """SwiGLU of the sums of runs of gate and up: e4m3 [M, hidden] and scales [M, ceil(hidden / 128)]."""
    num_rows = partial.shape[1]
    q = torch.empty(num_rows, hidden, dtype=torch.float8_e4m3fn, device=partial.device)
    s = torch.empty(num_rows, c.half_tiles, device=partial.device)
    block = 4 if num_rows > 16 else 1
    _swiglu_runs[(c.half_tiles, triton.cdiv(num_rows, block))](
        partial, q, s, num_rows, hidden, c.units, c.workers, c.slots, c.kb, c.half_tiles,
        c.pair, c.runs, block, SCALE_MIN, num_warps=4 if block == 4 else 1, launch_pdl=True,
    )  # fmt: skip
    return q, s


def store_runs(partial: Tensor, c: Cut, width: int) -> Tensor:
    """Sums of runs: bf16 [M, width]."""
    num_rows = partial.shape[1]
    out = torch.empty(num_rows, width, dtype=torch.bfloat16, device=partial.device)
    block = 4 if num_rows > 16 else 1
    _store_runs[(c.half_tiles, triton.cdiv(num_rows, block))](
        partial, out, num_rows, width, c.units, c.workers, c.slots, c.kb, c.pair, c.runs, block,
        num_warps=4 if block == 4 else 1, launch_pdl=True,
    )  # fmt: skip
    return out


def swiglu_dense(both: Tensor, *, scales_by_block: bool) -> tuple[Tensor, Tensor]:
    """SwiGLU of both [M, 2 * hidden] (bf16, fp32), gate first: e4m3 [M, hidden], scales [M, ceil(hidden / 128)].

    `scales_by_block` lays the scales out block after block (stride 1 along rows), as block-scaled scaled_mm wants them.
    """
    num_rows, hidden = both.shape[0], both.shape[1] // 2
    per_row = -(-hidden // 128)
    q = torch.empty(num_rows, hidden, dtype=torch.float8_e4m3fn, device=both.device)
    if scales_by_block:
        s = torch.empty(per_row, num_rows, device=both.device).t()
    else:
        s = torch.empty(num_rows, per_row, device=both.device)
    group = 16
    _swiglu_dense[(triton.cdiv(num_rows * per_row, group),)](
        both, q, s, num_rows * per_row, hidden, per_row, s.stride(0), s.stride(1), SCALE_MIN,
        group, num_warps=4,
    )  # fmt: skip
    return q, s
