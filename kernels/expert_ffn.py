"""One routed expert in FP8 on a GPU: down(quantise(silu(gate x) * up x)), no gate weight (combine applies it).

Three regimes, chosen by the number of rows alone; within each a row's bits depend on no other row:

- up to `STREAM_ROWS` rows, reading the weights is all the work: `stream_expert`, two or three launches that begin to
  read before their predecessor has ended;
- where there are tiles for all SMs, `tile_expert`, with SwiGLU and requantisation in the first product;
- between, torch's block-scaled scaled_mm, with SwiGLU and requantisation in one launch.

The first two have one order of sums: `reproducible` does without the library, and a row's bits do not depend on the
number of rows either. Shapes that are no multiples of 128 take `tile_gemm` above STREAM_ROWS.

Floor: max((weights + rows in + rows out) / read bandwidth, 6 * rows * width * hidden / FP8 peak).
"""

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, pad, scaled_mm

from kernels.block_gemm import tile_gemm
from kernels.stream import STREAM_ROWS, stream_expert
from kernels.swiglu import swiglu_dense
from kernels.tile import tile_expert, tiles_pay


def scaled_product(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor) -> Tensor:
    """x [M, K] times w [N, K] by torch's block-scaled product; x_scales with stride 1 along rows. bf16 [M, N]."""
    if w_scales.shape[1] % 4:  # the library wants them padded along K
        w_scales = pad(w_scales, (0, -w_scales.shape[1] % 4))
    return scaled_mm(
        x, w.t(), x_scales, ScalingType.BlockWise1x128, w_scales.t(), ScalingType.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )  # fmt: skip


def _library(
    rows: Tensor, scales: Tensor, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor,
    down_scales: Tensor,
) -> Tensor:  # fmt: skip
    m = rows.shape[0]
    if m % 4:  # the scales of a block of columns must start at multiples of 16 bytes
        rows = pad(rows.view(torch.uint8), (0, 0, 0, -m % 4)).view(rows.dtype)
        scales = pad(scales, (0, 0, 0, -m % 4))
    by_block = scales.t().contiguous().t()
    both = scaled_product(rows, by_block, gate_up, gate_up_scales)
    h, h_scales = swiglu_dense(both, scales_by_block=True)
    return scaled_product(h, h_scales, down, down_scales)[:m]


def _tiles(
    rows: Tensor, scales: Tensor, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor,
    down_scales: Tensor, groups: Tensor | None = None, max_rows: int | None = None,
) -> Tensor:  # fmt: skip
    m, width, hidden = rows.shape[0], down.shape[-2], down.shape[-1]
    both = torch.empty(m, 2 * hidden, device=rows.device)
    tile_gemm(rows, scales, gate_up, gate_up_scales, both, 2, groups, max_rows)
    h, h_scales = swiglu_dense(both, scales_by_block=False)
    out = torch.empty(m, width, dtype=torch.bfloat16, device=rows.device)
    tile_gemm(h, h_scales, down, down_scales, out, 1, groups, max_rows)
    return out


def expert_ffn(
    rows: Tensor, scales: Tensor, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor,
    down_scales: Tensor, *, reproducible: bool = False,
) -> Tensor:  # fmt: skip
    """Apply an expert to rows e4m3 [M, width] with scales fp32 [M, ceil(width / 128)]: bf16 [M, width].

    gate_up e4m3 [2 * hidden, width], gate first; gate_up_scales fp32 [2 * ceil(hidden / 128), ceil(width / 128)];
    down e4m3 [width, hidden]; down_scales fp32 [ceil(width / 128), ceil(hidden / 128)]. Scales multiply.
    """
    m, hidden = rows.shape[0], down.shape[1]
    weights = (gate_up, gate_up_scales, down, down_scales)
    if m == 0:
        return torch.empty(0, down.shape[0], dtype=torch.bfloat16, device=rows.device)
    if m <= STREAM_ROWS:
        return stream_expert(rows, scales, *weights)
    if hidden % 128 or rows.shape[1] % 128:
        return _tiles(rows, scales, *weights)
    if reproducible or tiles_pay(m, hidden):
        return tile_expert(rows, scales, *weights)
    return _library(rows, scales, *weights)


def expert_ffn_placed(
    rows: Tensor, scales: Tensor, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor,
    down_scales: Tensor, places: Tensor,
) -> None:  # fmt: skip
    """`expert_ffn` of at most `STREAM_ROWS` rows, each to where it is wanted: see `stage.stage`."""
    assert rows.shape[0] <= STREAM_ROWS, "more rows than are placed"
    stream_expert(rows, scales, gate_up, gate_up_scales, down, down_scales, places)


def expert_ffn_grouped(
    rows: Tensor, scales: Tensor, groups: Tensor, gate_up: Tensor, gate_up_scales: Tensor,
    down: Tensor, down_scales: Tensor, *, max_rows: int,
) -> Tensor:  # fmt: skip
    """Apply experts that share a GPU, each of `groups` int32 [G, 3], on the GPU: (expert, first row, row behind).

    As `expert_ffn`, with weights and their scales stacked along a first dimension; no group may have more than
    `max_rows` rows, and what a row without a group becomes is anybody's guess. A row's bits are those of
    `expert_ffn(reproducible=True)`.
    """
    if rows.shape[0] == 0:
        return torch.empty(0, down.shape[-2], dtype=torch.bfloat16, device=rows.device)
    return _tiles(rows, scales, gate_up, gate_up_scales, down, down_scales, groups, max_rows)
