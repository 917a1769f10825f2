"""SwiGLU and requantisation between the two products of an expert with many rows.

h = silu(gate) * up in fp32, quantised to e4m3 with 1x128 scales. Floor: bytes in and out / copy bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import PROGRAMMATIC, after_predecessor
from kernels.quant import quantise_blocks
from kernels.reference.quant import SCALE_MIN


@triton.jit
def swiglu(gate, up):
    """silu(gate) * up in fp32, by six instructions: the compiler's own exp and division look after subnormals."""
    e = tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;",
        "=f,f",
        [gate * -1.4426950408889634],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
    s = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + e], dtype=tl.float32, is_pure=True, pack=1
    )
    return gate * s * up


@triton.jit(do_not_specialize=["num_blocks", "s_row", "s_block"])
def _swiglu_dense(
    BOTH, Q, S, num_blocks, hidden, per_row, s_row, s_block, MIN: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    after_predecessor()
    b = tl.program_id(0) * G + tl.arange(0, G)
    row = (b // per_row).to(tl.int64)
    block = b % per_row
    column = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = (b < num_blocks)[:, None] & (column < hidden)
    at = row[:, None] * (2 * hidden) + column
    gate = tl.load(BOTH + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(BOTH + at + hidden, mask=inside, other=0.0).to(tl.float32)
    q, scale = quantise_blocks(swiglu(gate, up), MIN)
    tl.store(Q + row[:, None] * hidden + column, q, mask=inside)
    tl.store(S + row * s_row + block * s_block, scale, mask=b < num_blocks)


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
    blocks = num_rows * per_row
    group = min(16, triton.next_power_of_2(max(1, blocks // 264)))  # fill 132 SMs twice
    warps = group if group < 16 else 4  # a block each, where few wait long for one another
    _swiglu_dense[(triton.cdiv(blocks, group),)](
        both, q, s, blocks, hidden, per_row, s.stride(0), s.stride(1), SCALE_MIN, group, num_warps=warps,
        **PROGRAMMATIC,
    )  # fmt: skip
    return q, s
