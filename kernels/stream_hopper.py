"""Few-row FP8 products for Hopper, in Gluon: one warp fetches, two warpgroups multiply.

Reading the weights is all the work, so their requests must never wait for arithmetic: a producer warp keeps a ring of
stages in shared memory full, from before its predecessor has ended. Every worker has its own weight rows over the whole
of K: nothing is split and added up through memory, at the price of reading x once per worker and item.

An item is a pair of weight tiles: gate and up of the same columns, or neighbours. A worker has BIG items of 2 x 128
rows (of gate and up), then small ones of 2 x N (stream.py shares them out); small ones alone with more than 64 rows of
x and no gate: stream_rows_hopper has the others. A stage holds KU blocks of 128 columns of a small item, or two of one
tile of a big one, or of x for both: 256 bytes of a row come faster than twice 128. Rows of x are the 64 rows of a
wgmma, or 128, one half per warpgroup; with 64, each has half of both big tiles or one of the small ones. PARTS workers
share a small item and divide the rows of x. No choice changes a sum's order, which is ascending along K.

Shared memory feeds the products and takes what is fetched, and every cache line that a warp looks up takes a turn
there: of small items a product reads x for both tiles, and a row's scales of a stage's blocks are one load (WIDE); of
big ones scales are kept in the lanes of a warp.
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

from kernels import hopper_scales as scaling
from kernels.hopper import barrier, clock, load_block, pause, tell
from kernels.hopper_epilogue import add_scaled, store_hidden, store_wide

WORKERS = gl.constexpr(132)  # SMs of an H100 or H200


@gluon.jit
def next_stage(b, phase, STAGES: gl.constexpr):
    """The stage after stage b of the ring, and its phase."""
    last = b == STAGES - 1
    return gl.where(last, 0, b + 1), gl.where(last, 1 - phase, phase)


@gluon.jit
def fetch_w(w_rows, ready, ws, b, row, k, AT: gl.constexpr, N: gl.constexpr, KU: gl.constexpr):
    """Ask for N weight rows of a stage, to row AT of a block; what are neighbours in memory, together."""
    ROWS: gl.constexpr = w_rows.block_shape[0]
    for first in gl.static_range(0, N, ROWS):
        for j in gl.static_range(KU):
            place = ws.index(b * KU + j).slice(AT + first, ROWS, 0)
            load_block(w_rows, [row + first, (k + j) * 128], ready, place)


@gluon.jit
def fetch_x(x_rows, ready, xs, b, k, x_row, ROWS: gl.constexpr, KU: gl.constexpr):
    """Ask for a stage's rows of x, a few at a time: rows that there are not, in a block with others, take time."""
    XR: gl.constexpr = x_rows.block_shape[0]
    for j in gl.static_range(KU):
        for first in gl.static_range(0, ROWS, XR):
            place = xs.index(b * KU + j).slice(first, XR, 0)
            load_block(x_rows, [x_row + first, (k + j) * 128], ready, place)


_MOST_EARLY = gl.constexpr(3)  # stages before the predecessor has ended
# cycles from one of these to the next, a block of columns: all at once they delay what the predecessor still reads
PACE = gl.constexpr(425)


