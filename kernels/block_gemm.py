"""FP8 matrix products with 1x128 activation scales and 128x128 weight scales, for few and for many rows.

One canonical order of accumulation. A weight matrix is cut into tiles of 128 rows; a tile needs K / 128 units, one
unit being one 128 x 128 block; all units, tile after tile, are cut into runs of equal length, one per worker. Within
a run a tile's units are added in order, in fp32, each after scaling; the runs' sums of a tile are added in order. The
cut depends on the weight's shape alone, so a row's bits depend on neither the number of rows nor the kernel:

- `stream_gemm` (few rows: bound by reading the weights) gives each worker its run and leaves the sums of runs in
  memory: every SM reads the same number of bytes, whatever the shape, and there are no waves of tiles to round up;
- `tile_gemm` (many rows, or many experts) computes whole tiles and keeps the same cuts in registers.

`stream_gemm` is launched as a programmatic dependent: it starts while its predecessor drains, asks for its weights to
be brought into L2, and waits only before it touches what the predecessor wrote.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

PREFETCH_UNITS = (
    4  # of each run: what a predecessor's end leaves time for (of 0, 2, 4, 8, 14 the best)
)
STREAM_ROWS = 64  # rows of one wgmma
WORKERS = 132  # SMs of an H100 or H200; on any other card the order stays this one


@triton.jit
def worker_of(unit, units, workers):
    """The worker whose run [w * units // workers, (w + 1) * units // workers) holds a unit."""
    return ((unit + 1) * workers - 1) // units


@triton.jit
def _prefetch_l2(address, nbytes):
    """Ask for bytes (a multiple of 16; none where not positive) at int64 addresses to be brought into L2."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred some;
        setp.gt.s32 some, $2, 0;
        @some cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r", [address, nbytes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _first_row(tile, half_rows, half_tiles):
    """First weight row of a tile: gate and up (or the only half, of a down projection) are cut apart."""
    return tile // half_tiles * half_rows + tile % half_tiles * 128


@triton.jit
def _prefetch_run(W, K, kb, start, end, half_rows, half_tiles, UNITS: tl.constexpr):
    """Bring the first units of a run into L2: one request per weight row."""
    tile = start // kb
    k = start - tile * kb
    units = tl.minimum(tl.minimum(end - start, kb - k), UNITS)
    place = tl.minimum(tile % half_tiles * 128 + tl.arange(0, 128), half_rows - 1)
    line = (tile // half_tiles * half_rows + place).to(tl.int64) * K + k * 128
    nbytes = tl.minimum(units * 128, K - k * 128) + tl.zeros((128,), tl.int32)
    _prefetch_l2((W + line).to(tl.int64), nbytes)


@triton.jit
def sum_of_runs(PARTIAL, tile, row, ok, M, units, workers, slots, kb, RUNS: tl.constexpr):
    """Sum a tile's runs in order: fp32 [rows, 128]. All loads are in flight before the first addition."""
    first = worker_of(tile * kb, units, workers)
    last = worker_of(tile * kb + kb - 1, units, workers)
    total = tl.zeros((row.shape[0], 128), tl.float32)
    for r in tl.static_range(RUNS):
        worker = first + r
        slot = worker * slots + tile - (worker * units // workers) // kb
        at = (slot.to(tl.int64) * M + row)[:, None] * 128 + tl.arange(0, 128)[None, :]
        here = ok & (worker <= last)
        total += tl.load(PARTIAL + at, mask=here[:, None], other=0.0)
    return total


@triton.jit
def _store_tile(at, acc, ok):
    """Store acc [BM, 128] at pointers `at` [BM, 1] in two halves, which halves the scratch memory."""
    halves = tl.permute(tl.reshape(acc, (acc.shape[0], 2, 64)), (0, 2, 1))
    left, right = tl.split(halves)
    column = tl.arange(0, 64)[None, :]
    tl.store(at + column, left, mask=ok[:, None])
    tl.store(at + 64 + column, right, mask=ok[:, None])


@triton.jit
def _add_unit(acc, x, xs, W, WS, tile, n0, k, kb):
    """acc [BM, 128] fp32 plus one scaled unit: x [BM, 128] times the 128 weight rows from n0 on, columns 128 k on."""
    w = W.load([n0, k * 128]).T
    scale = xs * tl.load(WS + tile * kb + k)
    return tl.fma(tl.dot(x, w), tl.broadcast_to(scale[:, None], acc.shape), acc)


@triton.jit
def _stream_gemm(
    X, XS, W, WS, PARTIAL, WP, M, K, kb, units, workers, slots, half_rows, half_tiles,
    BM: tl.constexpr, PREFETCH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of runs to PARTIAL [workers * slots, M, 128]."""
    worker = tl.program_id(0)
    start = worker * units // workers
    end = (worker + 1) * units // workers
    gdc_launch_dependents()
    if PREFETCH > 0:
        _prefetch_run(WP, K, kb, start, end, half_rows, half_tiles, PREFETCH)
    gdc_wait()
    row = tl.arange(0, BM)
    ok = row < M
    first = start // kb
    acc = tl.zeros((BM, 128), tl.float32)
    for u in tl.range(start, end, num_stages=STAGES):
        tile = u // kb
        k = u - tile * kb
        x = X.load([0, k * 128])
        xs = tl.load(XS + row * kb + k, mask=ok, other=0.0)
        acc = _add_unit(acc, x, xs, W, WS, tile, _first_row(tile, half_rows, half_tiles), k, kb)
        if (k == kb - 1) | (u == end - 1):
            slot = (worker * slots + tile - first).to(tl.int64) * M
            _store_tile(PARTIAL + (slot + row)[:, None] * 128, acc, ok)
            acc = tl.zeros((BM, 128), tl.float32)


@triton.jit
def _tile_gemm(
    X, XS, W, WS, OUT, OFFSETS, M, N, kb, units, workers, half_rows, half_tiles, w_rows, ws_size,
    BM: tl.constexpr, GROUPED: tl.constexpr, STAGES: tl.constexpr,
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
            u = tile * kb + k
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
    """How a weight [halves * half_rows, K] is cut into tiles, units and runs; `halves` is 2 for gate and up."""

    half_rows: int
    half_tiles: int
    kb: int
    units: int
    workers: int
    slots: int  # tiles that one run can touch
    runs: int  # runs that one tile can lie in


@functools.cache
def cut(num_rows: int, num_columns: int, halves: int) -> Cut:
    """The canonical cut of a weight [num_rows, num_columns]: a function of its shape alone."""
    half_tiles = -(-num_rows // halves // 128)
    kb = -(-num_columns // 128)
    units = halves * half_tiles * kb
    workers = min(WORKERS, units)
    slots = max(0, -(-units // workers) - 2) // kb + 2
    runs = kb * workers // units + 2
    return Cut(num_rows // halves, half_tiles, kb, units, workers, slots, runs)


def stream_gemm(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, c: Cut, *, prefetch_units: int
) -> Tensor:
    """Products of x e4m3 [M, K] with w e4m3 [N, K]: sums of runs, fp32 [workers * slots, M, 128]; M at most 64.

    x_scales fp32 [M, ceil(K / 128)]; w_scales fp32 [tiles, ceil(K / 128)]. All contiguous, K a multiple of 16.
    `prefetch_units` of each run are asked for before the predecessor has ended.
    """
    m, k = x.shape
    partial = torch.empty(c.workers * c.slots, m, 128, device=x.device)
    _stream_gemm[(c.workers,)](
        TensorDescriptor(x, list(x.shape), [k, 1], [STREAM_ROWS, 128]), x_scales,
        TensorDescriptor(w, list(w.shape), [k, 1], [128, 128]), w_scales, partial, w, m, k, c.kb,
        c.units, c.workers, c.slots, c.half_rows, c.half_tiles, STREAM_ROWS, prefetch_units, 5,
        num_warps=4, num_stages=5, launch_pdl=True,
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
        num_rows, c.kb, c.units, c.workers, c.half_rows, c.half_tiles, num_rows,
        w_scales.shape[-2] * c.kb, block, grouped, 4, num_warps=4 if block == 64 else 8,
        num_stages=4,
    )  # fmt: skip
