"""FP8 matrix products with 1x128 activation scales and 128x128 weight scales, for few and for many rows.

One canonical order of accumulation. A weight matrix is cut into tiles of 128 rows, one or two of them a group (gate
and up of the same columns; in large matrices two neighbours); a group needs K / 128 units; all units, group after
group, are cut into runs of equal length, one per worker. Within a run a tile's products of 128 columns are added in
order, in fp32, each after scaling; the runs' sums of a tile are added in order. The cut depends on the weight's shape
alone, so a row's bits depend on neither the number of rows nor the kernel:

- `stream_gemm` (few rows: bound by reading the weights) gives each worker its run and leaves the sums of runs in
  memory: every SM reads the same number of bytes, whatever the shape, and there are no waves of tiles to round up;
- `tile_gemm` (many rows, or many experts) computes whole tiles and keeps the same cuts in registers.

`stream_gemm` is launched as a programmatic dependent: it starts while its predecessor drains, fills shared memory with
its weights, and waits only before it touches what the predecessor wrote.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Blocks
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import stream_hopper

STREAM_ROWS = 128  # above, a product is bound by arithmetic
WORKERS = 132  # SMs of an H100 or H200; on any other card the order stays this one


@triton.jit
def worker_of(unit, units, workers):
    """The worker whose run [w * units // workers, (w + 1) * units // workers) holds a unit."""
    return ((unit + 1) * workers - 1) // units


@triton.jit
def _first_row(tile, half_rows, half_tiles):
    """First weight row of a tile: gate and up (or the only half, of a down projection) are cut apart."""
    return tile // half_tiles * half_rows + tile % half_tiles * 128


@triton.jit
def sum_of_runs(
    PARTIAL, group, sub, row, ok, M, units, workers, slots, kb, PAIR: tl.constexpr, RUNS: tl.constexpr
):  # fmt: skip
    """Sum a tile's runs in order: fp32 [rows, 128]. All loads are in flight before the first addition."""
    first = worker_of(group * kb, units, workers)
    last = worker_of(group * kb + kb - 1, units, workers)
    total = tl.zeros((row.shape[0], 128), tl.float32)
    for r in tl.static_range(RUNS):
        worker = first + r
        slot = (worker * slots + group - (worker * units // workers) // kb) * PAIR + sub
        at = (slot.to(tl.int64) * M + row)[:, None] * 128 + tl.arange(0, 128)[None, :]
        here = ok & (worker <= last)
        total += tl.load(PARTIAL + at, mask=here[:, None], other=0.0)
    return total


@triton.jit
def _add_unit(acc, x, xs, W, WS, tile, n0, k, kb):
    """acc [BM, 128] fp32 plus one scaled unit: x [BM, 128] times the 128 weight rows from n0 on, columns 128 k on."""
    w = W.load([n0, k * 128]).T
    scale = xs * tl.load(WS + tile * kb + k)
    return tl.fma(tl.dot(x, w), tl.broadcast_to(scale[:, None], acc.shape), acc)


@triton.jit
def _tile_gemm(
    X, XS, W, WS, OUT, OFFSETS, M, N, kb, units, workers, half_rows, half_tiles, step, groups,
    w_rows, ws_size, BM: tl.constexpr, GROUPED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUT [M, N]: one program per 128 weight rows, BM rows and, when grouped, expert (rows OFFSETS[e] .. [e + 1])."""
    tile = tl.program_id(0)
    first_row, last_row, w0 = 0, M, 0
    if GROUPED:
        e = tl.program_id(2)
        first_row = tl.load(OFFSETS + e)
        last_row = tl.load(OFFSETS + e + 1)
        w0 = e * w_rows
        WS += e * ws_size
    m0 = first_row + tl.program_id(1) * BM
    if m0 < last_row:
        row = m0 + tl.arange(0, BM)
        ok = row < last_row
        n0 = _first_row(tile, half_rows, half_tiles)
        total = tl.zeros((BM, 128), tl.float32)
        acc = tl.zeros((BM, 128), tl.float32)
        for k in tl.range(0, kb, num_stages=STAGES):
            x = X.load([m0, k * 128])
            xs = tl.load(XS + row * kb + k, mask=ok, other=0.0)
            acc = _add_unit(acc, x, xs, W, WS, tile, w0 + n0, k, kb)
            u = tile // step % groups * kb + k
            if worker_of(u, units, workers) != worker_of(u + 1, units, workers):
                total += acc
                acc = tl.zeros((BM, 128), tl.float32)
        total += acc  # +0 when the last run ended with the tile: changes no bit
        n = n0 + tl.arange(0, 128)
        n_end = (tile // half_tiles + 1) * half_rows
        at = row.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(OUT + at, total, mask=ok[:, None] & (n < n_end)[None, :])


@dataclass(frozen=True, slots=True)
class Cut:
    """How a weight [halves * half_rows, K] is cut into tiles, groups, units and runs; `halves` is 2 for gate and up."""

    half_rows: int
    half_tiles: int
    kb: int
    pair: int  # tiles of a group
    step: int  # tiles from the first of a group to the first of the next
    sub_rows: int  # weight rows from the first tile of a group to its second
    sub_tiles: int  # tiles from the first of a group to its second
    tiles: int
    groups: int
    units: int
    workers: int
    slots: int  # groups that one run can touch
    runs: int  # runs that one group can lie in


@functools.cache
def cut(num_rows: int, num_columns: int, halves: int) -> Cut:
    """The canonical cut of a weight [num_rows, num_columns]: a function of its shape alone."""
    half_rows = num_rows // halves
    half_tiles = -(-half_rows // 128)
    kb = -(-num_columns // 128)
    # Two tiles per unit halve the reads of x, but the longest run is up to one unit longer than the mean.
    pair = 2 if halves == 2 or half_tiles // 2 * kb >= 16 * WORKERS else 1
    groups = half_tiles if halves == 2 else -(-half_tiles // pair)
    units = groups * kb
    workers = min(WORKERS, units)
    slots = max(0, -(-units // workers) - 2) // kb + 2
    runs = kb * workers // units + 2
    step, sub_rows, sub_tiles = (1, half_rows, half_tiles) if halves == 2 else (pair, 128, 1)
    return Cut(
        half_rows, half_tiles, kb, pair, step, sub_rows, sub_tiles, halves * half_tiles, groups,
        units, workers, slots, runs,
    )  # fmt: skip


@functools.cache
def _layout(rows: int) -> object:
    """Of a block of `rows` rows and 128 columns of e4m3 in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, 128], gl.float8e4nv)


_STAGES = {(64, 1): 9, (64, 2): 5, (128, 1): 7, (128, 2): 4}  # what 227 KiB hold
_REGISTERS = {(64, 1): (128, 176), (64, 2): (128, 176), (128, 1): (128, 176), (128, 2): (168, 240)}


def stream_gemm(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, c: Cut) -> Tensor:
    """Products of x e4m3 [M, K] with w e4m3 [N, K]: sums of runs, fp32 [workers * slots * pair, M, 128]; M <= 128.

    x_scales fp32 [M, ceil(K / 128)]; w_scales fp32 [tiles, ceil(K / 128)]. All contiguous, K a multiple of 16.
    """
    m = x.shape[0]
    partial = torch.empty(c.workers * c.slots * c.pair, m, 128, device=x.device)
    kind = (64 if m <= 64 else 128, c.pair)
    per_thread, of_multiplier = _REGISTERS[kind]
    stream_hopper.stream_units[(c.workers,)](
        Blocks.from_tensor(x, [kind[0], 128], _layout(kind[0])), x_scales,
        Blocks.from_tensor(w, [128, 128], _layout(128)), w_scales, partial, m, c.kb, c.units,
        c.workers, c.slots, c.step, c.sub_rows, c.sub_tiles, c.tiles, *kind, _STAGES[kind],
        of_multiplier, num_warps=4, maxnreg=per_thread, launch_pdl=True,
    )  # fmt: skip
    return partial


def tile_gemm(
    x: Tensor,
    x_scales: Tensor,
    w: Tensor,
    w_scales: Tensor,
    out: Tensor,
    c: Cut,
    offsets: Tensor | None = None,
    max_rows: int | None = None,
) -> None:
    """out [M, N] = x e4m3 [M, K] times w e4m3 [N, K], in the canonical order; out fp32 or bf16.

    Grouped when `offsets` int32 [E + 1] is given: w [E, N, K], w_scales [E, tiles, ceil(K / 128)], and expert e has the
    rows offsets[e] .. offsets[e + 1], at most `max_rows` of them.
    """
    m, k = x.shape
    grouped = offsets is not None
    rows = m if max_rows is None else max_rows
    block = 64 if rows <= 64 else 128
    num_rows = w.shape[-2]
    grid = (c.units // c.kb, triton.cdiv(rows, block), w.shape[0] if grouped else 1)
    flat = w.view(-1, k)
    _tile_gemm[grid](
        TensorDescriptor(x, list(x.shape), [k, 1], [block, 128]), x_scales,
        TensorDescriptor(flat, list(flat.shape), [k, 1], [128, 128]), w_scales, out, offsets, m,
        num_rows, c.kb, c.units, c.workers, c.half_rows, c.half_tiles, c.step, c.groups, num_rows,
        w_scales.shape[-2] * c.kb, block, grouped, 4, num_warps=4 if block == 64 else 8,
        num_stages=4,
    )  # fmt: skip
