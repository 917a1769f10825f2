"""Few-row FP8 products for Hopper, in Gluon, above 64 rows: one warp fetches, two warpgroups multiply.

An item is a pair of neighbouring weight tiles of N rows (stream.py shares them out), a stage KU blocks of 128 columns
of both and of all rows of x, one half of these per warpgroup. A sum's order is ascending along K.

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

from kernels import hopper_scales as scaling
from kernels.hopper import barrier, tell
from kernels.hopper_epilogue import add_scaled, store_wide
from kernels.stream_fetch_hopper import WORKERS, fetch_early, fetch_items, next_stage

_MOST_EARLY = gl.constexpr(3)  # stages before the predecessor has ended


@gluon.jit
def _fetch(
    x_rows, w_rows, kb, groups, xs, ws, full, empty, worker, KU: gl.constexpr, STAGES: gl.constexpr
):
    """Fetch all of a worker's items, the first weights before the predecessor has ended."""
    N: gl.constexpr = w_rows.block_shape[0]
    BYTES: gl.constexpr = (xs.shape[1] + 2 * N) * 128 * KU
    early = fetch_early(
        w_rows, kb, N, ws, full, worker, 2, BYTES, N, KU, min(STAGES, _MOST_EARLY), 1
    )
    gdc_wait()
    gdc_launch_dependents()
    fetch_items(
        x_rows,
        w_rows,
        kb,
        groups,
        N,
        xs,
        ws,
        full,
        empty,
        worker,
        early,
        2,
        BYTES,
        N,
        KU,
        STAGES,
        1,
    )


@gluon.jit
def _product(xs, ws, at, zeros, WG: gl.constexpr):
    """Start the product of a block of columns: of 64 rows of x with both tiles, which reads x once."""
    return warpgroup_mma(
        xs.index(at).slice(WG * 64, 64, 0), ws.index(at).permute((1, 0)), zeros, use_acc=False, is_async=True
    )  # fmt: skip


@gluon.jit
def _multiply(
    x_scales, w_scales, out, out_stride, M, kb, groups, tiles, limit, xs, ws, full, empty, worker, places,
    WG: gl.constexpr, KU: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    PLACED: gl.constexpr,
):  # fmt: skip
    """Multiply a worker's items."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * N, 32])
    gdc_wait()
    second = gl.arange(0, 2 * N, gl.SliceLayout(0, ACC)) >= N  # of the pair's tiles
    row = WG * 64 + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    stored = M
    if PLACED:
        stored = gl.minimum(M, gl.load(places).to(gl.int32))
    zeros = gl.zeros([64, 2 * N], gl.float32, ACC)
    b, phase = worker * 0, worker * 0
    for group in range(worker, groups, WORKERS):
        a = zeros
        w_row = group * N * 2
        tile2 = gl.minimum((w_row + N) // 128, tiles - 1)
        at = scaling.scale_addresses(x_scales, w_scales, row, M, kb, w_row // 128, tile2)
        x_scale, w_scale, w_scale2 = scaling.load_scales(at, 0, kb, WIDE)
        for k in range(0, kb, KU):
            scales = scaling.products_of(x_scale, w_scale)
            scales2 = scaling.products_of(x_scale, w_scale2)
            # The next stage's scales are asked for before this one is waited for.
            x_scale, w_scale, w_scale2 = scaling.load_scales(at, k + KU, kb, WIDE)
            mbarrier.wait(full.index(b), phase)
            products = (_product(xs, ws, b * KU, zeros, WG),)
            for j in gl.static_range(1, KU):
                products += (_product(xs, ws, b * KU + j, zeros, WG),)  # type: ignore[assignment]
            for j in gl.static_range(KU):
                p = warpgroup_mma_wait(KU - 1 - j, deps=(products[j],))
                if j == KU - 1:
                    tell(empty.index(b))
                scale = gl.where(second[None, :], scales2[j][:, None], scales[j][:, None])
                a = add_scaled(p, scale, a)
            b, phase = next_stage(b, phase, STAGES)
        value = a.to(out.dtype.element_ty)
        store_wide(value, out, out_stride, WG * 64, stored, w_row, limit, places, PLACED)


@gluon.jit(do_not_specialize=["M", "kb", "groups", "tiles"])
def stream_units(
    x_rows, x_scales, w_rows, w_scales, out, out_stride, M, kb, groups, tiles, limit, places, X: gl.constexpr,
    KU: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, WIDE: gl.constexpr, PLACED: gl.constexpr,
):  # fmt: skip
    """Products of x [M, K], at most X rows, with the rows of w; x_rows, w_rows: descriptors of blocks of x and w.

    Row r's begin at r * out_stride of out, none of its columns reaches `limit`. WIDE: scales may be loaded 8 bytes at a
    time. PLACED: the first places[0] rows go where `stage.stage` noted it in `places`, and others nowhere.
    """
    N: gl.constexpr = w_rows.block_shape[0]
    worker = gl.program_id(0)
    xs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KU, X, 128], x_rows.layout)
    ws = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KU, 2 * N, 128], w_rows.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    barrier()
    gl.warp_specialize(
        [
            (_multiply, (
                x_scales, w_scales, out, out_stride, M, kb, groups, tiles, limit, xs, ws, full, empty, worker, places,
                0, KU, N, STAGES, WIDE, PLACED)),
            (_multiply, (
                x_scales, w_scales, out, out_stride, M, kb, groups, tiles, limit, xs, ws, full, empty, worker, places,
                1, KU, N, STAGES, WIDE, PLACED)),
            (_fetch, (x_rows, w_rows, kb, groups, xs, ws, full, empty, worker, KU, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
