"""Launches of few-row FP8 products (stream_hopper, stream_rows_hopper): who reads which rows, an expert, one matrix.

Each worker has its own weight rows over the whole of K. What does not divide by their number is cut into small items:
16 rows of either tile more or less decide whether a worker is late.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from kernels import hopper, stream_hopper, stream_rows_hopper
from kernels.dependent import PROGRAMMATIC
from kernels.quant import quantise_into
from kernels.reference.quant import SCALE_MIN
from kernels.swiglu import swiglu_dense_into

STREAM_ROWS = 128  # above, a product is bound by arithmetic
WORKERS = 132  # SMs of an H100 or H200
_SHARED = 225 << 10  # bytes of shared memory for the ring
_SCALES = 8 << 10  # of these for scales, with one warpgroup
_COLUMNS = 2  # blocks of 128 columns in a stage of two warpgroups, as many as hopper_scales.load_scales brings


class Share(NamedTuple):
    """Items of a weight [rows, K]: of gate and up rounds of big ones for all workers, then small ones of 2 x n rows."""

    rounds: int
    first_row: int  # of the small items, in a half
    n: int
    groups: int  # small items


@functools.cache
def share(num_rows: int, halves: int, parts: int = 1, widest: int = 64) -> Share:
    """Share out a weight of `num_rows` rows; `halves` is 2 for gate and up, whose rows are taken in pairs.

    Each small item is that of `parts` workers, which divide the rows of x; it has at most 2 x `widest` rows.
    """
    rows, step = num_rows // halves, 3 - halves
    rounds = rows // (128 * WORKERS) if halves == 2 else 0
    first_row = rounds * 128 * WORKERS

    def groups(n: int) -> int:
        return -(-(rows - first_row) // (n * step)) * parts

    # the fewest rows of the busiest worker; of equals the widest items, which read x least often (big ones' ring has
    # room for 2 x 32)
    most = 32 if rounds else widest
    n = min(
        (n for n in (64, 32, 16) if n <= most), key=lambda n: (-(-groups(n) // WORKERS) * n, -n)
    )
    return Share(rounds, first_row, n, groups(n))


def blocks_of(matrix: Tensor, rows: int) -> object:
    """Descriptor of blocks of `rows` rows and 128 columns of an e4m3 matrix."""
    return hopper.blocks_of(matrix, rows, 128, dtype=gl.float8e4nv)


def _one_warpgroup(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, out: Tensor, halves: int, places: Tensor | None
) -> None:  # fmt: skip
    """Products by stream_rows: small items, each of one warpgroup; of gate and up SwiGLU, fp32."""
    m, kb = x_scales.shape
    num_rows, half_rows, step = w.shape[0], w.shape[0] // halves, 3 - halves
    half_tiles = -(-half_rows // 128)
    parts = 1 if m <= 64 else 2
    t = 16 if m <= 16 else 32 if m <= 32 else 64
    s = share(num_rows, halves, parts, widest=32)
    # a stage's blocks of columns, and how many stages are asked for before the predecessor has ended: what comes before
    # gate and up leaves time for one; down's are smaller beside 64 rows of x, so that more of it is there early
    columns, early = (4, 1) if halves == 2 else (2, 4) if t == 64 else (4, 3)
    stage_nbytes = columns * 128 * (t + (2 * s.n if t == 64 else 64))
    stages = min(4 if halves == 2 else 8, (_SHARED - _SCALES) // stage_nbytes)
    second, sub_tiles = (half_rows, half_tiles) if halves == 2 else (s.n, 1)
    stream_rows_hopper.stream_rows[(min(WORKERS, s.groups),)](
        blocks_of(x, min(t, 32)), x_scales, blocks_of(w, s.n), w_scales, out, out.stride(0), m, kb,
        s.groups, second, sub_tiles, halves * half_tiles, half_rows, places, step, t, columns, stages,
        parts, early, places is not None, num_warps=4, maxnreg=128, **PROGRAMMATIC,
    )  # fmt: skip


def _two_warpgroups(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, out: Tensor, halves: int,
    q: Tensor, q_scales: Tensor, places: Tensor | None,
) -> None:  # fmt: skip
    """Products by stream_units: big items of gate and up and what they leave, or up to 128 rows of x."""
    m, kb = x_scales.shape
    num_rows, half_rows = w.shape[0], w.shape[0] // halves
    half_tiles = -(-half_rows // 128)
    big = halves == 2
    # 64 rows of x and 2 x 32 of w are fewer than 128 and 2 x 16
    parts = 2 if m > 64 and big else 1
    s = share(num_rows, halves, parts)
    block, x_rows = 64 if m <= 64 else 128, 16 if m <= 16 else 32
    stages = min(8, _SHARED // (_COLUMNS * 128 * (128 if big else block + 2 * s.n)))
    per_thread, of_multiplier = (168, 240) if block == 128 and (big or s.n == 64) else (128, 176)
    wide = not (kb % 2 or x_scales.data_ptr() % 8 or w_scales.data_ptr() % 8)
    if big:
        sub_rows, small_sub, out_sub, sub_tiles, limit = (
            half_rows, half_rows, half_rows - s.first_row, half_tiles, half_rows - s.first_row,
        )  # fmt: skip
    else:
        sub_rows, small_sub, out_sub, sub_tiles, limit = 128, s.n, s.n, 1, num_rows
    workers = WORKERS if big else min(WORKERS, s.groups)
    stream_hopper.stream_units[(workers,)](
        blocks_of(x, x_rows), x_scales, blocks_of(w, 64), blocks_of(w, s.n), w_scales, out, out.stride(0),
        out_sub, m, kb, s.rounds, s.groups, s.first_row, sub_rows, small_sub, sub_tiles,
        halves * half_tiles, limit, q, q_scales, half_rows, places, x_rows, block, _COLUMNS, s.n,
        stages, of_multiplier, big, parts, SCALE_MIN, wide, places is not None, num_warps=4,
        maxnreg=per_thread, **PROGRAMMATIC,
    )  # fmt: skip


def _multiply(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, out: Tensor, halves: int,
    q: Tensor, q_scales: Tensor, places: Tensor | None = None,
) -> None:  # fmt: skip
    """Products to out: [M, N]; of gate and up (`halves` 2) without big items SwiGLU to out [M, N / 2], fp32.

    Big ones go to q and q_scales, and what is left beside them to out [M, 2, rest]. With `places` rows [M, N] go where
    these say, and none to out.
    """
    if share(w.shape[0], halves).rounds or (halves == 1 and x_scales.shape[0] > 64):
        _two_warpgroups(x, x_scales, w, w_scales, out, halves, q, q_scales, places)
    else:
        _one_warpgroup(x, x_scales, w, w_scales, out, halves, places)


def stream_expert(
    rows: Tensor, scales: Tensor, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor,
    down_scales: Tensor, places: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As expert_ffn.expert_ffn, for at most `STREAM_ROWS` rows: three launches, chained as programmatic dependents.

    With `places` rows go where these say, and what is returned is empty.
    """
    m, (width, hidden) = rows.shape[0], down.shape
    make = functools.partial(torch.empty, device=rows.device)
    # with all rows of a block that is fetched (stream_hopper.fetch_x)
    whole = make(-(-m // 64) * 64, hidden, dtype=torch.float8_e4m3fn)
    q, q_scales = whole[:m], make(m, -(-hidden // 128))
    done = share(2 * hidden, 2).first_row  # columns of q that the first launch finishes
    # SwiGLU of all columns, or gate and up of the rest
    left = make(m, hidden if done == 0 else 2 * (hidden - done))
    _multiply(rows, scales, gate_up, gate_up_scales, left, 2, q, q_scales)
    if done == 0:
        quantise_into(left, q, q_scales)
    elif done < hidden:
        swiglu_dense_into(left, q, q_scales, done)
    out = make(m if places is None else 0, width, dtype=torch.bfloat16)
    _multiply(whole, q_scales, down, down_scales, out, 1, q, q_scales, places)
    return out


def stream_linear(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor) -> Tensor:
    """x e4m3 [M, K] times w e4m3 [N, K]: bf16 [M, N]; M at most `STREAM_ROWS`.

    x_scales fp32 [M, ceil(K / 128)]; w_scales fp32 [tiles, ceil(K / 128)]. All contiguous, K a multiple of 16.
    """
    out = torch.empty(x.shape[0], w.shape[0], dtype=torch.bfloat16, device=x.device)
    _multiply(x, x_scales, w, w_scales, out, 1, x, x_scales)
    return out
