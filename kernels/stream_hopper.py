"""Few-row FP8 products for Hopper, in Gluon: one warp fetches, two warpgroups multiply.

Reading the weights is all the work, so their requests must never wait for arithmetic: a producer warp keeps a ring of
stages in shared memory full, from before its predecessor has ended. Every worker has its own weight rows over the whole
of K: nothing is split and added up through memory, at the price of reading x once per worker and item.

An item is a pair of weight tiles: gate and up of the same columns, or neighbours. A worker has BIG items of 2 x 128
rows, then small ones of 2 x N (stream.py shares them out). A stage holds 128 columns of a big item, or KU times 128 of
a small one. Rows of x are the 64 rows of a wgmma, or 128, one half per warpgroup; with 64, each warpgroup takes half
of both big tiles or one of the small ones. PARTS workers share a small item and divide the rows of x, so that less of x
is fetched for each weight. No choice changes a sum's order, which is ascending along K.

Shared memory feeds the products and takes what is fetched, and every cache line that a warp looks up takes a turn
there: a product reads x for both tiles, and a row's scales of a stage's blocks are one load (WIDE).
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

from kernels.hopper import barrier, load_block, tell
from kernels.hopper_epilogue import add_scaled, store_hidden
from kernels.hopper_scales import load_scales, product, products_of, scale_addresses

WORKERS = gl.constexpr(132)  # SMs of an H100 or H200


@gluon.jit
def _x_place(xs, ws, b, J: gl.constexpr, KU: gl.constexpr, BM: gl.constexpr, BIG: gl.constexpr):
    """Where block J of a stage of small items has its rows of x: the ring of big ones has room among the weights."""
    if not BIG:
        place = xs.index(b * KU + J)
    elif J == 0:
        place = xs.index(b).slice(0, BM, 0)
    else:
        place = ws.index(b).slice(128, BM, 0)
    return place


@gluon.jit
def _w_place(
    ws, b, J: gl.constexpr, FIRST: gl.constexpr, ROWS: gl.constexpr, KU: gl.constexpr,
    N: gl.constexpr, BIG: gl.constexpr,
):  # fmt: skip
    """ROWS weight rows from FIRST on of both tiles of block J of a stage of small items."""
    AT: gl.constexpr = J * 2 * N + FIRST if BIG else FIRST
    return ws.index(b if BIG else b * KU + J).slice(AT, ROWS, 0)


@gluon.jit
def _fetch_w(
    big_rows, small_rows, ready, ws, b, tile_row, k, sub_rows, KU: gl.constexpr, N: gl.constexpr,
    BIG: gl.constexpr, SMALL: gl.constexpr,
):  # fmt: skip
    """Ask for a stage's weights: two tiles of 128 rows, or of N for each of KU blocks of columns."""
    for s in gl.static_range(2):
        row = tile_row + s * sub_rows
        if SMALL:
            for j in gl.static_range(KU):
                place = _w_place(ws, b, j, s * N, N, KU, N, BIG)
                load_block(small_rows, [row, (k + j) * 128], ready, place)
        else:
            load_block(big_rows, [row, k * 128], ready, ws.index(b).slice(s * 128, 128, 0))


@gluon.jit
def _fetch_x(
    x_rows, ready, xs, ws, b, k, x_row, BLOCKS: gl.constexpr, XR: gl.constexpr, BM: gl.constexpr,
    KU: gl.constexpr, BIG: gl.constexpr,
):  # fmt: skip
    """Ask for a stage's rows of x, XR at a time: rows that there are not, in a block with others, take time."""
    for j in gl.static_range(BLOCKS):
        place = _x_place(xs, ws, b, j, KU, BM, BIG)
        for first in gl.static_range(0, XR if XR == 16 else BM, XR):
            load_block(x_rows, [x_row + first, (k + j) * 128], ready, place.slice(first, XR, 0))


_MOST_EARLY = gl.constexpr(2)  # stages; more are slower where products are short