@gluon.jit
def fetch_early(
    w_rows, kb, second, ws, full, worker, step: gl.constexpr, BYTES: gl.constexpr, AT: gl.constexpr,
    N: gl.constexpr, KU: gl.constexpr, MOST: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Ask for weights of the first stages of a worker's first item, at most MOST, and say of how many."""
    begin = clock()
    early = gl.minimum(gl.cdiv(kb, KU), MOST)
    row = worker // PARTS * N * step
    for i in range(early):
        pause(begin, i * KU * PACE)
        mbarrier.expect(full.index(i), BYTES)
        for t in gl.static_range(2):
            fetch_w(w_rows, full.index(i), ws, i, row + t * second, i * KU, AT + t * N, N, KU)
    return early


@gluon.jit
def fetch_items(
    x_rows, w_rows, kb, groups, first_row, second, xs, ws, full, empty, worker, early, b, phase,
    step: gl.constexpr, BYTES: gl.constexpr, X: gl.constexpr, PART: gl.constexpr, AT: gl.constexpr,
    N: gl.constexpr, KU: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Fetch a worker's small items from stage b of the ring on: X of its PART rows of x, weights but early ones."""
    i = worker * 0
    for group in range(worker, groups, WORKERS):
        row = first_row + group // PARTS * N * step
        for k in range(0, kb, KU):
            ready = full.index(b)
            mbarrier.wait(empty.index(b), 1 - phase)
            if i >= early:
                mbarrier.expect(ready, BYTES)
                for t in gl.static_range(2):
                    fetch_w(w_rows, ready, ws, b, row + t * second, k, AT + t * N, N, KU)
            fetch_x(x_rows, ready, xs, b, k, group % PARTS * PART, X, KU)
            i += 1
            b, phase = next_stage(b, phase, STAGES)


@gluon.jit
def _produce(
    x_rows, big_rows, small_rows, kb, rounds, groups, first_row, sub_rows, small_sub, xs, ws, full, empty,
    worker, XR: gl.constexpr, BM: gl.constexpr, KU: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    BIG: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Fetch all of a worker's units, the first weights before the predecessor has ended."""
    SM: gl.constexpr = BM // PARTS
    AT: gl.constexpr = 64 if BIG else 0
    # with 16 rows of x, what stands in others is never stored
    X: gl.constexpr = XR if XR == 16 else BM
    X_SMALL: gl.constexpr = XR if XR == 16 else SM
    BYTES: gl.constexpr = (X_SMALL + 2 * N) * 128 * KU
    early = worker * 0
    if BIG:
        for t in gl.static_range(2):
            first = worker * 128 + t * sub_rows
            mbarrier.expect(full.index(t), 128 * 128 * KU)
            fetch_w(big_rows, full.index(t), ws, t, first, 0, 0, 128, KU)
    else:
        early = fetch_early(
            small_rows, kb, small_sub, ws, full, worker, 2, BYTES, AT, N, KU, min(STAGES, _MOST_EARLY), PARTS
        )  # fmt: skip
    gdc_wait()
    b, phase = worker * 0, worker * 0
    if BIG:
        for item in range(rounds):
            at = (item * WORKERS + worker) * 128
            for k in range(0, kb, KU):
                for t in gl.static_range(2):
                    mbarrier.wait(empty.index(b), 1 - phase)  # at once in the first round
                    if item + k > 0:
                        mbarrier.expect(full.index(b), 128 * 128 * KU)
                        fetch_w(big_rows, full.index(b), ws, b, at + t * sub_rows, k, 0, 128, KU)
                    b, phase = next_stage(b, phase, STAGES)
                mbarrier.wait(empty.index(b), 1 - phase)
                mbarrier.expect(full.index(b), X * 128 * KU)
                fetch_x(x_rows, full.index(b), xs, b, k, 0, X, KU)
                b, phase = next_stage(b, phase, STAGES)
    fetch_items(
        x_rows, small_rows, kb, groups, first_row, small_sub, xs, ws, full, empty, worker, early, b, phase,
        1 if BIG else 2, BYTES, X_SMALL, SM, AT, N, KU, STAGES, PARTS,
    )  # fmt: skip


@gluon.jit
def _big_sums(
    x_scales, w_scales, x_at, w_at, w_at2, kb, ring, full, empty, b, phase, WG: gl.constexpr, BM: gl.constexpr,
    KU: gl.constexpr, STAGES: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """Sums [64, BM] of both tiles of a big item, whose first stage is b."""
    ROW: gl.constexpr = WG * 64 if BM == 128 else 0
    COLUMN: gl.constexpr = WG * 64 if BM == 64 else 0
    zeros = gl.zeros([64, BM], gl.float32, ACC)
    a0, a1 = zeros, zeros
    last = kb - 1
    x_lanes = scaling.scales_of_rows(x_scales, x_at, 0, last)
    x_later = scaling.scales_of_rows(x_scales, x_at, 4, last)
    w_lanes = scaling.scales_of_tiles(w_scales, w_at, w_at2, 0, last)
    w_later = scaling.scales_of_tiles(w_scales, w_at, w_at2, 16, last)
    for k in range(0, kb, KU):
        b2, phase2 = next_stage(b, phase, STAGES)
        x_b, x_phase = next_stage(b2, phase2, STAGES)
        p = zeros
        for t in gl.static_range(2):
            mbarrier.wait(full.index(b), phase)
            if t == 0:
                mbarrier.wait(full.index(x_b), x_phase)
            for j in gl.static_range(KU):
                x = ring.index(x_b * KU + j).slice(ROW, 64, 0)
                w = ring.index(b * KU + j).slice(COLUMN, BM, 0).permute((1, 0))
                # in the registers of the product before
                p = warpgroup_mma(x, w, p, use_acc=False, is_async=True)
                scale = scaling.product_scale(x_lanes, w_lanes, k, j, t)
                p = warpgroup_mma_wait(0, deps=(p,))
                if j == KU - 1:
                    tell(empty.index(b))
                if t == 0:
                    a0 = add_scaled(p, scale[:, None], a0)
                else:
                    a1 = add_scaled(p, scale[:, None], a1)
            b, phase = b2, phase2
        tell(empty.index(x_b))
        b, phase = next_stage(x_b, x_phase, STAGES)
        if k % 4 == 4 - KU:
            x_lanes, x_later = x_later, scaling.scales_of_rows(x_scales, x_at, k + KU + 4, last)
        if k % 16 == 16 - KU:
            w_lanes, w_later = (
                w_later,
                scaling.scales_of_tiles(w_scales, w_at, w_at2, k + KU + 16, last),
            )
    return a0, a1, b, phase


@gluon.jit
def _big_items(
    x_scales, w_scales, M, kb, rounds, sub_tiles, tiles, q, q_scales, hidden, ring, full, empty, peaks, met,
    worker, b, phase, WG: gl.constexpr, BM: gl.constexpr, KU: gl.constexpr, STAGES: gl.constexpr,
    MIN: gl.constexpr,
):  # fmt: skip
    """Multiply a worker's big items, from stage b of the ring on; to q and q_scales after SwiGLU.

    A warpgroup has 64 rows of x and all columns of both tiles or, with 64 rows of x, half of the columns of both.
    """
    COLUMN: gl.constexpr = WG * 64 if BM == 64 else 0
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 32])
    row = WG * 64 - COLUMN + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    ok = row < M
    for item in range(rounds):
        group = item * WORKERS + worker
        x_at = gl.minimum(row, M - 1) * kb
        w_at, w_at2 = (
            gl.minimum(group, tiles - 1) * kb,
            gl.minimum(group + sub_tiles, tiles - 1) * kb,
        )
        a0, a1, b, phase = _big_sums(
            x_scales, w_scales, x_at, w_at, w_at2, kb, ring, full, empty, b, phase, WG, BM, KU, STAGES, ACC
        )  # fmt: skip
        store_hidden(
            a0, a1, q, q_scales, hidden, sub_tiles, group, item, row, ok, peaks, met, ACC, WG, BM, MIN
        )  # fmt: skip
    return b, phase


@gluon.jit
def _small_product(
    xs, ws, b, zeros, J: gl.constexpr, WG: gl.constexpr, KU: gl.constexpr, N: gl.constexpr,
    BIG: gl.constexpr,
):  # fmt: skip
    """Start the product of block J of a stage: of 64 rows with one tile of the pair, or half of 128 with both."""
    x, w = xs.index(b * KU + J), ws.index(b * KU + J)
    if BIG:
        x = x.slice(0, 64, 0)
        w = w.slice(64 + WG * N, N, 0)
    else:  # a product with both reads x from shared memory once
        x = x.slice(WG * 64, 64, 0)
    return warpgroup_mma(x, w.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _small_items(
    x_scales, w_scales, out, out_stride, out_sub, M, kb, groups, first_row, small_sub, sub_tiles, tiles,
    limit, xs, ws, full, empty, worker, b, phase, places, WG: gl.constexpr, KU: gl.constexpr, N: gl.constexpr,
    STAGES: gl.constexpr, BIG: gl.constexpr, PARTS: gl.constexpr, WIDE: gl.constexpr, PLACED: gl.constexpr,
):  # fmt: skip
    """Multiply a worker's small items, from stage b of the ring on, to out."""
    C: gl.constexpr = N if BIG else 2 * N
    ROW: gl.constexpr = 0 if BIG else WG * 64
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 32])
    column = gl.arange(0, C, gl.SliceLayout(0, ACC)) + (WG * N if BIG else 0)
    second = column >= N  # of the pair's tiles
    stored = M
    if PLACED:
        stored = gl.minimum(M, gl.load(places).to(gl.int32))
    zeros = gl.zeros([64, C], gl.float32, ACC)
    for group in range(worker, groups, WORKERS):
        a = zeros
        row = ROW + group % PARTS * 64 + gl.arange(0, 64, gl.SliceLayout(1, ACC))
        w_row = group // PARTS * N * (1 if BIG else 2)
        tile = (first_row + w_row) // 128
        tile2 = tile + sub_tiles
        if not BIG:
            tile2 = gl.minimum((first_row + w_row + small_sub) // 128, tiles - 1)
        at = scaling.scale_addresses(x_scales, w_scales, row, M, kb, tile, tile2)
        x_scale, w_scale, w_scale2 = scaling.load_scales(at, 0, kb, WIDE)
        for k in range(0, kb, KU):
            scales = scaling.products_of(x_scale, w_scale)
            scales2 = scaling.products_of(x_scale, w_scale2)
            # The next stage's scales are asked for before this one is waited for.
            x_scale, w_scale, w_scale2 = scaling.load_scales(at, k + KU, kb, WIDE)
            mbarrier.wait(full.index(b), phase)
            products = (_small_product(xs, ws, b, zeros, 0, WG, KU, N, BIG),)
            for j in gl.static_range(1, KU):
                products += (_small_product(xs, ws, b, zeros, j, WG, KU, N, BIG),)  # type: ignore[assignment]
            for j in gl.static_range(KU):
                p = warpgroup_mma_wait(KU - 1 - j, deps=(products[j],))
                if j == KU - 1:
                    tell(empty.index(b))
                scale = gl.where(second[None, :], scales2[j][:, None], scales[j][:, None])
                a = add_scaled(p, scale, a)
            b, phase = next_stage(b, phase, STAGES)
        value = a.to(out.dtype.element_ty)
        if BIG:  # out has the rest alone, gate and up each; no shared memory is left to turn sums round in
            c = w_row + gl.where(second, column - N + out_sub, column)
            inside = (row < M)[:, None] & (c < gl.where(second, limit + out_sub, limit))[None, :]
            at = out + row.to(gl.int64)[:, None] * out_stride + c[None, :]
            gl.store(at, value, mask=inside)
        else:
            store_wide(value, out, out_stride, ROW, stored, w_row, limit, places, PLACED)


@gluon.jit
def _consume(
    x_scales, w_scales, out, out_stride, out_sub, M, kb, rounds, groups, first_row, small_sub, sub_tiles,
    tiles, limit, q, q_scales, hidden, xs, ws, full, empty, peaks, met, worker, places, WG: gl.constexpr,
    BM: gl.constexpr, KU: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, BIG: gl.constexpr,
    PARTS: gl.constexpr, MIN: gl.constexpr, WIDE: gl.constexpr, PLACED: gl.constexpr,
):  # fmt: skip
    gdc_wait()
    b, phase = worker * 0, worker * 0
    if BIG:
        b, phase = _big_items(
            x_scales, w_scales, M, kb, rounds, sub_tiles, tiles, q, q_scales, hidden, xs, full, empty, peaks, met,
            worker, b, phase, WG, BM, KU, STAGES, MIN,
        )  # fmt: skip
    _small_items(
        x_scales, w_scales, out, out_stride, out_sub, M, kb, groups, first_row, small_sub, sub_tiles, tiles,
        limit, xs, ws, full, empty, worker, b, phase, places, WG, KU, N, STAGES, BIG, PARTS, WIDE, PLACED,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "kb", "groups", "sub_tiles", "tiles"])
def stream_units(
    x_rows, x_scales, big_rows, small_rows, w_scales, out, out_stride, out_sub, M, kb, rounds, groups,
    first_row, sub_rows, small_sub, sub_tiles, tiles, limit, q, q_scales, hidden, places, XR: gl.constexpr,
    BM: gl.constexpr, KU: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    BIG: gl.constexpr, PARTS: gl.constexpr, MIN: gl.constexpr, WIDE: gl.constexpr, PLACED: gl.constexpr,
):  # fmt: skip
    """Products of x [M, K] with the rows of w; x_rows, big_rows, small_rows: descriptors of blocks of x and w.

    BIG: of gate and up; items are numbered along the first tile of the pair, gate, and the second is sub_rows further.
    Big ones go to q and q_scales, then come small ones, from first_row on. Else there are small ones of neighbours
    alone. Small ones' sums go to out, row r's at r * out_stride, up's out_sub further. WIDE: scales may be loaded 16
    bytes at a time. PLACED (not BIG): the first places[0] rows go where `stage.stage` noted it in `places`, and others
    nowhere.
    """
    worker = gl.program_id(0)
    gdc_launch_dependents()
    if BIG:  # a stage is a tile, or x; or a small item's rows of x and behind them weights
        ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KU, 128, 128], x_rows.layout)
        xs, ws = ring, ring
    else:
        xs = gl.allocate_shared_memory(
            gl.float8e4nv, [STAGES * KU, BM // PARTS, 128], x_rows.layout
        )
        ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KU, 2 * N, 128], small_rows.layout)
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
                sub_tiles, tiles, limit, q, q_scales, hidden, xs, ws, full, empty, peaks, met, worker, places,
                0, BM, KU, N, STAGES, BIG, PARTS, MIN, WIDE, PLACED)),
            (_consume, (
                x_scales, w_scales, out, out_stride, out_sub, M, kb, rounds, groups, first_row, small_sub,
                sub_tiles, tiles, limit, q, q_scales, hidden, xs, ws, full, empty, peaks, met, worker, places,
                1, BM, KU, N, STAGES, BIG, PARTS, MIN, WIDE, PLACED)),
            (_produce, (
                x_rows, big_rows, small_rows, kb, rounds, groups, first_row, sub_rows, small_sub, xs, ws,
                full, empty, worker, XR, BM, KU, N, STAGES, BIG, PARTS)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
