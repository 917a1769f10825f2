"""Few-row FP8 products for Hopper, in Gluon: two warps fetch, two warpgroups multiply.

Reading the weights is all the work, so their requests must never wait for arithmetic or for x: a warp keeps a ring of
stages in shared memory full, from before its predecessor has ended, another a shorter ring of blocks of x. Every worker
has its own weight rows over the whole of K: nothing is split and added up through memory, at the price of reading x
once per worker and item, or once per two workers where they are a pair (PAIRED) and each fetches half for both.

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

from kernels import hopper
from kernels.hopper import barrier, load_block, view
from kernels.hopper_epilogue import add_scaled, store_hidden

WORKERS = gl.constexpr(132)  # SMs of an H100 or H200
# barriers, each followed by others of its kind: weights are there, their place is free; the same for x;
# then one for the warpgroups
_W_FULL, _W_FREE, _X_FULL, _X_FREE, _MET = (gl.constexpr(i) for i in (0, 32, 64, 72, 80))
_X_BLOCK = hopper.first_descriptor("stream_units")


@gluon.jit
def _fetch_w(
    big_rows, small_rows, kb, rounds, groups, first_row, sub_rows, small_sub, ws, bars, worker, cta,
    step: gl.constexpr, KU: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, BIG: gl.constexpr,
    PAIRED: gl.constexpr,
):  # fmt: skip
    """Fetch the weights of all of a worker's units: nothing that runs before writes them."""
    hopper.here(PAIRED)
    i = worker * 0
    if BIG:
        for item in range(rounds):
            row = (item * WORKERS + worker) * 128 * step
            for k in range(kb):
                b = i % STAGES
                ready = bars.index(_W_FULL + b)
                mbarrier.wait(bars.index(_W_FREE + b), (i // STAGES + 1) & 1)  # at once in the first round
                mbarrier.expect(ready, 2 * 128 * 128)
                for s in gl.static_range(2):
                    place = ws.index(b).slice(s * 128, 128, 0)
                    load_block(big_rows, [row + s * sub_rows, k * 128], ready, place)
                i += 1
    for pair in range(worker - cta, groups, WORKERS):
        row = first_row + (pair + cta) * N * step
        for k in range(0, kb, KU):
            b = i % STAGES
            ready = bars.index(_W_FULL + b)
            mbarrier.wait(bars.index(_W_FREE + b), (i // STAGES + 1) & 1)
            mbarrier.expect(ready, 2 * N * 128 * KU)
            for j in gl.static_range(KU):
                for s in gl.static_range(2):
                    place = ws.index(b * KU + j).slice(s * N, N, 0)
                    load_block(small_rows, [row + s * small_sub, (k + j) * 128], ready, place)
            i += 1
    hopper.meet(PAIRED)


@gluon.jit
def _fetch_x(
    x_rows, kb, rounds, groups, xs, bars, BARS: gl.constexpr, worker, cta, XR: gl.constexpr,
    BM: gl.constexpr, KU: gl.constexpr, STAGES: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Fetch all of x for each of a worker's items; half of its rows, for both programs, where they are a pair."""
    HALF: gl.constexpr = XR // 2  # what stands in the rows from XR on is never stored
    hopper.here(PAIRED)
    hopper.meet(PAIRED)
    gdc_wait()
    i = worker * 0
    for _item in range(rounds + gl.cdiv(groups - worker + cta, WORKERS)):
        for k in range(0, kb, KU):
            b = i % STAGES
            ready = bars.index(_X_FULL + b)
            mbarrier.wait(bars.index(_X_FREE + b), (i // STAGES + 1) & 1)
            mbarrier.expect(ready, XR * 128 * KU)
            for j in gl.static_range(KU):
                if PAIRED:
                    to = (b * KU + j) * BM * 128 + cta * HALF * 128
                    ready_at = BARS + (_X_FULL + b) * 8
                    hopper.load_to_both(cta * HALF, (k + j) * 128, to, ready_at, _X_BLOCK)
                else:
                    place = xs.index(b * KU + j).slice(0, XR, 0)
                    load_block(x_rows, [0, (k + j) * 128], ready, place)
            i += 1
    if PAIRED:  # the other program arrives here, so this one stays
        for last in range(gl.maximum(i - STAGES, 0), i):
            mbarrier.wait(bars.index(_X_FREE + last % STAGES), last // STAGES & 1)


@gluon.jit
def _be_there(PAIRED: gl.constexpr):
    """What the warps do that fill the warpgroup of those which fetch."""
    hopper.here(PAIRED)
    hopper.meet(PAIRED)


@gluon.jit
def _release(BARS: gl.constexpr, w, x, PAIRED: gl.constexpr):
    """This warp has read what it multiplied."""
    hopper.arrive(BARS + (_W_FREE + w) * 8, False)
    hopper.arrive(BARS + (_X_FREE + x) * 8, PAIRED)


@gluon.jit
def _multiply(x, ws, w, out, CHUNK: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr):
    """Start the product with this warpgroup's CHUNK of 64 rows of a big item, into out's registers."""
    SUB: gl.constexpr = CHUNK if BM == 64 else CHUNK // 2
    FIRST: gl.constexpr = 64 * (WG if BM == 64 else CHUNK % 2)
    tile = ws.index(w).slice(SUB * 128 + FIRST, 64, 0)
    return warpgroup_mma(x, tile.permute((1, 0)), out, use_acc=False, is_async=True)


@gluon.jit
def _store(out, at, sub, first, limit, acc, ok, N: gl.constexpr, ACC: gl.constexpr):
    """Store acc [64, N] at columns first .. first + N of tile `sub` of a row, below the tile's limit."""
    column = first + gl.arange(0, N, gl.SliceLayout(0, ACC))
    inside = ok[:, None] & (column < limit)[None, :]
    gl.store(out + at[:, None] + sub + column[None, :], acc.to(out.dtype.element_ty), mask=inside)


@gluon.jit
def _big_items(
    x_scales, w_scales, out, out_stride, M, kb, rounds, sub_tiles, tiles, limit, q, q_scales, hidden, xs,
    ws, bars, BARS: gl.constexpr, peaks, worker, i, step: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr, SWIGLU: gl.constexpr, MIN: gl.constexpr,
    XSTAGES: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Multiply a worker's big items, from stage i of the rings on; to q and q_scales after SwiGLU, or to out."""
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
            wi, xi = i % STAGES, i % XSTAGES
            scale, scale2 = (x_scale * w_scale)[:, None], (x_scale * w_scale2)[:, None]
            # The next unit's scales are asked for before this unit is waited for.
            ahead = gl.minimum(k + 1, kb - 1)
            x_scale = gl.load(x_scales + row * kb + ahead, mask=ok, other=0.0)
            w_scale, w_scale2 = gl.load(w_at + ahead), gl.load(w_at2 + ahead)
            hopper.wait(BARS + (_X_FULL + xi) * 8, i // XSTAGES & 1)
            hopper.wait(BARS + (_W_FULL + wi) * 8, i // STAGES & 1)
            i += 1
            x = xs.index(xi)
            if BM == 128:
                x = x.slice(ROW, 64, 0)
            p0 = _multiply(x, ws, wi, zeros, 0, WG, BM)
            p1 = _multiply(x, ws, wi, zeros, 1, WG, BM)
            p0 = warpgroup_mma_wait(1, deps=(p0,))
            a0 = add_scaled(p0, scale, a0)
            if BM == 64:
                p1 = warpgroup_mma_wait(0, deps=(p1,))
                _release(BARS, wi, xi, PAIRED)
                a1 = add_scaled(p1, scale2, a1)
            else:
                p2 = _multiply(x, ws, wi, p0, 2, WG, BM)
                p1 = warpgroup_mma_wait(1, deps=(p1,))
                a1 = add_scaled(p1, scale, a1)
                p3 = _multiply(x, ws, wi, p1, 3, WG, BM)
                p2 = warpgroup_mma_wait(1, deps=(p2,))
                a2 = add_scaled(p2, scale2, a2)
                p3 = warpgroup_mma_wait(0, deps=(p3,))
                _release(BARS, wi, xi, PAIRED)
                a3 = add_scaled(p3, scale2, a3)
        if SWIGLU:
            store_hidden(
                a0, a1, a2, a3, q, q_scales, hidden, sub_tiles, group, item, row, ok, peaks,
                bars.index(_MET), ACC,
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
    xs, ws, xi, wi, zeros, J: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr, KU: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    """Start the product of a stage's block J of columns: of one tile with 64 rows, of both with 128."""
    x = xs.index(xi * KU + J)
    w = ws.index(wi * KU + J)
    if BM == 128:
        x = x.slice(WG * 64, 64, 0)
        w = w.slice(0, 2 * N, 0)
    else:
        w = w.slice(WG * N, N, 0)
    return warpgroup_mma(x, w.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _scales(x_scales, w_at, w_at2, row, ok, k, kb):
    """Scales [64] of x in block k, and those of both tiles; beyond K they are 0, as is what is multiplied."""
    there = k < kb
    k = gl.minimum(k, kb - 1)
    x_scale = gl.load(x_scales + row * kb + k, mask=ok & there, other=0.0)
    return x_scale, gl.load(w_at + k), gl.load(w_at2 + k)


@gluon.jit
def _stage_scales(x_scales, w_at, w_at2, row, ok, k, kb, KU: gl.constexpr):
    s0 = _scales(x_scales, w_at, w_at2, row, ok, k, kb)
    s1, s2, s3 = s0, s0, s0
    if KU > 1:
        s1 = _scales(x_scales, w_at, w_at2, row, ok, k + 1, kb)
    if KU == 4:
        s2 = _scales(x_scales, w_at, w_at2, row, ok, k + 2, kb)
        s3 = _scales(x_scales, w_at, w_at2, row, ok, k + 3, kb)
    return s0, s1, s2, s3


@gluon.jit
def _add_small(product, scales, acc, of_first, WG: gl.constexpr, BM: gl.constexpr):
    x_scale, w_scale, w_scale2 = scales
    if BM == 128:
        scale = gl.where(of_first[None, :], (x_scale * w_scale)[:, None], (x_scale * w_scale2)[:, None])
    elif WG == 0:
        scale = (x_scale * w_scale)[:, None]
    else:
        scale = (x_scale * w_scale2)[:, None]
    return add_scaled(product, scale, acc)


@gluon.jit
def _small_items(
    x_scales, w_scales, out, out_stride, out_sub, M, kb, groups, first_row, small_sub, sub_tiles, tiles,
    limit, xs, ws, bars, BARS: gl.constexpr, worker, cta, i, step: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr,
    KU: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, XSTAGES: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Multiply a worker's small items, from stage i of the rings on, to out."""
    ROW: gl.constexpr = WG * 64 if BM == 128 else 0
    COLUMNS: gl.constexpr = 2 * N if BM == 128 else N
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    row = ROW + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    ok = row < M
    at = row.to(gl.int64) * out_stride
    zeros = gl.zeros([64, COLUMNS], gl.float32, ACC)
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, ACC))
    of_first = column < N
    if BM == 64 and WG == 1:
        of_first = column < 0
    for pair in range(worker - cta, groups, WORKERS):  # a pair shares x: beyond the end are zeros
        group = pair + cta
        acc = zeros
        w_row = first_row + group * N * step
        first = w_row
        tile = gl.minimum(w_row // 128, tiles - 1)
        tile2 = gl.minimum(tile + sub_tiles, tiles - 1)
        if step == 1:
            first = group * N  # out has the rest alone, gate and up each
        else:
            tile2 = gl.minimum((w_row + small_sub) // 128, tiles - 1)
        w_at = w_scales + tile * kb
        w_at2 = w_scales + tile2 * kb
        # Scales are asked for two stages before they are needed.
        this = _stage_scales(x_scales, w_at, w_at2, row, ok, 0, kb, KU)
        following = _stage_scales(x_scales, w_at, w_at2, row, ok, KU, kb, KU)
        for k in range(0, kb, KU):
            wi, xi = i % STAGES, i % XSTAGES
            s0, s1, s2, s3 = this
            this = following
            following = _stage_scales(x_scales, w_at, w_at2, row, ok, k + 2 * KU, kb, KU)
            hopper.wait(BARS + (_X_FULL + xi) * 8, i // XSTAGES & 1)
            hopper.wait(BARS + (_W_FULL + wi) * 8, i // STAGES & 1)
            i += 1
            p0 = _multiply_small(xs, ws, xi, wi, zeros, 0, WG, BM, KU, N)
            if KU == 1:
                p0 = warpgroup_mma_wait(0, deps=(p0,))
                _release(BARS, wi, xi, PAIRED)
                acc = _add_small(p0, s0, acc, of_first, WG, BM)
            else:
                p1 = _multiply_small(xs, ws, xi, wi, zeros, 1, WG, BM, KU, N)
                if KU == 2:
                    p0 = warpgroup_mma_wait(1, deps=(p0,))
                    acc = _add_small(p0, s0, acc, of_first, WG, BM)
                    p1 = warpgroup_mma_wait(0, deps=(p1,))
                    _release(BARS, wi, xi, PAIRED)
                    acc = _add_small(p1, s1, acc, of_first, WG, BM)
                else:
                    p2 = _multiply_small(xs, ws, xi, wi, zeros, 2, WG, BM, KU, N)
                    p3 = _multiply_small(xs, ws, xi, wi, zeros, 3, WG, BM, KU, N)
                    p0 = warpgroup_mma_wait(3, deps=(p0,))
                    acc = _add_small(p0, s0, acc, of_first, WG, BM)
                    p1 = warpgroup_mma_wait(2, deps=(p1,))
                    acc = _add_small(p1, s1, acc, of_first, WG, BM)
                    p2 = warpgroup_mma_wait(1, deps=(p2,))
                    acc = _add_small(p2, s2, acc, of_first, WG, BM)
                    p3 = warpgroup_mma_wait(0, deps=(p3,))
                    _release(BARS, wi, xi, PAIRED)
                    acc = _add_small(p3, s3, acc, of_first, WG, BM)
        limit2 = limit  # of either half's rows, or of all rows
        if step == 2:
            limit2 = limit - out_sub
        if BM == 64:
            if WG == 0:
                _store(out, at, 0, first, limit, acc, ok, N, ACC)
            else:
                _store(out, at, out_sub, first, limit2, acc, ok, N, ACC)
        else:
            place = first + gl.where(of_first, column, column - N)
            inside = place < gl.where(of_first, limit, limit2)
            place += gl.where(of_first, 0, out_sub)
            gl.store(
                out + at[:, None] + place[None, :], acc.to(out.dtype.element_ty),
                mask=ok[:, None] & inside[None, :],
            )  # fmt: skip


@gluon.jit
def _consume(
    x_scales, w_scales, out, out_stride, out_sub, M, kb, rounds, groups, first_row, small_sub, sub_tiles,
    tiles, limit, q, q_scales, hidden, xs, ws, bars, BARS: gl.constexpr, peaks, worker, cta,
    step: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr, KU: gl.constexpr, N: gl.constexpr,
    STAGES: gl.constexpr, BIG: gl.constexpr, SWIGLU: gl.constexpr, MIN: gl.constexpr,
    XSTAGES: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    hopper.here(PAIRED)
    hopper.meet(PAIRED)
    gdc_wait()
    i = worker * 0
    if BIG:
        i = _big_items(
            x_scales, w_scales, out, out_stride, M, kb, rounds, sub_tiles, tiles, limit, q, q_scales,
            hidden, xs, ws, bars, BARS, peaks, worker, i, step, WG, BM, STAGES, SWIGLU, MIN,
            XSTAGES, PAIRED,
        )  # fmt: skip
    _small_items(
        x_scales, w_scales, out, out_stride, out_sub, M, kb, groups, first_row, small_sub, sub_tiles,
        tiles, limit, xs, ws, bars, BARS, worker, cta, i, step, WG, BM, KU, N, STAGES, XSTAGES, PAIRED,
    )  # fmt: skip


@hopper.paired
def stream_units(
    x_rows, x_scales, big_rows, small_rows, w_scales, out, out_stride, out_sub, M, kb, rounds, groups,
    first_row, sub_rows, small_sub, sub_tiles, tiles, limit, q, q_scales, hidden, STEP: gl.constexpr,
    XR: gl.constexpr, BM: gl.constexpr, KU: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    XSTAGES: gl.constexpr, REGISTERS: gl.constexpr, BIG: gl.constexpr, SWIGLU: gl.constexpr,
    PAIRED: gl.constexpr, MIN: gl.constexpr,
):  # fmt: skip
    """Products of x [M, K] with the rows of w; x_rows, big_rows, small_rows: descriptors of blocks of x and w.

    Groups are numbered along the first tile of the pair (STEP 1: gate, the second is sub_rows further) or along both
    (STEP 2). Small items start at first_row; their sums go to out, row r's at r * out_stride, the second tile's out_sub
    further. Big items go to q and q_scales (SWIGLU) or, as there are no small ones before them, to out.
    """
    worker = gl.program_id(0)
    cta = worker % 2 if PAIRED else worker * 0
    gdc_launch_dependents()
    W: gl.constexpr = 256 if BIG else 2 * N
    W_AT: gl.constexpr = XSTAGES * KU * BM * 128
    BARS: gl.constexpr = W_AT + STAGES * KU * W * 128
    KIND: gl.constexpr = x_rows.layout
    rings = gl.allocate_shared_memory(gl.float8e4nv, [BARS // 1024 + 1, 8, 128], KIND)
    hopper.check_base(rings, BARS)
    xs = view(rings, gl.float8e4nv, [XSTAGES * KU, BM, 128], KIND)
    ws = view(rings.index(W_AT // 1024), gl.float8e4nv, [STAGES * KU, W, 128], KIND)
    bars = view(rings.index(BARS // 1024), gl.int64, [128, 1], mbarrier.MBarrierLayout())
    peaks = gl.allocate_shared_memory(gl.int32, [4, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # full ones have their bytes to wait for, free ones the warps that multiply
    index = gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    counts = gl.where(index < _X_FULL, 1 + 7 * (index // 32), 1)
    counts = gl.where(index < _X_FREE, counts, 16 if PAIRED else 8)
    used = gl.where(index < _X_FULL, index % 32 < STAGES, index % 8 < XSTAGES) & (index < _MET)
    hopper.init_barriers(BARS, gl.where(used, counts, gl.where(index == _MET, 2, 0)))
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_consume, (
                x_scales, w_scales, out, out_stride, out_sub, M, kb, rounds, groups, first_row, small_sub,
                sub_tiles, tiles, limit, q, q_scales, hidden, xs, ws, bars, BARS, peaks, worker, cta,
                STEP, 0, BM, KU, N, STAGES, BIG, SWIGLU, MIN, XSTAGES, PAIRED)),
            (_consume, (
                x_scales, w_scales, out, out_stride, out_sub, M, kb, rounds, groups, first_row, small_sub,
                sub_tiles, tiles, limit, q, q_scales, hidden, xs, ws, bars, BARS, peaks, worker, cta,
                STEP, 1, BM, KU, N, STAGES, BIG, SWIGLU, MIN, XSTAGES, PAIRED)),
            (_be_there, (PAIRED,)),
            (_fetch_w, (
                big_rows, small_rows, kb, rounds, groups, first_row, sub_rows, small_sub, ws, bars, worker,
                cta, STEP, KU, N, STAGES, BIG, PAIRED)),
            (_fetch_x, (
                x_rows, kb, rounds, groups, xs, bars, BARS, worker, cta, XR, BM, KU, XSTAGES, PAIRED)),
        ],
        [4, 2, 1, 1],
        [REGISTERS, 24, 24, 24],
    )  # fmt: skip
