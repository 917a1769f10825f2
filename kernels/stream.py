"""Launches of few-row FP8 products (stream_hopper): a whole expert, or the sums of one matrix.

Programs of a whole expert wait for each other: the launch is cooperative, so that either all of them run or none.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels import stream_hopper
from kernels.block_gemm import WORKERS, Cut, cut
from kernels.dependent import PROGRAMMATIC, after_predecessor
from kernels.reference.quant import SCALE_MIN

STREAM_ROWS = 128  # above, a product is bound by arithmetic
# block of rows -> stages that 227 KiB hold, registers per thread, and those of a multiplying one
_SHAPES = {64: (5, 128, 176), 128: (4, 168, 240)}
_POOL = 1 << 16


@functools.cache
def _layout(rows: int) -> object:
    """Of a block of `rows` rows and 128 columns of e4m3 in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, 128], gl.float8e4nv)


def _blocks(matrix: Tensor, rows: int) -> object:
    return TensorDescriptor.from_tensor(matrix, [rows, 128], _layout(rows))


class _Counters:
    """Four zeros for every expert that can run at once: one set per stream, and one per captured call."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.zeros(_POOL, 4, dtype=torch.int32, device=device)
        self._used = 0
        self._of_stream: dict[int, Tensor] = {}

    def _next(self) -> Tensor:
        if self._used == _POOL:
            raise RuntimeError(f"more than {_POOL} experts in captured graphs")
        self._used += 1
        return self._pool[self._used - 1]

    def take(self, device: torch.device) -> Tensor:
        """Counters that no call uses which can run at the same time."""
        if torch.cuda.is_current_stream_capturing():
            return self._next()
        stream = torch.cuda.current_stream(device).cuda_stream
        if stream not in self._of_stream:
            self._of_stream[stream] = self._next()
        return self._of_stream[stream]


@functools.cache
def _counters(device: torch.device) -> _Counters:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run an expert once on this device before capturing one in a graph")
    return _Counters(device)


@functools.cache
def fits(device: torch.device) -> bool:
    """Whether all programs of `stream_expert` can run at once on this GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count >= WORKERS


def stream_expert(
    rows: Tensor,
    scales: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    down: Tensor,
    down_scales: Tensor,
) -> Tensor:
    """As expert_ffn.expert_ffn, for at most `STREAM_ROWS` rows on a GPU that `fits`."""
    m, (width, hidden) = rows.shape[0], down.shape
    g, d = cut(2 * hidden, width, 2), cut(width, hidden, 1)
    make = functools.partial(torch.empty, device=rows.device)
    partial, d_partial = (make(c.stored, 2, m, 128) for c in (g, d))
    q, q_scales = make(m, hidden, dtype=torch.float8_e4m3fn), make(m, g.groups)
    out = make(m, width, dtype=torch.bfloat16)
    block = 64 if m <= 64 else 128
    stages, per_thread, of_multiplier = _SHAPES[block]
    stream_hopper.expert_units[(max(g.workers, d.workers),)](
        _blocks(rows, block), scales, _blocks(gate_up, 128), gate_up_scales, _blocks(q, block), q,
        q_scales, _blocks(down, 128), down_scales, partial, d_partial, out,
        _counters(rows.device).take(rows.device), m, g.kb, g.groups, g.half_rows, g.whole, g.splits,
        d.kb, d.tiles, d.whole, d.splits, d.groups, hidden, width, block, stages, of_multiplier,
        g.splits, d.splits, SCALE_MIN, num_warps=4, maxnreg=per_thread,
        launch_cooperative_grid=True, launch_pdl=True,
    )  # fmt: skip
    return out


@triton.jit
def _add_parts(
    PARTIAL, OUT, M, width, whole, SPLITS: tl.constexpr, R: tl.constexpr
):
    after_predecessor()
    tile = tl.program_id(0)
    row = tl.program_id(1) * R + tl.arange(0, R)
    ok = row < M
    group = tile // 2
    first = tl.where(group < whole, group, whole + (group - whole) * SPLITS)
    total = tl.zeros((R, 128), tl.float32)
    for s in tl.static_range(SPLITS):  # all loads are in flight before the first addition
        at = ((first + s).to(tl.int64) * 2 + tile % 2) * M + row
        here = ok & ((group >= whole) | (s == 0))
        part = PARTIAL + at[:, None] * 128 + tl.arange(0, 128)[None, :]
        total += tl.load(part, mask=here[:, None], other=0.0)
    column = tile * 128 + tl.arange(0, 128)
    inside = ok[:, None] & (column < width)[None, :]
    tl.store(OUT + row[:, None] * width + column[None, :], total, mask=inside)


def stream_linear(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, c: Cut) -> Tensor:
    """x e4m3 [M, K] times w e4m3 [N, K]: bf16 [M, N]; M at most `STREAM_ROWS`.

    x_scales fp32 [M, ceil(K / 128)]; w_scales fp32 [tiles, ceil(K / 128)]. All contiguous, K a multiple of 16.
    """
    m, n = x.shape[0], w.shape[0]
    partial = torch.empty(c.stored, 2, m, 128, device=x.device)
    block = 64 if m <= 64 else 128
    stages, per_thread, of_multiplier = _SHAPES[block]
    stream_hopper.stream_units[(c.workers,)](
        _blocks(x, block), x_scales, _blocks(w, 128), w_scales, partial, m, c.kb, c.tiles, c.whole,
        c.splits, c.groups, block, stages, of_multiplier, num_warps=4, maxnreg=per_thread,
        launch_pdl=True,
    )  # fmt: skip
    out = torch.empty(m, n, dtype=torch.bfloat16, device=x.device)
    block = 4 if m > 16 else 1
    _add_parts[(c.tiles, triton.cdiv(m, block))](
        partial, out, m, n, c.whole, c.splits, block, num_warps=4 if block == 4 else 1,
        **PROGRAMMATIC,
    )  # fmt: skip
    return out
