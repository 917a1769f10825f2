"""The weight stream of few-row FP8 products for Hopper, in Gluon: one warp fetches, two warpgroups multiply.

Reading the weights is all the work, so their requests must never wait for arithmetic: a producer warp keeps a ring of
stages in shared memory full, from before its predecessor has ended. A stage is one unit (block_gemm): 128 columns of
PAIR weight tiles of 128 rows, and of the rows of x. Rows are the 64 rows of a wgmma, or 128, one half per warpgroup;
with 64, each warpgroup takes half of the weight rows. Neither choice changes a sum's order.
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


@gluon.jit
def _fetch_weights(w_rows, ready, ring, i, u, kb, step, sub_rows, PAIR: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    group = u // kb
    k = u - group * kb
    for s in gl.static_range(PAIR):
        row = group * step * 128 + s * sub_rows
        _load(w_rows, [row, k * 128], ready, ring.index(i % STAGES * PAIR + s))


@gluon.jit
def _produce(
    x_rows, w_rows, xs, ws, full, empty, start, end, kb, step, sub_rows, BM: gl.constexpr,
    PAIR: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring with units start .. end: the first weights before the predecessor's end, rows after it."""
    BYTES: gl.constexpr = BM * 128 + PAIR * 128 * 128
    first = gl.minimum(end - start, STAGES)
    for i in range(first):
        ready = full.index(i)
        mbarrier.expect(ready, BYTES)
        _fetch_weights(w_rows, ready, ws, i, start + i, kb, step, sub_rows, PAIR, STAGES)
    gdc_wait()
    for i in range(first):
        _load(x_rows, [0, (start + i) % kb * 128], full.index(i), xs.index(i))
    for i in range(STAGES, end - start):
        b = i % STAGES
        mbarrier.wait(empty.index(b), (i // STAGES + 1) & 1)
        ready = full.index(b)
        mbarrier.expect(ready, BYTES)
        _fetch_weights(w_rows, ready, ws, i, start + i, kb, step, sub_rows, PAIR, STAGES)
        _load(x_rows, [0, (start + i) % kb * 128], ready, xs.index(b))


@gluon.jit
def _add(product, scale, acc):
    """acc + product * scale [64, 1], in place among the products: the compiler would hold all products to the end."""
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, scale, acc], dtype=gl.float32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _multiply(x, ring, b, zeros, CHUNK: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr, PAIR: gl.constexpr):  # fmt: skip
    """Start the product with this warpgroup's CHUNK of 64 weight rows of stage b."""
    w = ring.index(b * PAIR + _sub(CHUNK, WG, BM, PAIR)).slice(_column(CHUNK, WG, BM, PAIR), 64, 0)
    return warpgroup_mma(x, w.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.constexpr_function
def _sub(chunk, wg, rows, pair):
    """Which tile of a group a warpgroup's chunk of 64 weight rows lies in."""
    return (wg if rows == 64 else chunk // 2) if pair == 2 else 0


@gluon.constexpr_function
def _column(chunk, wg, rows, pair):
    """The chunk's first row in its tile."""
    return 64 * (wg if rows == 64 and pair == 1 else chunk % 2)


@gluon.jit
def _store(
    partial, slot, row, ok, M, acc, ACC: gl.constexpr, CHUNK: gl.constexpr, WG: gl.constexpr,
    BM: gl.constexpr, PAIR: gl.constexpr,
):  # fmt: skip
    slot = slot * PAIR + _sub(CHUNK, WG, BM, PAIR)
    column = _column(CHUNK, WG, BM, PAIR) + gl.arange(0, 64, gl.SliceLayout(0, ACC))
    at = (slot.to(gl.int64) * M + row)[:, None] * 128 + column[None, :]
    gl.store(partial + at, acc, mask=ok[:, None])


@gluon.jit
def _consume(
    x_scales, w_scales, partial, M, xs, ws, full, empty, start, end, kb, step, sub_tiles, tiles,
    first_slot, WG: gl.constexpr, BM: gl.constexpr, PAIR: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Multiply units start .. end and store each group's sum; this warpgroup's part is WG."""
    CHUNKS: gl.constexpr = BM * PAIR // 64
    SUB: gl.constexpr = _sub(0, WG, BM, PAIR)
    ROW: gl.constexpr = WG * 64 if BM == 128 else 0
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32])
    row = ROW + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    ok = row < M
    zeros = gl.zeros([64, 64], gl.float32, ACC)
    a0, a1, a2, a3 = zeros, zeros, zeros, zeros
    gdc_wait()
    group = start // kb
    k = start - group * kb
    tile = gl.minimum(group * step + SUB * sub_tiles, tiles - 1)
    x_scale = gl.load(x_scales + row * kb + k, mask=ok, other=0.0)
    w_scale = gl.load(w_scales + tile * kb + k)
    w_scale2 = w_scale
    if CHUNKS == 4:
        w_scale2 = gl.load(w_scales + gl.minimum(group * step + sub_tiles, tiles - 1) * kb + k)
    for u in range(start, end):
        b = (u - start) % STAGES
        scale = (x_scale * w_scale)[:, None]
        scale2 = (x_scale * w_scale2)[:, None]
        last = k == kb - 1
        this = group
        # The next unit's scales are asked for before this unit is waited for; after the last one they are any.
        group = gl.minimum(gl.where(last, group + 1, group), (tiles - 1) // step)
        k = gl.where(last, 0, k + 1)
        tile = gl.minimum(group * step + SUB * sub_tiles, tiles - 1)
        x_scale = gl.load(x_scales + row * kb + k, mask=ok, other=0.0)
        w_scale = gl.load(w_scales + tile * kb + k)
        if CHUNKS == 4:
            w_scale2 = gl.load(w_scales + gl.minimum(group * step + sub_tiles, tiles - 1) * kb + k)
        mbarrier.wait(full.index(b), (u - start) // STAGES & 1)
        x = xs.index(b)
        if BM == 128:
            x = x.slice(ROW, 64, 0)
        p0 = _multiply(x, ws, b, zeros, 0, WG, BM, PAIR)
        if CHUNKS == 1:
            p0 = warpgroup_mma_wait(0, deps=(p0,))
            _barrier()
            mbarrier.arrive(empty.index(b), count=1)
            a0 = _add(p0, scale, a0)
        else:
            p1 = _multiply(x, ws, b, zeros, 1, WG, BM, PAIR)
            p0 = warpgroup_mma_wait(1, deps=(p0,))
            a0 = _add(p0, scale, a0)
            if CHUNKS == 4:
                p2 = _multiply(x, ws, b, p0, 2, WG, BM, PAIR)
                p1 = warpgroup_mma_wait(1, deps=(p1,))
                a1 = _add(p1, scale, a1)
                p3 = _multiply(x, ws, b, p1, 3, WG, BM, PAIR)
                p2 = warpgroup_mma_wait(1, deps=(p2,))
                a2 = _add(p2, scale2, a2)
                p3 = warpgroup_mma_wait(0, deps=(p3,))
                _barrier()
                mbarrier.arrive(empty.index(b), count=1)
                a3 = _add(p3, scale2, a3)
            else:
                p1 = warpgroup_mma_wait(0, deps=(p1,))
                _barrier()
                mbarrier.arrive(empty.index(b), count=1)
                a1 = _add(p1, scale, a1)
        if last | (u == end - 1):
            slot = first_slot + this
            _store(partial, slot, row, ok, M, a0, ACC, 0, WG, BM, PAIR)
            a0 = zeros
            if CHUNKS > 1:
                _store(partial, slot, row, ok, M, a1, ACC, 1, WG, BM, PAIR)
                a1 = zeros
            if CHUNKS == 4:
                _store(partial, slot, row, ok, M, a2, ACC, 2, WG, BM, PAIR)
                _store(partial, slot, row, ok, M, a3, ACC, 3, WG, BM, PAIR)
                a2, a3 = zeros, zeros


@gluon.jit
def stream_units(
    x_rows, x_scales, w_rows, w_scales, partial, M, kb, units, workers, slots, step, sub_rows,
    sub_tiles, tiles, BM: gl.constexpr, PAIR: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Sums of runs to partial [workers * slots * PAIR, M, 128]; x_rows and w_rows are descriptors of blocks."""
    worker = gl.program_id(0)
    start = worker * units // workers
    end = (worker + 1) * units // workers
    gdc_launch_dependents()
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BM, 128], x_rows.layout)
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * PAIR, 128, 128], w_rows.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    _barrier()
    first_slot = worker * slots - start // kb
    gl.warp_specialize(
        [
            (_consume, (x_scales, w_scales, partial, M, xs, ws, full, empty, start, end, kb, step,
                        sub_tiles, tiles, first_slot, 0, BM, PAIR, STAGES)),
            (_consume, (x_scales, w_scales, partial, M, xs, ws, full, empty, start, end, kb, step,
                        sub_tiles, tiles, first_slot, 1, BM, PAIR, STAGES)),
            (_produce, (x_rows, w_rows, xs, ws, full, empty, start, end, kb, step, sub_rows, BM,
                        PAIR, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
