"""Few-row FP8 products for Hopper, in Gluon, where items are small: one warp fetches, one warpgroup multiplies.

An item is a pair of weight tiles of N rows, gate and up of the same columns or neighbours; a stage of the ring holds KU
blocks of 128 columns of both and of x. With few rows an H200 brings weights faster than they were multiplied, so:

- up to 32 rows of x are the columns of a product, whose 64 rows are weights. Were x its rows, of which there are 64 in
  any product, most of what it reads from shared memory would be none. 64 rows of x are its rows, both tiles its
  columns.
- scales lie in shared memory, of 16 blocks at a time, each a row's times a tile's. The next 16, or the next item's, are
  asked for meanwhile, and those of a worker's first weights before the predecessor has ended.
- weights asked for before the predecessor has ended are asked for in turn, about as fast as memory gives them.
- gate and up become SwiGLU's numbers in registers, half as many to be stored and read again to be quantised.

No choice changes a sum's order, which is ascending along K.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.hopper import barrier, tell, view
from kernels.hopper_epilogue import add_scaled, row_places, store_wide, swiglu
from kernels.stream_fetch_hopper import WORKERS, fetch_early, fetch_items, next_stage

CHUNK = gl.constexpr(16)  # blocks whose scales lie in shared memory together


@gluon.jit
def _fetch(
    x_rows, w_rows, kb, groups, second, xs, ws, full, empty, worker, STEP: gl.constexpr, KU: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """Fetch all of a worker's items, the first weights before the predecessor has ended."""
    N: gl.constexpr = w_rows.block_shape[0]
    T: gl.constexpr = xs.shape[1]
    BYTES: gl.constexpr = (T + 2 * N) * 128 * KU
    early = fetch_early(
        w_rows, kb, second, ws, full, worker, STEP, BYTES, N, KU, min(STAGES, EARLY), PARTS
    )
    gdc_wait()
    gdc_launch_dependents()  # not before: stream_hidden_hopper's programs take x to be there
    fetch_items(
        x_rows, w_rows, kb, groups, second, xs, ws, full, empty, worker, early, STEP, BYTES, N, KU, STAGES, PARTS
    )  # fmt: skip


@gluon.jit
def _row_chunk(at, block, kb):
    """Scales of rows of x [blocks, rows], zero behind K."""
    return gl.load(at + block[:, None], mask=(block < kb)[:, None], other=0.0)


