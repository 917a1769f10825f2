"""Gate and up of wide experts for few rows on Hopper, in Gluon: one warp fetches, two warpgroups multiply.

A worker has items of 128 columns, gate and up, with which SwiGLU's numbers are quantised where they are summed. What
does not fill all SMs with these has gone before, as small items (stream_rows_hopper): their workers come here as they
end, the others at once, so that memory is never idle between the two, and at last what those summed is quantised.

A stage is two blocks of 128 columns of one tile, or of x for both: 256 bytes of a row come faster than twice 128. Rows
of x are the 64 rows of a wgmma, or 128, one half per warpgroup; with 64, each has half of both tiles. Scales are kept
in the lanes of a warp: shared memory feeds the products and takes what is fetched, and every cache line that a warp
looks up takes a turn there. A sum's order is ascending along K.
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
from kernels.hopper_epilogue import add_scaled, quantise_rest, store_hidden
from kernels.stream_fetch_hopper import WORKERS, fetch_w, fetch_x, next_stage


@gluon.jit
def _fetch(
    x_rows, w_rows, kb, hidden, ring, full, empty, BM: gl.constexpr, KU: gl.constexpr,
    STAGES: gl.constexpr, AFTER: gl.constexpr,
):  # fmt: skip
    """Fetch all of a worker's items, the first weights before the predecessor has ended."""
    XR: gl.constexpr = x_rows.block_shape[0]
    # with 16 rows of x, what stands in others is never stored
    X: gl.constexpr = XR if XR == 16 else BM
    worker = gl.program_id(0)
    for t in gl.static_range(2):
        mbarrier.expect(full.index(t), 128 * 128 * KU)
        fetch_w(w_rows, full.index(t), ring, t, worker * 128 + t * hidden, 0, 0, 128, KU)
    if not AFTER:
        gdc_wait()
    b, phase = worker * 0, worker * 0
    for item in range(hidden // (128 * WORKERS)):
        at = (item * WORKERS + worker) * 128
        for k in range(0, kb, KU):
            for t in gl.static_range(2):
                mbarrier.wait(empty.index(b), 1 - phase)  # at once in the first round
                if item + k > 0:
                    mbarrier.expect(full.index(b), 128 * 128 * KU)
                    fetch_w(w_rows, full.index(b), ring, b, at + t * hidden, k, 0, 128, KU)
                b, phase = next_stage(b, phase, STAGES)
            mbarrier.wait(empty.index(b), 1 - phase)
            mbarrier.expect(full.index(b), X * 128 * KU)
            fetch_x(x_rows, full.index(b), ring, b, k, 0, X, KU)
            b, phase = next_stage(b, phase, STAGES)


@gluon.jit
def _sums(
    x_scales, w_scales, x_at, w_at, w_at2, kb, ring, full, empty, b, phase, WG: gl.constexpr, BM: gl.constexpr,
    KU: gl.constexpr, STAGES: gl.constexpr, ACC: gl.constexpr,
):  # fmt: skip
    """Sums [64, BM] of both tiles of an item, whose first stage is b."""
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
def _multiply(
    x_scales, w_scales, left, M, kb, q, q_scales, hidden, ring, full, empty, peaks, met, WG: gl.constexpr,
    BM: gl.constexpr, KU: gl.constexpr, STAGES: gl.constexpr, AFTER: gl.constexpr, MIN: gl.constexpr,
):  # fmt: skip
    """Multiply a worker's items to q and q_scales, then quantise what it has of those before.

    A warpgroup has 64 rows of x and all columns of both tiles or, with 64 rows of x, half of the columns of both.
    """
    COLUMN: gl.constexpr = WG * 64 if BM == 64 else 0
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 32])
    worker = gl.program_id(0)
    tiles = gl.cdiv(hidden, 128)
    rounds = hidden // (128 * WORKERS)
    if not AFTER:
        gdc_wait()
    row = WG * 64 - COLUMN + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    ok = row < M
    b, phase = worker * 0, worker * 0
    for item in range(rounds):
        group = item * WORKERS + worker
        x_at = gl.minimum(row, M - 1) * kb
        a0, a1, b, phase = _sums(
            x_scales, w_scales, x_at, group * kb, (group + tiles) * kb, kb, ring, full, empty, b, phase, WG, BM, KU,
            STAGES, ACC,
        )  # fmt: skip
        store_hidden(
            a0, a1, q, q_scales, hidden, tiles, group, item, row, ok, peaks, met, ACC, WG, BM, MIN
        )
    if AFTER:
        gdc_wait()
        done = rounds * WORKERS
        for task in range(worker * 2 + WG, (tiles - done) * (BM // 32), WORKERS * 2):
            block, first = task // (BM // 32), task % (BM // 32) * 32
            quantise_rest(left, q, q_scales, hidden, tiles, done, block, first, M, MIN)


@gluon.jit(do_not_specialize=["M", "kb"])
def stream_hidden(
    x_rows, x_scales, w_rows, w_scales, left, M, kb, hidden, q, q_scales, BM: gl.constexpr,
    KU: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, AFTER: gl.constexpr, MIN: gl.constexpr,
):  # fmt: skip
    """SwiGLU of x [M, K] times gate and up, quantised: to q [M, hidden] and q_scales [M, tiles].

    x_rows, w_rows: descriptors of blocks of x and of gate and up, [2 * hidden, K]. As many columns are multiplied here
    as fill all workers, 128 for each. AFTER: the predecessor makes the others, fp32, in `left` [M, rest], and lets
    programs come when x is there.
    """
    gdc_launch_dependents()
    ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KU, 128, 128], x_rows.layout)
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
            (_multiply, (
                x_scales, w_scales, left, M, kb, q, q_scales, hidden, ring, full, empty, peaks, met, 0, BM,
                KU, STAGES, AFTER, MIN)),
            (_multiply, (
                x_scales, w_scales, left, M, kb, q, q_scales, hidden, ring, full, empty, peaks, met, 1, BM,
                KU, STAGES, AFTER, MIN)),
            (_fetch, (x_rows, w_rows, kb, hidden, ring, full, empty, BM, KU, STAGES, AFTER)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
