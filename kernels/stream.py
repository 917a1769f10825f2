"""Launches of few-row FP8 products (stream_hopper): who reads which weight rows, an expert, one matrix.

Each worker has its own weight rows over the whole of K. What does not divide by their number is cut into small items:
16 rows of either tile more or less decide whether a worker is late.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from kernels import hopper, stream_hopper
from kernels.dependent import PROGRAMMATIC
from kernels.reference.quant import SCALE_MIN
from kernels.swiglu import swiglu_dense_into

STREAM_ROWS = 128  # above, a product is bound by arithmetic
WORKERS = 132  # SMs of an H100 or H200
_SHARED = 225 << 10  # bytes of shared memory for the ring
_STAGE = 256  # rows of x times blocks of 128 columns in a stage of small items


class Share(NamedTuple):
    """Items of a weight [rows, K]: of gate and up rounds of big ones for all workers, then small ones of 2 x n rows."""

    rounds: int
    first_row: int  # of the small items, in a half
    n: int
    groups: int  # small items


@functools.cache
def share(num_rows: int, halves: int, parts: int = 1) -> Share:
    """Share out a weight of `num_rows` rows; `halves` is 2 for gate and up, whose rows are taken in pairs.

    Each small item is that of `parts` workers, which divide the rows of x.
    """
    rows, step = num_rows // halves, 3 - halves
    rounds = rows // (128 * WORKERS) if halves == 2 else 0
    first_row = rounds * 128 * WORKERS

    def groups(n: int) -> int:
        return -(-(rows - first_row) // (n * step)) * parts

    # the fewest rows of the busiest worker; of equals the widest items, which read x least often (big ones' ring has
    # room for 2 x 32)
    n = min((32, 16) if rounds else (64, 32, 16), key=lambda n: (-(-groups(n) // WORKERS) * n, -n))
    return Share(rounds, first_row, n, groups(n))


def blocks_of(matrix: Tensor, rows: int) -> object:
    """Descriptor of blocks of `rows` rows and 128 columns of an e4m3 matrix."""
    return hopper.blocks_of(matrix, rows, 128, dtype=gl.float8e4nv)


def _multiply(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, out: Tensor, halves: int,
    q: Tensor, q_scales: Tensor, places: Tensor | None = None,
) -> None:  # fmt: skip
    """Products to out: [M, N]; of gate and up (`halves` 2) big items to q and q_scales, others to out [M, 2, rest].

    With `places` rows [M, N] go where these say, and none to out.
    """
    m = x_scales.shape[0]
    num_rows, k = w.shape
    # 64 rows of x and 2 x 32 of w are fewer than 128 and 2 x 16
    parts = 2 if m > 64 and halves == 2 else 1
    s = share(num_rows, halves, parts)
    big = s.rounds > 0
    kb, half_rows = -(-k // 128), num_rows // halves
    half_tiles = -(-half_rows // 128)
    block, x_rows = 64 if m <= 64 else 128, 16 if m <= 16 else 32
    columns = 2 if big else _STAGE * parts // block  # blocks of 128 columns in a stage
    stages = min(8, _SHARED // (columns * 128 * (128 if big else block // parts + 2 * s.n)))
    per_thread, of_multiplier = (168, 240) if block == 128 and (big or s.n == 64) else (128, 176)
    wide = not (kb % 4 or x_scales.data_ptr() % 16 or w_scales.data_ptr() % 16)
    if halves == 2:
        sub_rows, small_sub, out_sub, sub_tiles, limit = (
            half_rows, half_rows, half_rows - s.first_row, half_tiles, half_rows - s.first_row,
        )  # fmt: skip
    else:
        sub_rows, small_sub, out_sub, sub_tiles, limit = 128, s.n, s.n, 1, num_rows
    workers = WORKERS if big else min(WORKERS, s.groups)
    stream_hopper.stream_units[(workers,)](
        blocks_of(x, x_rows), x_scales, blocks_of(w, 64), blocks_of(w, s.n), w_scales, out, out.stride(0),
        out_sub, m, kb, s.rounds, s.groups, s.first_row, sub_rows, small_sub, sub_tiles,
        halves * half_tiles, limit, q, q_scales, half_rows, places, 3 - halves, x_rows, block, columns, s.n,
        stages, of_multiplier, big, parts, SCALE_MIN, wide, places is not None, num_warps=4,
        maxnreg=per_thread, **PROGRAMMATIC,
    )  # fmt: skip


def stream_expert(
    rows: Tensor, scales: Tensor, gate_up: Tensor, gate_up_scales: Tensor, down: Tensor,
    down_scales: Tensor, places: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As expert_ffn.expert_ffn, for at most `STREAM_ROWS` rows: three launches, chained as programmatic dependents.

    With `places` rows go where these say, and what is returned is empty.
    """
    m, (width, hidden) = rows.shape[0], down.shape
    make = functools.partial(torch.empty, device=rows.device)
    # with all rows of a block that is fetched (stream_hopper._fetch_x)
    whole = make(-(-m // 64) * 64, hidden, dtype=torch.float8_e4m3fn)
    q, q_scales = whole[:m], make(m, -(-hidden // 128))
    done = share(2 * hidden, 2).first_row  # columns of q that the first launch finishes
    both = make(m, 2 * (hidden - done))
    _multiply(rows, scales, gate_up, gate_up_scales, both, 2, q, q_scales)
    if done < hidden:
        swiglu_dense_into(both, q, q_scales, done)
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
