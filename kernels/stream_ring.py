"""The ring of few-row FP8 products for Hopper, in Gluon: one warp fetches, two warpgroups multiply.

Reading the weights is all the work, so their requests must never wait for arithmetic: a producer warp keeps a ring of
stages in shared memory full, from before its predecessor has ended. A stage is one unit (block_gemm): 128 columns of
two weight tiles of 128 rows, and of the rows of x. Rows are the 64 rows of a wgmma, each warpgroup taking half of
either tile, or 128, one half per warpgroup. Neither choice changes a sum's order.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# renamed between Triton 3.6 and 3.9
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

WORKERS = gl.constexpr(132)  # SMs of an H100 or H200; on any other card the order stays this one


@gluon.jit
def _items(worker, whole, splits, groups):
    """How many items a worker has: whole groups, then at most one split."""
    return whole // WORKERS + (worker < (groups - whole) * splits).to(gl.int32)


@gluon.jit
def _item(worker, i, kb, whole, splits):
    """Group, first unit and end of a worker's item i, and the number of its sum among sums of splits."""
    group = whole + worker // splits
    split = worker % splits
    first = split * kb // splits
    end = (split + 1) * kb // splits
    if i < whole // WORKERS:
        group = i * WORKERS + worker
        first = 0
        end = kb
    return group, first, end


@gluon.jit
def _fetch_weights(w_rows, ready, ws, b, group, k, step, sub_rows):
    for s in gl.static_range(2):
        row = group * step * 128 + s * sub_rows
        _load(w_rows, [row, k * 128], ready, ws.index(b * 2 + s))


