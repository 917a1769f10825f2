"""Few-row FP8 products for Hopper, in Gluon: one warp fetches, two warpgroups multiply.

Reading the weights is all the work, so their requests must never wait for arithmetic: a producer warp keeps a ring of
stages in shared memory full, from before its predecessor has ended. Every worker has its own weight rows over the whole
of K: nothing is split and added up through memory, at the price of reading x once per worker and item.

An item is a pair of weight tiles: gate and up of the same columns, or neighbours. A worker has BIG items of 2 x 128
rows, then small ones of 2 x N (stream.py shares them out). A stage holds 128 columns of a big item, or KU times 128 of
a small one. Rows of x are the 64 rows of a wgmma, or 128, one half per warpgroup; with 64, each warpgroup takes half of
both big tiles or one of the small ones. Neither choice changes a sum's order, which is ascending along K.
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

WORKERS = gl.constexpr(132)  # SMs of an H100 or H200


@gluon.jit
def _fetch_w(
    big_rows, small_rows, ready, ws, b, tile_row, k, sub_rows, KU: gl.constexpr, N: gl.constexpr,
    BIG: gl.constexpr, SMALL: gl.constexpr,
):  # fmt: skip
    """Ask for a stage's weights: two tiles of 128 rows, or of N for each of KU blocks of columns."""
    for s in gl.static_range(2):
        if SMALL:
            for j in gl.static_range(KU):
                place = ws.index((b * KU + j) * 2 + s)
                if BIG:
                    place = place.slice(0, N, 0)
                load_block(small_rows, [tile_row + s * sub_rows, (k + j) * 128], ready, place)
        else:
            load_block(big_rows, [tile_row + s * sub_rows, k * 128], ready, ws.index(b * 2 + s))


@gluon.jit
def _fetch_x(x_rows, ready, xs, b, k, KU: gl.constexpr, BM: gl.constexpr, XR: gl.constexpr):
    for j in gl.static_range(KU):
        place = xs.index(b * KU + j)
        if XR < BM:  # what stands in the other rows is never stored
            place = place.slice(0, XR, 0)
        load_block(x_rows, [0, (k + j) * 128], ready, place)