@gluon.jit
def _tile_chunks(w_scales, row, second, sub_tiles, tiles, block, kb, STEP: gl.constexpr):
    """Scales [blocks] of both tiles of the item whose first begins at `row`, zero behind K."""
    tile = row // 128
    tile2 = tile + sub_tiles
    if STEP == 2:
        tile2 = gl.minimum((row + second) // 128, tiles - 1)
    ok = block < kb
    w = gl.load(w_scales + tile * kb + block, mask=ok, other=0.0)
    w2 = gl.load(w_scales + tile2 * kb + block, mask=ok, other=0.0)
    return w, w2


@gluon.jit
def _product(xs, ws, at, zeros, TURNED: gl.constexpr):
    """Start the product of a block of columns: [64 rows of weights, rows of x] or [64 rows of x, both tiles]."""
    x, w = xs.index(at), ws.index(at)
    if TURNED:
        p = warpgroup_mma(w, x.permute((1, 0)), zeros, use_acc=False, is_async=True)
    else:
        p = warpgroup_mma(x, w.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return p


@gluon.jit
def _apart(value, N: gl.constexpr):
    """Gate and up [rows of x, N] of an item's sums [64, rows of x], where they are rows of different warps."""
    T: gl.constexpr = value.shape[1]
    FOLD: gl.constexpr = 64 // N  # gate, up, and what is never stored
    EACH: gl.constexpr = min(4, N * T // 128)
    APART: gl.constexpr = gl.BlockedLayout(
        [1, EACH, FOLD], [32 * EACH // N, N // EACH, 1], [4, 1, 1], [2, 1, 0]
    )
    parts = gl.permute(gl.reshape(value, [FOLD, N, T]), (2, 1, 0))
    parts = gl.convert_layout(parts, APART)
    if FOLD == 2:
        gate, up = gl.split(parts)
    else:
        evens, odds = gl.split(gl.reshape(parts, [T, N, 2, 2]))
        gate, _ = gl.split(evens)
        up, _ = gl.split(odds)
    return gate, up


@gluon.jit
def _store_swiglu(
    value, out, out_stride, first, stored, w_row, limit, N: gl.constexpr, TURNED: gl.constexpr
):
    """Store SwiGLU of an item's sums: from row `first` of x on, below `stored`; columns below `limit`."""
    if TURNED:
        gate, up = _apart(value, N)
    else:
        gate, up = gl.split(gl.permute(gl.reshape(value, [64, 2, N]), (0, 2, 1)))
    h = swiglu(gate, up)
    row = first + gl.arange(0, h.shape[0], gl.SliceLayout(1, h.type.layout))
    column = w_row + gl.arange(0, N, gl.SliceLayout(0, h.type.layout))
    ok = (row < stored)[:, None] & (column < limit)[None, :]
    gl.store(out + row[:, None] * out_stride + column[None, :], h, mask=ok)


@gluon.jit
def _store(
    value, out, out_stride, first, stored, w_row, limit, places, N: gl.constexpr, TURNED: gl.constexpr,
    PLACED: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """Store an item's sums, of neighbours: from row `first` of x on, below `stored`; columns below `limit`."""
    if TURNED:  # few rows are stored soon enough
        line = gl.arange(0, 64, gl.SliceLayout(1, ACC))
        row = first + gl.arange(0, value.shape[1], gl.SliceLayout(0, ACC))
        ok = row < stored
        inside = (line < 2 * N) & (w_row + line < limit)
        to = row_places(out, out_stride, places, row, ok, PLACED)
        gl.store(
            out + to[None, :] + (w_row + line)[:, None], value, mask=inside[:, None] & ok[None, :]
        )
    else:
        store_wide(value, out, out_stride, first, stored, w_row, limit, places, PLACED)


@gluon.jit
def _multiply(
    x_scales, w_scales, out, out_stride, M, kb, groups, second, sub_tiles, tiles, limit, xs, ws,
    full, empty, scales, worker, places, STEP: gl.constexpr, KU: gl.constexpr, N: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, PLACED: gl.constexpr,
):  # fmt: skip
    """Multiply all of a worker's items."""
    T: gl.constexpr = xs.shape[1]
    TURNED: gl.constexpr = T < 64
    C: gl.constexpr = T if TURNED else 2 * N
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 32])
    ROWS: gl.constexpr = gl.SliceLayout(0 if TURNED else 1, ACC)  # of x
    WEIGHTS: gl.constexpr = gl.SliceLayout(1 if TURNED else 0, ACC)
    LOAD: gl.constexpr = gl.BlockedLayout([4, 1], [4, 8], [1, 4], [0, 1])
    by_block = view(scales, gl.float32, [2 * CHUNK, T], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    block = gl.arange(0, CHUNK, gl.SliceLayout(1, LOAD))
    is_second = gl.arange(0, 64 if TURNED else C, WEIGHTS) >= N
    first = worker % PARTS * T
    w, w2 = _tile_chunks(
        w_scales, worker // PARTS * N * STEP, second, sub_tiles, tiles, block, kb, STEP
    )
    gdc_wait()
    row = first + gl.arange(0, T, gl.SliceLayout(0, LOAD))
    x_at = x_scales + (gl.minimum(row, M - 1) * kb)[None, :]
    x = _row_chunk(x_at, block, kb)
    stored = M
    if PLACED:
        stored = gl.minimum(M, gl.load(places).to(gl.int32))
    zeros = gl.zeros([64, C], gl.float32, ACC)
    b, phase = worker * 0, worker * 0
    for group in range(worker, groups, WORKERS):
        a = zeros
        for k in range(0, kb, KU):
            at = k % CHUNK
            if at == 0:
                barrier()
                scales.index(0).store(x * w[:, None])
                scales.index(1).store(x * w2[:, None])
                barrier()
                more = k + CHUNK < kb
                item = gl.where(more, group, gl.minimum(group + WORKERS, groups - 1))
                ahead = block + gl.where(more, k + CHUNK, 0)
                x = _row_chunk(x_at, ahead, kb)
                w, w2 = _tile_chunks(
                    w_scales, item // PARTS * N * STEP, second, sub_tiles, tiles, ahead, kb, STEP
                )
            mbarrier.wait(full.index(b), phase)
            products = (_product(xs, ws, b * KU, zeros, TURNED),)
            for j in gl.static_range(1, KU):
                products += (_product(xs, ws, b * KU + j, zeros, TURNED),)  # type: ignore[assignment]
            one, two = (by_block.index(at).load(ROWS),), (by_block.index(at + CHUNK).load(ROWS),)
            for j in gl.static_range(1, KU):
                one += (by_block.index(at + j).load(ROWS),)  # type: ignore[assignment]
                two += (by_block.index(at + CHUNK + j).load(ROWS),)  # type: ignore[assignment]
            for j in gl.static_range(KU):
                p = warpgroup_mma_wait(KU - 1 - j, deps=(products[j],))
                if j == KU - 1:
                    tell(empty.index(b))
                if TURNED:
                    scale = gl.where(is_second[:, None], two[j][None, :], one[j][None, :])
                else:
                    scale = gl.where(is_second[None, :], two[j][:, None], one[j][:, None])
                a = add_scaled(p, scale, a)
            b, phase = next_stage(b, phase, STAGES)
        w_row = group // PARTS * N * STEP
        if STEP == 1:
            _store_swiglu(a, out, out_stride, first, stored, w_row, limit, N, TURNED)
        else:
            _store(
                a.to(out.dtype.element_ty), out, out_stride, first, stored, w_row, limit, places, N, TURNED,
                PLACED, ACC,
            )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "kb", "groups", "sub_tiles", "tiles"])
def stream_rows(
    x_rows, x_scales, w_rows, w_scales, out, out_stride, M, kb, groups, second, sub_tiles, tiles,
    limit, places, STEP: gl.constexpr, T: gl.constexpr, KU: gl.constexpr, STAGES: gl.constexpr,
    PARTS: gl.constexpr, EARLY: gl.constexpr, PLACED: gl.constexpr,
):  # fmt: skip
    """Products of x [M, K] with the rows of w; x_rows, w_rows: descriptors of blocks of x and of N rows of w.

    Items are numbered along the first tile of the pair, gate (STEP 1: up is `second` rows further, out is SwiGLU of
    both), or along both, neighbours (STEP 2). An item is that of PARTS workers, each with T rows of x: 16, 32 or 64.
    Row r's begin at r * out_stride of out; none of its columns reaches `limit`. EARLY stages are asked for before the
    predecessor has ended. PLACED: the first places[0] rows go where `stage.stage` noted it in `places`, and others
    nowhere.
    """
    N: gl.constexpr = w_rows.block_shape[0]
    worker = gl.program_id(0)
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KU, T, 128], x_rows.layout)
    # beside x's columns weights are the 64 rows of a product; what stands in those that there are not is never stored
    ws = gl.allocate_shared_memory(
        gl.float8e4nv, [STAGES * KU, 64 if T < 64 else 2 * N, 128], w_rows.layout
    )
    scales = gl.allocate_shared_memory(
        gl.float32, [2, CHUNK, T], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_multiply, (
                x_scales, w_scales, out, out_stride, M, kb, groups, second, sub_tiles, tiles, limit, xs, ws, full,
                empty, scales, worker, places, STEP, KU, N, STAGES, PARTS, PLACED)),
            (_fetch, (
                x_rows, w_rows, kb, groups, second, xs, ws, full, empty, worker, STEP, KU, STAGES, PARTS, EARLY)),
        ],
        [1],
        [24],
    )  # fmt: skip
