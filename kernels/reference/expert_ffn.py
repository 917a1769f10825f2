"""A routed expert on FP8 rows and FP8 weights in plain torch: the CPU path, and the check of the GPU kernels.

Products in fp32 on dequantised operands; SwiGLU in fp32; the hidden rows are requantised, as on a GPU.
"""

import torch
from torch import Tensor

from kernels.reference.ffn import silu
from kernels.reference.linear import linear
from kernels.reference.quant import BLOCK, dequantise, quantise
from kernels.reference.stage import deliver


def dequantise_weight(weight: Tensor, scales: Tensor, *, halves: int = 1) -> Tensor:
    """Multiply e4m3 weight [rows, columns] by the scale of each 128x128 block: fp32 [rows, columns].

    scales fp32 [halves * ceil(rows / halves / 128), ceil(columns / 128)]: blocks start anew in each half (gate, up).
    """
    rows, columns = weight.shape
    half = scales.view(halves, -1, scales.shape[1]).repeat_interleave(BLOCK, dim=1)
    row_scales = half[:, : rows // halves].reshape(rows, -1)
    return weight.float() * row_scales.repeat_interleave(BLOCK, dim=1)[:, :columns]


def expert_ffn(
    rows: Tensor, scales: Tensor, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor,
    down_scales: Tensor, *, reproducible: bool = False,
) -> Tensor:  # fmt: skip
    """Apply an expert to rows e4m3 [M, width] with scales fp32 [M, ceil(width / 128)]: bf16 [M, width].

    gate_up e4m3 [2 * hidden, width], gate first; gate_up_scales fp32 [2 * ceil(hidden / 128), ceil(width / 128)];
    down e4m3 [width, hidden]; down_scales fp32 [ceil(width / 128), ceil(hidden / 128)]. Scales multiply. Always
    `reproducible`: a row's bits never depend on other rows.
    """
    width, hidden = down.shape
    x = dequantise(rows, scales, torch.float32)
    both = linear(x, dequantise_weight(gate_up, gate_up_scales, halves=2), out=2 * hidden)
    h = dequantise(*quantise(silu(both[:, :hidden]) * both[:, hidden:]), torch.float32)
    return linear(h, dequantise_weight(down, down_scales), out=width).to(torch.bfloat16)


def expert_ffn_placed(
    rows: Tensor, scales: Tensor, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor,
    down_scales: Tensor, places: Tensor,
) -> None:  # fmt: skip
    """`expert_ffn`, each row to where it is wanted: see `kernels.stage.stage`."""
    deliver(expert_ffn(rows, scales, gate_up, gate_up_scales, down, down_scales), places)


def expert_ffn_grouped(
    rows: Tensor, scales: Tensor, groups: Tensor, gate_up: Tensor, gate_up_scales: Tensor,
    down: Tensor, down_scales: Tensor, *, max_rows: int,
) -> Tensor:  # fmt: skip
    """Apply each of `groups` int32 [G, 3]: (expert, first row, row behind); weights are stacked along dimension 0.

    A row without a group becomes anything. Raises ValueError when a group has more than `max_rows` rows.
    """
    out = torch.empty(rows.shape[0], down.shape[-2], dtype=torch.bfloat16, device=rows.device)
    for e, start, end in groups.tolist():
        if end - start > max_rows:
            raise ValueError(f"expert {e} has {end - start} rows, more than {max_rows}")
        part = slice(start, end)
        out[part] = expert_ffn(
            rows[part], scales[part], gate_up[e], gate_up_scales[e], down[e], down_scales[e]
        )
    return out