@gluon.jit
def _produce(
    x_rows, big_rows, small_rows, kb, rounds, groups, first_row, sub_rows, small_sub, xs, ws, full, empty,
    worker, step: gl.constexpr, XR: gl.constexpr, BM: gl.constexpr, KU: gl.constexpr,
    N: gl.constexpr, STAGES: gl.constexpr, BIG: gl.constexpr,
):  # fmt: skip
    """Fetch all of a worker's units, the first weights before the predecessor has ended."""
    X: gl.constexpr = XR * 128 * KU
    BIG_BYTES: gl.constexpr = X + 2 * 128 * 128
    BYTES: gl.constexpr = X + 2 * N * 128 * KU
    early = gl.minimum(gl.cdiv(kb, KU), STAGES)
    row = first_row + worker * N * step
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
            big_row = (item * WORKERS + worker) * 128 * step
            for k in range(kb):
                b = i % STAGES
                ready = full.index(b)
                if i >= early:
                    if i >= STAGES:
                        mbarrier.wait(empty.index(b), (i // STAGES + 1) & 1)
                    mbarrier.expect(ready, BIG_BYTES)
                    _fetch_w(
                        big_rows, small_rows, ready, ws, b, big_row, k, sub_rows, KU, N, BIG, False
                    )
                _fetch_x(x_rows, ready, xs, b, k, KU, BM, XR)
                i += 1
    for group in range(worker, groups, WORKERS):
        row = first_row + group * N * step
        for k in range(0, kb, KU):
            b = i % STAGES
            ready = full.index(b)
            if i >= early:
                if i >= STAGES:
                    mbarrier.wait(empty.index(b), (i // STAGES + 1) & 1)
                mbarrier.expect(ready, BYTES)
                _fetch_w(big_rows, small_rows, ready, ws, b, row, k, small_sub, KU, N, BIG, True)
            _fetch_x(x_rows, ready, xs, b, k, KU, BM, XR)
            i += 1


@gluon.jit
def _multiply(x, ws, b, out, CHUNK: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr):
    """Start the product with this warpgroup's CHUNK of 64 rows of a big item, into out's registers."""
    SUB: gl.constexpr = CHUNK if BM == 64 else CHUNK // 2
    FIRST: gl.constexpr = 64 * (WG if BM == 64 else CHUNK % 2)
    w = ws.index(b * 2 + SUB).slice(FIRST, 64, 0)
    return warpgroup_mma(x, w.permute((1, 0)), out, use_acc=False, is_async=True)


@gluon.jit
def _store(out, at, sub, first, limit, acc, ok, N: gl.constexpr, ACC: gl.constexpr):
    """Store acc [64, N] at columns first .. first + N of tile `sub` of a row, below the tile's limit."""
    column = first + gl.arange(0, N, gl.SliceLayout(0, ACC))
    inside = ok[:, None] & (column < limit)[None, :]
    gl.store(out + at[:, None] + sub + column[None, :], acc.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _big_items(
    x_scales, w_scales, out, out_stride, M, kb, rounds, sub_tiles, tiles, limit, q, q_scales, hidden, xs,
    ws, full, empty, peaks, met, worker, i, step: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr, SWIGLU: gl.constexpr, MIN: gl.constexpr,
):  # fmt: skip
    """Multiply a worker's big items, from stage i of the ring on; to q and q_scales after SwiGLU, or to out."""
    ROW: gl.constexpr = WG * 64 if BM == 128 else 0
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    row = ROW + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    ok = row < M
    zeros = gl.zeros([64, 64], gl.float32, ACC)
    for item in range(rounds):
        group = item * WORKERS + worker
        a0, a1, a2, a3 = zeros, zeros, zeros, zeros
        tile = group * step
        w_at = w_scales + gl.minimum(tile, tiles - 1) * kb
        w_at2 = w_scales + gl.minimum(tile + sub_tiles, tiles - 1) * kb
        x_scale = gl.load(x_scales + row * kb, mask=ok, other=0.0)
        w_scale, w_scale2 = gl.load(w_at), gl.load(w_at2)
        for k in range(kb):
            b = i % STAGES
            scale, scale2 = x_scale * w_scale, x_scale * w_scale2
            # The next unit's scales are asked for before this unit is waited for.
            ahead = gl.minimum(k + 1, kb - 1)
            x_scale = gl.load(x_scales + row * kb + ahead, mask=ok, other=0.0)
            w_scale, w_scale2 = gl.load(w_at + ahead), gl.load(w_at2 + ahead)
            mbarrier.wait(full.index(b), i // STAGES & 1)
            i += 1
            x = xs.index(b)
            if BM == 128:
                x = x.slice(ROW, 64, 0)
            p0 = _multiply(x, ws, b, zeros, 0, WG, BM)
            p1 = _multiply(x, ws, b, zeros, 1, WG, BM)
            p0 = warpgroup_mma_wait(1, deps=(p0,))
            a0 = add_scaled(p0, scale, a0)
            if BM == 64:
                p1 = warpgroup_mma_wait(0, deps=(p1,))
                tell(empty.index(b))
                a1 = add_scaled(p1, scale2, a1)
            else:
                p2 = _multiply(x, ws, b, p0, 2, WG, BM)
                p1 = warpgroup_mma_wait(1, deps=(p1,))
                a1 = add_scaled(p1, scale, a1)
                p3 = _multiply(x, ws, b, p1, 3, WG, BM)
                p2 = warpgroup_mma_wait(1, deps=(p2,))
                a2 = add_scaled(p2, scale2, a2)
                p3 = warpgroup_mma_wait(0, deps=(p3,))
                tell(empty.index(b))
                a3 = add_scaled(p3, scale2, a3)
        if SWIGLU:
            store_hidden(
                a0, a1, a2, a3, q, q_scales, hidden, sub_tiles, group, item, row, ok, peaks, met, ACC,
                WG, BM, MIN,
            )  # fmt: skip
        else:
            at = row.to(gl.int64) * out_stride
            first = group * 256
            if BM == 64:
                _store(out, at, 0, first + WG * 64, limit, a0, ok, 64, ACC)
                _store(out, at, 0, first + 128 + WG * 64, limit, a1, ok, 64, ACC)
            else:
                _store(out, at, 0, first, limit, a0, ok, 64, ACC)
                _store(out, at, 0, first + 64, limit, a1, ok, 64, ACC)
                _store(out, at, 0, first + 128, limit, a2, ok, 64, ACC)
                _store(out, at, 0, first + 192, limit, a3, ok, 64, ACC)
    return i


@gluon.jit
def _multiply_small(
    xs, ws, b, zeros, J: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr, KU: gl.constexpr,
    N: gl.constexpr, BIG: gl.constexpr,
):  # fmt: skip
    """Start product J of a stage: with 64 rows block J of columns, with 128 tile J % 2 of block J // 2."""
    SUB: gl.constexpr = WG if BM == 64 else J % 2
    BLOCK: gl.constexpr = J if BM == 64 else J // 2
    x = xs.index(b * KU + BLOCK)
    if BM == 128:
        x = x.slice(WG * 64, 64, 0)
    w = ws.index((b * KU + BLOCK) * 2 + SUB)
    if BIG:
        w = w.slice(0, N, 0)
    return warpgroup_mma(x, w.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _scales(x_scales, w_at, w_at2, row, ok, k, kb, J: gl.constexpr, BM: gl.constexpr):
    """Scales [64] of product J of the stage from block k on; beyond K they are 0, as is what is multiplied."""
    block = k + (J if BM == 64 else J // 2)
    there = block < kb
    block = gl.minimum(block, kb - 1)
    if J % 2 == 1 and BM == 128:
        w_at = w_at2
    w_scale = gl.load(w_at + block)
    x_scale = gl.load(x_scales + row * kb + block, mask=ok & there, other=0.0)
    return x_scale, w_scale


@gluon.jit
def _small_items(
    x_scales, w_scales, out, out_stride, out_sub, M, kb, groups, first_row, small_sub, sub_tiles, tiles,
    limit, xs, ws, full, empty, worker, i, step: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr,
    KU: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, BIG: gl.constexpr,
):  # fmt: skip
    """Multiply a worker's small items, from stage i of the ring on, to out."""
    PRODUCTS: gl.constexpr = KU * BM // 64
    ROW: gl.constexpr = WG * 64 if BM == 128 else 0
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 32])
    row = ROW + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    ok = row < M
    at = row.to(gl.int64) * out_stride
    zeros = gl.zeros([64, N], gl.float32, ACC)
    for group in range(worker, groups, WORKERS):
        a0, a1 = zeros, zeros
        w_row = first_row + group * N * step
        first = w_row
        tile = w_row // 128
        tile2 = tile + sub_tiles
        if step == 1:
            first = group * N  # out has the rest alone, gate and up each
        else:
            tile2 = gl.minimum((w_row + small_sub) // 128, tiles - 1)
        w_at = w_scales + tile * kb
        w_at2 = w_scales + tile2 * kb
        if BM == 64 and WG == 1:
            w_at = w_at2
        x0, w0 = _scales(x_scales, w_at, w_at2, row, ok, 0, kb, 0, BM)
        x1, w1, x2, w2, x3, w3 = x0, w0, x0, w0, x0, w0
        if PRODUCTS > 1:
            x1, w1 = _scales(x_scales, w_at, w_at2, row, ok, 0, kb, 1, BM)
        if PRODUCTS == 4:
            x2, w2 = _scales(x_scales, w_at, w_at2, row, ok, 0, kb, 2, BM)
            x3, w3 = _scales(x_scales, w_at, w_at2, row, ok, 0, kb, 3, BM)
        for k in range(0, kb, KU):
            b = i % STAGES
            s0, s1, s2, s3 = x0 * w0, x1 * w1, x2 * w2, x3 * w3
            # The next stage's scales are asked for before this one is waited for.
            x0, w0 = _scales(x_scales, w_at, w_at2, row, ok, k + KU, kb, 0, BM)
            if PRODUCTS > 1:
                x1, w1 = _scales(x_scales, w_at, w_at2, row, ok, k + KU, kb, 1, BM)
            if PRODUCTS == 4:
                x2, w2 = _scales(x_scales, w_at, w_at2, row, ok, k + KU, kb, 2, BM)
                x3, w3 = _scales(x_scales, w_at, w_at2, row, ok, k + KU, kb, 3, BM)
            mbarrier.wait(full.index(b), i // STAGES & 1)
            i += 1
            p0 = _multiply_small(xs, ws, b, zeros, 0, WG, BM, KU, N, BIG)
            if PRODUCTS == 1:
                p0 = warpgroup_mma_wait(0, deps=(p0,))
                tell(empty.index(b))
                a0 = add_scaled(p0, s0, a0)
            else:
                p1 = _multiply_small(xs, ws, b, zeros, 1, WG, BM, KU, N, BIG)
                if PRODUCTS == 2:
                    p0 = warpgroup_mma_wait(1, deps=(p0,))
                    a0 = add_scaled(p0, s0, a0)
                    p1 = warpgroup_mma_wait(0, deps=(p1,))
                    tell(empty.index(b))
                    if BM == 64:
                        a0 = add_scaled(p1, s1, a0)
                    else:
                        a1 = add_scaled(p1, s1, a1)
                else:
                    p2 = _multiply_small(xs, ws, b, zeros, 2, WG, BM, KU, N, BIG)
                    p3 = _multiply_small(xs, ws, b, zeros, 3, WG, BM, KU, N, BIG)
                    p0 = warpgroup_mma_wait(3, deps=(p0,))
                    a0 = add_scaled(p0, s0, a0)
                    p1 = warpgroup_mma_wait(2, deps=(p1,))
                    if BM == 64:
                        a0 = add_scaled(p1, s1, a0)
                    else:
                        a1 = add_scaled(p1, s1, a1)
                    p2 = warpgroup_mma_wait(1, deps=(p2,))
                    a0 = add_scaled(p2, s2, a0)
                    p3 = warpgroup_mma_wait(0, deps=(p3,))
                    tell(empty.index(b))
                    if BM == 64:
                        a0 = add_scaled(p3, s3, a0)
                    else:
                        a1 = add_scaled(p3, s3, a1)
        limit2 = limit  # of either half's rows, or of all rows
        if step == 2:
            limit2 = limit - out_sub
        if BM == 64:
            if WG == 0:
                _store(out, at, 0, first, limit, a0, ok, N, ACC)
            else:
                _store(out, at, out_sub, first, limit2, a0, ok, N, ACC)
        else:
            _store(out, at, 0, first, limit, a0, ok, N, ACC)
            _store(out, at, out_sub, first, limit2, a1, ok, N, ACC)


@gluon.jit
def _consume(
    x_scales, w_scales, out, out_stride, out_sub, M, kb, rounds, groups, first_row, small_sub, sub_tiles,
    tiles, limit, q, q_scales, hidden, xs, ws, full, empty, peaks, met, worker, step: gl.constexpr,
    WG: gl.constexpr, BM: gl.constexpr, KU: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    BIG: gl.constexpr, SWIGLU: gl.constexpr, MIN: gl.constexpr,
):  # fmt: skip
    gdc_wait()
    i = worker * 0
    if BIG:
        i = _big_items(
            x_scales, w_scales, out, out_stride, M, kb, rounds, sub_tiles, tiles, limit, q, q_scales,
            hidden, xs, ws, full, empty, peaks, met, worker, i, step, WG, BM, STAGES, SWIGLU, MIN,
        )  # fmt: skip
    _small_items(
        x_scales, w_scales, out, out_stride, out_sub, M, kb, groups, first_row, small_sub, sub_tiles,
        tiles, limit, xs, ws, full, empty, worker, i, step, WG, BM, KU, N, STAGES, BIG,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "kb", "groups", "sub_tiles", "tiles"])
def stream_units(
    x_rows, x_scales, big_rows, small_rows, w_scales, out, out_stride, out_sub, M, kb, rounds, groups,
    first_row, sub_rows, small_sub, sub_tiles, tiles, limit, q, q_scales, hidden, STEP: gl.constexpr,
    XR: gl.constexpr, BM: gl.constexpr, KU: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, BIG: gl.constexpr, SWIGLU: gl.constexpr, MIN: gl.constexpr,
):  # fmt: skip
    """Products of x [M, K] with the rows of w; x_rows, big_rows, small_rows: descriptors of blocks of x and w.

    Groups are numbered along the first tile of the pair (STEP 1: gate, the second is sub_rows further) or along both
    (STEP 2). Small items start at first_row; their sums go to out, row r's at r * out_stride, the second tile's out_sub
    further. Big items go to q and q_scales (SWIGLU) or, as there are no small ones before them, to out.
    """
    worker = gl.program_id(0)
    gdc_launch_dependents()
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KU, BM, 128], x_rows.layout)
    WR: gl.constexpr = 128 if BIG else N
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KU * 2, WR, 128], small_rows.layout)
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
                STEP, 0, BM, KU, N, STAGES, BIG, SWIGLU, MIN)),
            (_consume, (
                x_scales, w_scales, out, out_stride, out_sub, M, kb, rounds, groups, first_row, small_sub,
                sub_tiles, tiles, limit, q, q_scales, hidden, xs, ws, full, empty, peaks, met, worker,
                STEP, 1, BM, KU, N, STAGES, BIG, SWIGLU, MIN)),
            (_produce, (
                x_rows, big_rows, small_rows, kb, rounds, groups, first_row, sub_rows, small_sub, xs, ws,
                full, empty, worker, STEP, XR, BM, KU, N, STAGES, BIG)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