@gluon.jit
def _reserve(full, empty, i, BYTES: gl.constexpr, STAGES: gl.constexpr):
    """Wait until stage i of the ring is free, and announce what comes into it."""
    if i >= STAGES:
        mbarrier.wait(empty.index(i % STAGES), (i // STAGES + 1) & 1)
    mbarrier.expect(full.index(i % STAGES), BYTES)


@gluon.jit
def await_all(counter, target):
    """Wait until a counter in memory has reached a target: what was written before it did is seen."""
    seen = target - target
    while seen < target:
        seen = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.s32 $0, [$1];", "=r,l", [counter.to(gl.int64, bitcast=True)], dtype=gl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    return seen


@gluon.jit
def _fence_proxies():
    """Order what threads wrote to memory and what the copy engine reads from it."""
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def arrive(counter):
    """Tell all programs that this warpgroup has written."""
    _fence_proxies()
    _barrier()
    gl.atomic_add(counter, 1, sem="release", scope="gpu")


@gluon.jit
def produce(
    x_rows, w_rows, kb, step, sub_rows, whole, splits, groups, xs, ws, full, empty, worker, i, counter,
    target, BM: gl.constexpr, STAGES: gl.constexpr, DOWN: gl.constexpr,
):  # fmt: skip
    """Fetch a matrix's units from stage i of the ring on, the first weights before its rows are there; the next stage."""
    BYTES: gl.constexpr = BM * 128 + 2 * 128 * 128
    items = _items(worker, whole, splits, groups)
    group, first, end = _item(worker, 0, kb, whole, splits)
    early = gl.where(items > 0, gl.minimum(end - first, STAGES), 0)
    for j in range(early):
        _reserve(full, empty, i + j, BYTES, STAGES)
        b = (i + j) % STAGES
        _fetch_weights(w_rows, full.index(b), ws, b, group, first + j, step, sub_rows)
    if DOWN:
        if items > 0:
            await_all(counter, target)
            _fence_proxies()
    else:
        gdc_wait()
    early += i
    for item in range(items):
        group, first, end = _item(worker, item, kb, whole, splits)
        for k in range(first, end):
            b = i % STAGES
            if i >= early:
                _reserve(full, empty, i, BYTES, STAGES)
                _fetch_weights(w_rows, full.index(b), ws, b, group, k, step, sub_rows)
            _load(x_rows, [0, k * 128], full.index(b), xs.index(b))
            i += 1
    return i


@gluon.jit
def _add(product, scale, acc):
    """acc + product * scale, in place among the products: the compiler would hold all products to the end."""
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, scale[:, None], acc], dtype=gl.float32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _multiply(x, ws, b, out, CHUNK: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr):
    """Start the product with this warpgroup's CHUNK of 64 weight rows of stage b, into out's registers."""
    SUB: gl.constexpr = CHUNK if BM == 64 else CHUNK // 2
    FIRST: gl.constexpr = 64 * (WG if BM == 64 else CHUNK % 2)
    w = ws.index(b * 2 + SUB).slice(FIRST, 64, 0)
    return warpgroup_mma(x, w.permute((1, 0)), out, use_acc=False, is_async=True)


@gluon.jit
def _store(partial, row, ok, M, acc, ACC: gl.constexpr, CHUNK: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr):  # fmt: skip
    """Store a chunk's sum at partial [2, M, 128], the two tiles of one group."""
    SUB: gl.constexpr = CHUNK if BM == 64 else CHUNK // 2
    FIRST: gl.constexpr = 64 * (WG if BM == 64 else CHUNK % 2)
    column = FIRST + gl.arange(0, 64, gl.SliceLayout(0, ACC))
    at = (SUB * M + row)[:, None] * 128 + column[None, :]
    gl.store(partial + at, acc, mask=ok[:, None])


@gluon.jit
def swiglu(gate, up):
    return gate / (1.0 + gl.exp(-gate)) * up


@gluon.jit
def magnitude(x):
    """Bits of the largest magnitude of each row: NaN is the largest, so a bad number reaches the scale."""
    return gl.max(x.to(gl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@gluon.jit
def block_scale(magnitude, MIN: gl.constexpr):
    peak = magnitude.to(gl.float32, bitcast=True)
    scale = gl.div_rn(peak, gl.full_like(peak, 448.0))
    return gl.where(scale < MIN, MIN, scale)


@gluon.jit
def quantised(x, scale):
    return gl.div_rn(x, scale[:, None] + gl.zeros_like(x)).to(gl.float8e4nv)


@gluon.jit
def _store_hidden(
    a0, a1, a2, a3, q, q_scales, hidden, blocks, group, item, row, ok, peaks, met, ACC: gl.constexpr,
    WG: gl.constexpr, BM: gl.constexpr, MIN: gl.constexpr,
):  # fmt: skip
    """SwiGLU and quantisation of a group whose sums are whole: the same bits as from stored sums."""
    column = group * 128 + gl.arange(0, 64, gl.SliceLayout(0, ACC))
    at = row[:, None] * hidden + column[None, :]
    to_scale = q_scales + row * blocks + group
    if BM == 64:
        column += WG * 64
        inside = (column < hidden)[None, :]
        x = gl.where(inside, swiglu(a0, a1), 0.0)
        peak = magnitude(x)
        # The other half of the block's columns is the other warpgroup's.
        peaks.index(item % 2 * 2 + WG).store(peak)
        _barrier()
        mbarrier.arrive(met, count=1)
        mbarrier.wait(met, item & 1)
        other = peaks.index(item % 2 * 2 + 1 - WG).load(gl.SliceLayout(1, ACC))
        scale = block_scale(gl.maximum(peak, other), MIN)
        gl.store(q + at + WG * 64, quantised(x, scale), mask=ok[:, None] & inside)
        if WG == 0:
            gl.store(to_scale, scale, mask=ok)
    else:
        inside = (column < hidden)[None, :]
        inside2 = (column + 64 < hidden)[None, :]
        x = gl.where(inside, swiglu(a0, a2), 0.0)
        y = gl.where(inside2, swiglu(a1, a3), 0.0)
        scale = block_scale(gl.maximum(magnitude(x), magnitude(y)), MIN)
        gl.store(q + at, quantised(x, scale), mask=ok[:, None] & inside)
        gl.store(q + at + 64, quantised(y, scale), mask=ok[:, None] & inside2)
        gl.store(to_scale, scale, mask=ok)


@gluon.jit
def consume(
    x_scales, w_scales, partial, M, kb, step, sub_tiles, tiles, whole, splits, groups, q, q_scales,
    hidden, xs, ws, full, empty, peaks, met, worker, i, WG: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr, SWIGLU: gl.constexpr, MIN: gl.constexpr,
):  # fmt: skip
    """Multiply a worker's items, from stage i of the ring on; the next stage.

    Sums of splits go to partial [splits, 2, M, 128]; sums of whole groups before them, or with SWIGLU to q and q_scales.
    """
    ROW: gl.constexpr = WG * 64 if BM == 128 else 0
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    row = ROW + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    ok = row < M
    zeros = gl.zeros([64, 64], gl.float32, ACC)
    for item in range(_items(worker, whole, splits, groups)):
        group, first, end = _item(worker, item, kb, whole, splits)
        a0, a1, a2, a3 = zeros, zeros, zeros, zeros
        tile = group * step
        w_at = w_scales + tile * kb
        w_at2 = w_scales + gl.minimum(tile + sub_tiles, tiles - 1) * kb
        x_scale = gl.load(x_scales + row * kb + first, mask=ok, other=0.0)
        w_scale, w_scale2 = gl.load(w_at + first), gl.load(w_at2 + first)
        for k in range(first, end):
            b = i % STAGES
            scale, scale2 = x_scale * w_scale, x_scale * w_scale2
            # The next unit's scales are asked for before this unit is waited for.
            ahead = gl.minimum(k + 1, end - 1)
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
            a0 = _add(p0, scale, a0)
            if BM == 64:
                p1 = warpgroup_mma_wait(0, deps=(p1,))
                _barrier()
                mbarrier.arrive(empty.index(b), count=1)
                a1 = _add(p1, scale2, a1)
            else:
                p2 = _multiply(x, ws, b, p0, 2, WG, BM)
                p1 = warpgroup_mma_wait(1, deps=(p1,))
                a1 = _add(p1, scale, a1)
                p3 = _multiply(x, ws, b, p1, 3, WG, BM)
                p2 = warpgroup_mma_wait(1, deps=(p2,))
                a2 = _add(p2, scale2, a2)
                p3 = warpgroup_mma_wait(0, deps=(p3,))
                _barrier()
                mbarrier.arrive(empty.index(b), count=1)
                a3 = _add(p3, scale2, a3)
        waves = whole // WORKERS
        if SWIGLU and item < waves:
            _store_hidden(
                a0, a1, a2, a3, q, q_scales, hidden, sub_tiles, group, item, row, ok, peaks, met, ACC,
                WG, BM, MIN,
            )  # fmt: skip
        else:
            number = worker if SWIGLU else gl.where(item < waves, group, whole + worker)
            to = partial + number.to(gl.int64) * (2 * 128) * M
            _store(to, row, ok, M, a0, ACC, 0, WG, BM)
            _store(to, row, ok, M, a1, ACC, 1, WG, BM)
            if BM == 128:
                _store(to, row, ok, M, a2, ACC, 2, WG, BM)
                _store(to, row, ok, M, a3, ACC, 3, WG, BM)
    return i


@gluon.jit
def make_ring(x_rows, w_rows, BM: gl.constexpr, STAGES: gl.constexpr):
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BM, 128], x_rows.layout)
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * 2, 128, 128], w_rows.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    met = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    peaks = gl.allocate_shared_memory(gl.int32, [4, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(met, count=2)
    fence_async_shared()
    _barrier()
    return xs, ws, full, empty, met, peaks