@gluon.jit
def _produce(
    x_rows, big_rows, small_rows, kb, rounds, groups, first_row, sub_rows, small_sub, xs, ws, full, empty,
    worker, step: gl.constexpr, XR: gl.constexpr, BM: gl.constexpr, KU: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr, BIG: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Fetch all of a worker's units, the first weights before the predecessor has ended."""
    SM: gl.constexpr = BM // PARTS
    # with 16 rows of x, what stands in others is never stored
    BIG_BYTES: gl.constexpr = (XR if XR == 16 else BM) * 128 + 2 * 128 * 128
    BYTES: gl.constexpr = ((XR if XR == 16 else SM) + 2 * N) * 128 * KU
    early = gl.minimum(gl.minimum(gl.cdiv(kb, 1 if BIG else KU), STAGES), _MOST_EARLY)
    row = first_row + worker // PARTS * N * step
    if not BIG:
        early = gl.where(worker < groups, early, 0)
    for i in range(early):
        ready = full.index(i)
        if BIG:
            mbarrier.expect(ready, BIG_BYTES)
            first = worker * 128 * step
            _fetch_w(big_rows, small_rows, ready, ws, i, first, i, sub_rows, KU, N, BIG, False)
        else:
            mbarrier.expect(ready, BYTES)
            _fetch_w(big_rows, small_rows, ready, ws, i, row, i * KU, small_sub, KU, N, BIG, True)
    gdc_wait()
    i = worker * 0
    if BIG:
        for item in range(rounds):
            at = (item * WORKERS + worker) * 128 * step
            for k in range(kb):
                b = i % STAGES
                ready = full.index(b)
                if i >= early:
                    if i >= STAGES:
                        mbarrier.wait(empty.index(b), (i // STAGES + 1) & 1)
                    mbarrier.expect(ready, BIG_BYTES)
                    _fetch_w(big_rows, small_rows, ready, ws, b, at, k, sub_rows, KU, N, BIG, False)
                _fetch_x(x_rows, ready, xs, ws, b, k, 0, 1, XR, BM, KU, BIG)
                i += 1
    for group in range(worker, groups, WORKERS):
        row = first_row + group // PARTS * N * step
        for k in range(0, kb, KU):
            b = i % STAGES
            ready = full.index(b)
            if i >= early:
                if i >= STAGES:
                    mbarrier.wait(empty.index(b), (i // STAGES + 1) & 1)
                mbarrier.expect(ready, BYTES)
                _fetch_w(big_rows, small_rows, ready, ws, b, row, k, small_sub, KU, N, BIG, True)
            _fetch_x(x_rows, ready, xs, ws, b, k, group % PARTS * SM, KU, XR, SM, KU, BIG)
            i += 1


@gluon.jit
def _store(out, at, first, limit, acc, ok, column):
    """Store acc at columns first + column of a row, below the tile's limit."""
    c = first + column
    inside = ok[:, None] & (c < limit)[None, :]
    gl.store(out + at[:, None] + c[None, :], acc.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _big_items(
    x_scales, w_scales, out, out_stride, M, kb, rounds, sub_tiles, tiles, limit, q, q_scales, hidden, xs,
    ws, full, empty, peaks, met, worker, i, step: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr, SWIGLU: gl.constexpr, MIN: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Multiply a worker's big items, from stage i of the ring on; to q and q_scales after SwiGLU, or to out.

    A warpgroup has 64 rows of x and all columns of both tiles or, with 64 rows of x, half of the columns of both.
    """
    ROW: gl.constexpr = WG * 64 if BM == 128 else 0
    COLUMN: gl.constexpr = WG * 64 if BM == 64 else 0
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 32])
    row = ROW + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    ok = row < M
    zeros = gl.zeros([64, BM], gl.float32, ACC)
    for item in range(rounds):
        group = item * WORKERS + worker
        a0, a1 = zeros, zeros
        tile = group * step
        at = scale_addresses(
            x_scales, w_scales, row, M, kb, gl.minimum(tile, tiles - 1),
            gl.minimum(tile + sub_tiles, tiles - 1),
        )  # fmt: skip
        x_scale, w_scale, w_scale2 = load_scales(at, 0, kb, 1, WIDE)
        for k in range(kb):
            b = i % STAGES
            scale, scale2 = product(x_scale[0], w_scale[0]), product(x_scale[0], w_scale2[0])
            # The next unit's scales are asked for before this unit is waited for.
            x_scale, w_scale, w_scale2 = load_scales(at, k + 1, kb, 1, WIDE)
            mbarrier.wait(full.index(b), i // STAGES & 1)
            i += 1
            x = xs.index(b)
            if BM == 128:
                x = x.slice(ROW, 64, 0)
            w = ws.index(b).slice(COLUMN, BM, 0).permute((1, 0))
            w2 = ws.index(b).slice(128 + COLUMN, BM, 0).permute((1, 0))
            p0 = warpgroup_mma(x, w, zeros, use_acc=False, is_async=True)
            if BM == 64:
                p1 = warpgroup_mma(x, w2, zeros, use_acc=False, is_async=True)
                p0 = warpgroup_mma_wait(1, deps=(p0,))
                a0 = add_scaled(p0, scale[:, None], a0)
            else:  # the other warpgroup's products run while this one scales
                p0 = warpgroup_mma_wait(0, deps=(p0,))
                a0 = add_scaled(p0, scale[:, None], a0)
                p1 = warpgroup_mma(x, w2, p0, use_acc=False, is_async=True)
            p1 = warpgroup_mma_wait(0, deps=(p1,))
            tell(empty.index(b))
            a1 = add_scaled(p1, scale2[:, None], a1)
        if SWIGLU:
            store_hidden(
                a0, a1, q, q_scales, hidden, sub_tiles, group, item, row, ok, peaks, met, ACC, WG, BM, MIN
            )  # fmt: skip
        else:
            at = row.to(gl.int64) * out_stride
            column = COLUMN + gl.arange(0, BM, gl.SliceLayout(0, ACC))
            _store(out, at, group * 256, limit, a0, ok, column)
            _store(out, at, group * 256 + 128, limit, a1, ok, column)
    return i


@gluon.jit
def _small_product(
    xs, ws, b, zeros, J: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr, KU: gl.constexpr,
    N: gl.constexpr, BIG: gl.constexpr,
):  # fmt: skip
    """Start the product of block J of a stage: with 64 rows one tile of the pair, with 128 both at once."""
    x = _x_place(xs, ws, b, J, KU, BM, BIG)
    if BM == 128:  # a product with both reads x from shared memory once
        x = x.slice(WG * 64, 64, 0)
        w = _w_place(ws, b, J, 0, 2 * N, KU, N, BIG)
    else:
        w = _w_place(ws, b, J, WG * N, N, KU, N, BIG)
    return warpgroup_mma(x, w.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _small_items(
    x_scales, w_scales, out, out_stride, out_sub, M, kb, groups, first_row, small_sub, sub_tiles, tiles,
    limit, xs, ws, full, empty, worker, i, step: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr,
    KU: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, BIG: gl.constexpr, PARTS: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    """Multiply a worker's small items, from stage i of the ring on, to out."""
    C: gl.constexpr = N * BM // 64
    ROW: gl.constexpr = WG * 64 if BM == 128 else 0
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 32])
    column = gl.arange(0, C, gl.SliceLayout(0, ACC)) + (WG * N if BM == 64 else 0)
    second = column >= N  # of the pair's tiles
    to_row = first_row
    limit2 = limit
    if step == 1:  # out has the rest alone, gate and up each
        to_row = worker * 0
        limit2 = limit + out_sub
        column = gl.where(second, column - N + out_sub, column)
    zeros = gl.zeros([64, C], gl.float32, ACC)
    for group in range(worker, groups, WORKERS):
        a = zeros
        row = ROW + group % PARTS * BM + gl.arange(0, 64, gl.SliceLayout(1, ACC))
        w_row = group // PARTS * N * step
        tile = (first_row + w_row) // 128
        tile2 = tile + sub_tiles
        if step == 2:
            tile2 = gl.minimum((first_row + w_row + small_sub) // 128, tiles - 1)
        at = scale_addresses(x_scales, w_scales, row, M, kb, tile, tile2)
        x_scale, w_scale, w_scale2 = load_scales(at, 0, kb, KU, WIDE)
        for k in range(0, kb, KU):
            b = i % STAGES
            scales, scales2 = products_of(x_scale, w_scale), products_of(x_scale, w_scale2)
            # The next stage's scales are asked for before this one is waited for.
            x_scale, w_scale, w_scale2 = load_scales(at, k + KU, kb, KU, WIDE)
            mbarrier.wait(full.index(b), i // STAGES & 1)
            i += 1
            products = (_small_product(xs, ws, b, zeros, 0, WG, BM, KU, N, BIG),)
            for j in gl.static_range(1, KU):
                products += (_small_product(xs, ws, b, zeros, j, WG, BM, KU, N, BIG),)  # type: ignore[assignment]
            for j in gl.static_range(KU):
                p = warpgroup_mma_wait(KU - 1 - j, deps=(products[j],))
                if j == KU - 1:
                    tell(empty.index(b))
                scale = gl.where(second[None, :], scales2[j][:, None], scales[j][:, None])
                a = add_scaled(p, scale, a)
        to = row.to(gl.int64) * out_stride
        _store(out, to, to_row + w_row, gl.where(second, limit2, limit), a, row < M, column)


@gluon.jit
def _consume(
    x_scales, w_scales, out, out_stride, out_sub, M, kb, rounds, groups, first_row, small_sub, sub_tiles,
    tiles, limit, q, q_scales, hidden, xs, ws, full, empty, peaks, met, worker, step: gl.constexpr,
    WG: gl.constexpr, BM: gl.constexpr, KU: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    BIG: gl.constexpr, PARTS: gl.constexpr, SWIGLU: gl.constexpr, MIN: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    gdc_wait()
    i = worker * 0
    if BIG:
        i = _big_items(
            x_scales, w_scales, out, out_stride, M, kb, rounds, sub_tiles, tiles, limit, q, q_scales,
            hidden, xs, ws, full, empty, peaks, met, worker, i, step, WG, BM, STAGES, SWIGLU, MIN, WIDE,
        )  # fmt: skip
    _small_items(
        x_scales, w_scales, out, out_stride, out_sub, M, kb, groups, first_row, small_sub, sub_tiles,
        tiles, limit, xs, ws, full, empty, worker, i, step, WG, BM // PARTS, KU, N, STAGES, BIG, PARTS, WIDE,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "kb", "groups", "sub_tiles", "tiles"])
def stream_units(
    x_rows, x_scales, big_rows, small_rows, w_scales, out, out_stride, out_sub, M, kb, rounds, groups,
    first_row, sub_rows, small_sub, sub_tiles, tiles, limit, q, q_scales, hidden, STEP: gl.constexpr,
    XR: gl.constexpr, BM: gl.constexpr, KU: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, BIG: gl.constexpr, PARTS: gl.constexpr, SWIGLU: gl.constexpr, MIN: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    """Products of x [M, K] with the rows of w; x_rows, big_rows, small_rows: descriptors of blocks of x and w.

    Groups are numbered along the first tile of the pair (STEP 1: gate, the second is sub_rows further) or along both
    (STEP 2). Small items start at first_row; their sums go to out, row r's at r * out_stride, the second tile's out_sub
    further. Big items go to q and q_scales (SWIGLU) or, as there are no small ones before them, to out. WIDE: scales
    may be loaded 16 bytes at a time.
    """
    worker = gl.program_id(0)
    gdc_launch_dependents()
    SLOTS: gl.constexpr = STAGES if BIG else STAGES * KU
    WR: gl.constexpr = 128 if BIG else N
    MR: gl.constexpr = BM if BIG else BM // PARTS
    xs = gl.allocate_shared_memory(gl.float8e4nv, [SLOTS, MR, 128], x_rows.layout)
    ws = gl.allocate_shared_memory(gl.float8e4nv, [SLOTS, 2 * WR, 128], small_rows.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    met = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    peaks = gl.allocate_shared_memory(gl.int32, [4, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(met, count=2)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_consume, (
                x_scales, w_scales, out, out_stride, out_sub, M, kb, rounds, groups, first_row, small_sub,
                sub_tiles, tiles, limit, q, q_scales, hidden, xs, ws, full, empty, peaks, met, worker,
                STEP, 0, BM, KU, N, STAGES, BIG, PARTS, SWIGLU, MIN, WIDE)),
            (_consume, (
                x_scales, w_scales, out, out_stride, out_sub, M, kb, rounds, groups, first_row, small_sub,
                sub_tiles, tiles, limit, q, q_scales, hidden, xs, ws, full, empty, peaks, met, worker,
                STEP, 1, BM, KU, N, STAGES, BIG, PARTS, SWIGLU, MIN, WIDE)),
            (_produce, (
                x_rows, big_rows, small_rows, kb, rounds, groups, first_row, sub_rows, small_sub, xs, ws,
                full, empty, worker, STEP, XR, BM, KU, N, STAGES, BIG, PARTS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
