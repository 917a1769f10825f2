"""FP8 matrix products with 1x128 activation scales and 128x128 weight scales, for few and for many rows.

One canonical order of accumulation. A weight matrix is cut into tiles of 128 rows, two of them a group (gate and up
of the same columns, else neighbours); a group needs K / 128 units. As many rounds of groups as there are for all
workers stay whole; each of the rest is split along K into equal parts, one per worker. Within a part a tile's products
of 128 columns are added in order, in fp32, each after scaling; the parts' sums are added in order. The cut depends on
the weight's shape alone, so a row's bits depend on neither the number of rows nor the kernel:

- few rows are bound by reading the weights (stream_hopper): every SM reads about the same number of bytes, and few
  sums of parts pass through memory;
- `tile_gemm` (many rows, or many experts) computes whole tiles and keeps the same cuts in registers.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

WORKERS = 132  # SMs of an H100 or H200; on any other card the order stays this one


@triton.jit
def _first_row(tile, half_rows, half_tiles):
    """First weight row of a tile: gate and up (or the only half, of a down projection) are cut apart."""
    return tile // half_tiles * half_rows + tile % half_tiles * 128


@triton.jit
def _add_unit(acc, x, xs, W, WS, tile, n0, k, kb):
    """acc [BM, 128] fp32 plus one scaled unit: x [BM, 128] times the 128 weight rows from n0 on, columns 128 k on."""
    w = W.load([n0, k * 128]).T
    scale = xs * tl.load(WS + tile * kb + k)
    return tl.fma(tl.dot(x, w), tl.broadcast_to(scale[:, None], acc.shape), acc)


@triton.jit
def _tile_gemm(
    X, XS, W, WS, OUT, OFFSETS, M, N, kb, half_rows, half_tiles, step, groups, whole, splits,
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
        parts = tl.where(tile // step % groups < whole, 1, splits)
        total = tl.zeros((BM, 128), tl.float32)
        acc = tl.zeros((BM, 128), tl.float32)
        for k in tl.range(0, kb, num_stages=STAGES):
            x = X.load([m0, k * 128])
            xs = tl.load(XS + row * kb + k, mask=ok, other=0.0)
            acc = _add_unit(acc, x, xs, W, WS, tile, w0 + n0, k, kb)
            if ((k + 1) * parts - 1) // kb != ((k + 2) * parts - 1) // kb:  # the last of a part
                total += acc
                acc = tl.zeros((BM, 128), tl.float32)
        total += acc  # +0 when a part ended with the tile: changes no bit
        n = n0 + tl.arange(0, 128)
        n_end = (tile // half_tiles + 1) * half_rows
        at = row.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(OUT + at, total, mask=ok[:, None] & (n < n_end)[None, :])


@dataclass(frozen=True, slots=True)
class Cut:
    """How a weight [halves * half_rows, K] is cut into tiles, groups and parts; `halves` is 2 for gate and up."""

    half_rows: int
    half_tiles: int
    tiles: int
    kb: int  # units of a group
    step: int  # tiles from the first of a group to the first of the next
    groups: int
    whole: int  # groups that are not split, the first ones
    splits: int  # parts of each other group

    @property
    def stored(self) -> int:
        """Sums that can pass through memory, each of two tiles: of whole groups and of parts."""
        return self.whole + (self.groups - self.whole) * self.splits

    @property
    def workers(self) -> int:
        """Programs that have something to read."""
        return WORKERS if self.whole else self.stored


@functools.cache
def cut(num_rows: int, num_columns: int, halves: int) -> Cut:
    """The canonical cut of a weight [num_rows, num_columns]: a function of its shape alone."""
    half_rows = num_rows // halves
    half_tiles = -(-half_rows // 128)
    kb = -(-num_columns // 128)
    groups = half_tiles if halves == 2 else -(-half_tiles // 2)
    whole = groups // WORKERS * WORKERS
    splits = 1
    if rest := groups - whole:
        longest = -(-kb // min(kb, WORKERS // rest))
        splits = -(-kb // longest)  # no more parts than it takes for the longest one
    step = 3 - halves
    return Cut(half_rows, half_tiles, halves * half_tiles, kb, step, groups, whole, splits)


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
    grid = (c.tiles, triton.cdiv(rows, block), w.shape[0] if grouped else 1)
    flat = w.view(-1, k)
    _tile_gemm[grid](
        TensorDescriptor(x, list(x.shape), [k, 1], [block, 128]), x_scales,
        TensorDescriptor(flat, list(flat.shape), [k, 1], [128, 128]), w_scales, out, offsets, m,
        num_rows, c.kb, c.half_rows, c.half_tiles, c.step, c.groups, c.whole, c.splits, num_rows,
        w_scales.shape[-2] * c.kb, block, grouped, 4, num_warps=4 if block == 64 else 8,
        num_stages=4,
    )  # fmt: skip
