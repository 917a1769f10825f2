"""FP8 matrix products with 1x128 activation scales and 128x128 weight scales, for few and for many rows.

A row's product with a weight row is added up in ascending blocks of 128 columns, in fp32, each block after scaling. The
kernels for few rows (stream_*_hopper) have the same order: a row's bits depend on neither their number nor the kernel.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


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


@triton.jit(do_not_specialize=["M"])
def _tile_gemm(
    X, XS, W, WS, OUT, GROUPS, M, N, kb, half_rows, half_tiles,
    w_rows, ws_size, BM: tl.constexpr, GROUPED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """OUT [M, N]: one program per 128 weight rows, BM rows and, if grouped, group (weights, first row, row behind)."""
    tile = tl.program_id(0)
    first_row, last_row, w0 = 0, M, 0
    if GROUPED:
        group = GROUPS + tl.program_id(2) * 3
        e = tl.load(group)
        first_row = tl.load(group + 1)
        last_row = tl.load(group + 2)
        w0 = e * w_rows
        WS += e * ws_size
    m0 = first_row + tl.program_id(1) * BM
    if m0 < last_row:
        row = m0 + tl.arange(0, BM)
        ok = row < last_row
        n0 = _first_row(tile, half_rows, half_tiles)
        acc = tl.zeros((BM, 128), tl.float32)
        for k in tl.range(0, kb, num_stages=STAGES):
            x = X.load([m0, k * 128])
            xs = tl.load(XS + row * kb + k, mask=ok, other=0.0)
            acc = _add_unit(acc, x, xs, W, WS, tile, w0 + n0, k, kb)
        n = n0 + tl.arange(0, 128)
        n_end = (tile // half_tiles + 1) * half_rows
        at = row.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(OUT + at, acc, mask=ok[:, None] & (n < n_end)[None, :])


def tile_gemm(
    x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, out: Tensor, halves: int,
    groups: Tensor | None = None, max_rows: int | None = None,
) -> None:  # fmt: skip
    """out [M, N] = x e4m3 [M, K] times w e4m3 [N, K], in ascending blocks of 128 columns; out fp32 or bf16.

    Grouped when `groups` int32 [G, 3] is given, each (e, first row, row behind): w [E, N, K] and w_scales [E, tiles,
    ceil(K / 128)] of expert e are for these rows, at most `max_rows` of them.
    """
    m, k = x.shape
    rows = m if max_rows is None else max_rows
    block = 64 if rows <= 64 else 128
    num_rows = w.shape[-2]
    half_rows, kb = num_rows // halves, triton.cdiv(k, 128)
    half_tiles = triton.cdiv(half_rows, 128)
    grid = (halves * half_tiles, triton.cdiv(rows, block), 1 if groups is None else len(groups))
    flat = w.view(-1, k)
    _tile_gemm[grid](
        TensorDescriptor(x, list(x.shape), [k, 1], [block, 128]), x_scales,
        TensorDescriptor(flat, list(flat.shape), [k, 1], [128, 128]), w_scales, out, groups, m,
        num_rows, kb, half_rows, half_tiles, num_rows,
        w_scales.shape[-2] * kb, block, groups is not None, 4, num_warps=4 if block == 64 else 8,
        num_stages=4,
    )  # fmt: skip
