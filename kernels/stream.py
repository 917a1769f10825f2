"""Launches of few-row FP8 products (stream_*_hopper): who reads which rows, an expert, one matrix.

Each worker has its own weight rows over the whole of K. What does not divide by their number is cut into small items:
16 rows of either tile more or less decide whether a worker is late.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from kernels import hopper, stream_hidden_hopper, stream_hopper, stream_rows_hopper
from kernels.dependent import PROGRAMMATIC
from kernels.quant import quantise_into
from kernels.reference.quant import SCALE_MIN

STREAM_ROWS = 128  # above, a product is bound by arithmetic
WORKERS = 132  # SMs of an H100 or H200
_SHARED = 225 << 10  # bytes of shared memory for the ring
_SCALES = 8 << 10  # of these for scales, with one warpgroup
_COLUMNS = 2  # blocks of 128 columns in a stage of two warpgroups, as many as hopper_scales.load_scales brings


class Share(NamedTuple):
    """Items of weight rows, in pairs of n: of gate and of up, or neighbours."""

    n: int
    groups: int


@functools.cache
def share(rows: int, halves: int, parts: int = 1, widest: int = 64) -> Share:
    """Share out `rows` weight rows, or with `halves` 2 as many of gate and of up each, whose pairs are the items.

    Each item is that of `parts` workers, which divide the rows of x; it has at most 2 x `widest` rows.
    """
    step = 3 - halves

    def groups(n: int) -> int:
        return -(-rows // (n * step)) * parts

    # the fewest rows of the busiest worker; of equals the widest items, which read x least often
    n = min(
        (n for n in (64, 32, 16) if n <= widest),
        key=lambda n: (-(-groups(n) // WORKERS) * n, -n),
    )
    return Share(n, groups(n))


def rounds_of(hidden: int) -> int:
    """How often all workers have 128 columns of gate and up each."""
    return hidden // (128 * WORKERS)


def blocks_of(matrix: Tensor, rows: int) -> object:
    """Descriptor of blocks of `rows` rows and 128 columns of an e4m3 matrix."""
    return hopper.blocks_of(matrix, rows, 128, dtype=gl.float8e4nv)


def _pairs(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, out: Tensor, halves: int,
    places: Tensor | None = None, first: int = 0,
) -> None:  # fmt: skip
    """Products by stream_rows to out [M, N], bf16; of gate and up (`halves` 2) SwiGLU of columns from `first` on, fp32.

    With `places` rows [M, N] go where these say, and none to out.
    """
    m, kb = x_scales.shape
    half_rows, step = w.shape[0] // halves, 3 - halves
    half_tiles = -(-half_rows // 128)
    parts = 1 if m <= 64 else 2
    t = 16 if m <= 16 else 32 if m <= 32 else 64
    s = share(half_rows - first, halves, parts, widest=32)
    # a stage's blocks of columns, and how many stages are asked for before the predecessor has ended: what comes before
    # gate and up leaves time for one, but a wide expert's down for more; down's own are smaller beside 64 rows of x, so
    # that more of it is there early
    if halves == 2:
        columns, early = 4, 4 if first and t == 16 else 1
    else:
        columns, early = (2, 4) if t == 64 else (4, 3)
    stage_nbytes = columns * 128 * (t + (2 * s.n if t == 64 else 64))
    stages = min(4 if halves == 2 else 8, (_SHARED - _SCALES) // stage_nbytes)
    second, sub_tiles = (half_rows, half_tiles) if halves == 2 else (s.n, 1)
    stream_rows_hopper.stream_rows[(min(WORKERS, s.groups),)](
        blocks_of(x, min(t, 32)), x_scales, blocks_of(w[first:], s.n), w_scales[first // 128 :], out,
        out.stride(0), m, kb, s.groups, second, sub_tiles, halves * half_tiles, half_rows - first, places, step,
        t, columns, stages, parts, early, places is not None, num_warps=4, maxnreg=128, **PROGRAMMATIC,
    )  # fmt: skip


def _many_rows(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, out: Tensor, places: Tensor | None
) -> None:
    """Products by stream_units, of more than 64 rows of x."""
    m, kb = x_scales.shape
    s = share(w.shape[0], 1)
    stages = min(8, _SHARED // (_COLUMNS * 128 * (STREAM_ROWS + 2 * s.n)))
    per_thread, of_multiplier = (168, 240) if s.n == 64 else (128, 176)
    wide = not (kb % 2 or x_scales.data_ptr() % 8 or w_scales.data_ptr() % 8)
    stream_hopper.stream_units[(min(WORKERS, s.groups),)](
        blocks_of(x, 32), x_scales, blocks_of(w, s.n), w_scales, out, out.stride(0), m, kb, s.groups,
        -(-w.shape[0] // 128), w.shape[0], places, STREAM_ROWS, _COLUMNS, stages, of_multiplier, wide,
        places is not None, num_warps=4, maxnreg=per_thread, **PROGRAMMATIC,
    )  # fmt: skip


def _multiply(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, out: Tensor, places: Tensor | None = None
) -> None:  # fmt: skip
    """Products to out [M, N]; with `places` rows go where these say, and none to out."""
    if x_scales.shape[0] > 64:
        _many_rows(x, x_scales, w, w_scales, out, places)
    else:
        _pairs(x, x_scales, w, w_scales, out, 1, places)


def _hidden(
    x: Tensor, x_scales: Tensor, gate_up: Tensor, gate_up_scales: Tensor, q: Tensor, q_scales: Tensor
) -> None:  # fmt: skip
    """SwiGLU of x times gate and up, quantised: to q [M, hidden] and its scales, in two launches or one.

    What does not fill all workers goes first: as its workers end, those of the 128 columns each come.
    """
    m, hidden = q.shape
    rounds = rounds_of(hidden)
    first = rounds * 128 * WORKERS
    left = torch.empty(m, hidden - first, device=x.device)
    if first < hidden:
        _pairs(x, x_scales, gate_up, gate_up_scales, left, 2, first=first)
    if rounds == 0:
        quantise_into(left, q, q_scales)
        return
    stages = _SHARED // (_COLUMNS * 128 * 128)
    block, per_thread, of_multiplier = (64, 128, 176) if m <= 64 else (128, 168, 240)
    stream_hidden_hopper.stream_hidden[(WORKERS,)](
        blocks_of(x, 16 if m <= 16 else 32), x_scales, blocks_of(gate_up, 64), gate_up_scales, left, m,
        x_scales.shape[1], hidden, q, q_scales, block, _COLUMNS, stages, of_multiplier, first < hidden,
        SCALE_MIN, num_warps=4, maxnreg=per_thread, **PROGRAMMATIC,
    )  # fmt: skip


def stream_expert(
    rows: Tensor, scales: Tensor, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor,
    down_scales: Tensor, places: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As expert_ffn.expert_ffn, for at most `STREAM_ROWS` rows: launches chained as programmatic dependents.

    With `places` rows go where these say, and what is returned is empty.
    """
    m, (width, hidden) = rows.shape[0], down.shape
    make = functools.partial(torch.empty, device=rows.device)
    # with all rows of a block that is fetched (stream_fetch_hopper.fetch_x)
    whole = make(-(-m // 64) * 64, hidden, dtype=torch.float8_e4m3fn)
    q_scales = make(m, -(-hidden // 128))
    _hidden(rows, scales, gate_up, gate_up_scales, whole[:m], q_scales)
    out = make(m if places is None else 0, width, dtype=torch.bfloat16)
    _multiply(whole, q_scales, down, down_scales, out, places)
    return out


def stream_linear(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor) -> Tensor:
    """x e4m3 [M, K] times w e4m3 [N, K]: bf16 [M, N]; M at most `STREAM_ROWS`.

    x_scales fp32 [M, ceil(K / 128)]; w_scales fp32 [tiles, ceil(K / 128)]. All contiguous, K a multiple of 16.
    """
    out = torch.empty(x.shape[0], w.shape[0], dtype=torch.bfloat16, device=x.device)
    _multiply(x, x_scales, w, w_scales, out)
    return out
