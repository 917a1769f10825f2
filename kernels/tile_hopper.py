"""Many-row FP8 products for Hopper, in Gluon: one warp fetches tiles, two warpgroups multiply them.

Arithmetic is all the work. Two programs with neighbouring rows of x are a cluster: each fetches half of the weights for
both. A unit of theirs is 2 x 128 rows of x times two weight tiles, gate and up of the same columns or neighbours: a
block of x serves both, 64 rows of it a warpgroup. Of units that do not fill all SMs each becomes two small ones: of
2 x 64 rows for gate and up, whose columns the warpgroups then divide, else of one tile.

A producer warp keeps a ring of stages full, each of 128 columns with their scales. One warpgroup's products run while
the other scales, so what a block needs before its first product is looked up while the last products before it run.
A sum's order is ascending along K, each block of 128 columns after scaling, as everywhere (block_gemm, stream).
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
from kernels.hopper_epilogue import add_scaled, hidden, store_wide
from kernels.hopper_scales import of_lane, product
from kernels.reference.quant import SCALE_MIN

_MIN = gl.constexpr(SCALE_MIN)
_DEPTH = gl.constexpr(
    8
)  # blocks of 256 rows that are multiplied together: weights come from memory once for all
STAGES = gl.constexpr(4)
# bytes of shared memory: stages' rows of x, their weights, barriers (full, empty, of warpgroups), scales of rows
_W_AT = gl.constexpr(STAGES * 128 * 128)
_BARS = gl.constexpr(_W_AT + STAGES * 256 * 128)
_SCALES = gl.constexpr(_BARS + 512)
_EMPTY, _MET = gl.constexpr(STAGES), gl.constexpr(2 * STAGES)
_W_BLOCK = hopper.first_descriptor("tile_units")


@gluon.jit
def _place(t, size, SMALL: gl.constexpr):
    """Which block of 256 rows and which of columns has unit t, and the first of this program's rows."""
    _, _, _, _, _, big, row_blocks, columns, _, _, _ = size
    t = big + t // 2 if SMALL else t
    first = t // (_DEPTH * columns) * _DEPTH
    height = gl.minimum(row_blocks - first, _DEPTH)
    within = t - first * columns
    return within // height, (first + within % height) * 256 + gl.program_id(0) % 2 * 128


@gluon.jit
def _next(b, phase):
    """The stage after stage b of the ring, and its phase."""
    last = b == STAGES - 1
    return gl.where(last, 0, b + 1), gl.where(last, 1 - phase, phase)


@gluon.jit
def _fetch(
    w_rows, x_rows, x_scales, size, xs, bars, b, phase, SWIGLU: gl.constexpr, SMALL: gl.constexpr
):
    """Fetch a pair's units, big or small ones, from stage b of the ring on."""
    BM: gl.constexpr = 64 if SMALL and SWIGLU else 128
    W: gl.constexpr = (
        64 if SMALL and not SWIGLU else 128
    )  # weight rows for each program of the pair to fetch
    XR: gl.constexpr = x_rows.block_shape[0]
    WR: gl.constexpr = w_rows.block_shape[0]
    _, x_stride, _, kb, units, big, _, _, sub_rows, _, _ = size
    cta = gl.program_id(0) % 2
    end = (units - big) * 2 if SMALL else big
    for t in range(gl.program_id(0) // 2, end, gl.num_programs(0) // 2):
        n, x_row = _place(t, size, SMALL)
        w_row = n * (128 if SWIGLU else 256) + cta * (sub_rows if W == 128 else 64)
        if SMALL and SWIGLU:
            x_row += t % 2 * 64
        elif SMALL:
            w_row += t % 2 * 128
        for k in range(kb):
            ready = bars.index(b)
            mbarrier.wait(bars.index(_EMPTY + b), 1 - phase)  # at once in the first round
            mbarrier.expect(ready, (BM + 2 * W) * 128 + BM * 4)
            for r in gl.static_range(0, W, WR):
                to = _W_AT + b * (256 * 128) + (cta * W + r) * 128
                hopper.load_to_both(w_row + r, k * 128, to, _BARS + b * 8, _W_BLOCK)
            for r in gl.static_range(0, BM, XR):
                load_block(x_rows, [x_row + r, k * 128], ready, xs.index(b).slice(r, XR, 0))
            at = x_scales + x_row + k * x_stride
            hopper.load_row(at, _SCALES + b * 512, _BARS + b * 8, BM * 4)
            b, phase = _next(b, phase)
    return b, phase


@gluon.jit
def _produce(w_rows, x_rows, x_scales, size, xs, bars, SWIGLU: gl.constexpr):
    """Fetch all of a pair's units."""
    hopper.meet()
    gdc_wait()
    b, phase = gl.program_id(0) * 0, gl.program_id(0) * 0
    for small in gl.static_range(2):
        b, phase = _fetch(w_rows, x_rows, x_scales, size, xs, bars, b, phase, SWIGLU, small == 1)
    for _ in range(STAGES):  # the other program arrives here, so this one stays
        mbarrier.wait(bars.index(_EMPTY + b), 1 - phase)
        b, phase = _next(b, phase)


@gluon.jit
def _row_of_scales(at, first, end):
    """Numbers first .. first + 32 of a tile's scales, below `end`, one in each lane of a warp."""
    return gl.inline_asm_elementwise(
        """{ .reg .u32 t; .reg .u64 a;
        mov.u32 t, %laneid; add.u32 t, t, $2; min.u32 t, t, $3;
        mad.wide.u32 a, t, 4, $1; ld.global.f32 $0, [a]; }""", "=f,l,r,r", [at, first, end - 1],
        dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _stage(xs, ws, b, ROW: gl.constexpr, COLUMN: gl.constexpr, N: gl.constexpr):
    """A warpgroup's rows of x in a stage, and its rows of both weight tiles."""
    w = ws.index(b)
    w2 = w.slice(128 + COLUMN, N, 0).permute((1, 0))
    return xs.index(b).slice(ROW, 64, 0), w.slice(COLUMN, N, 0).permute((1, 0)), w2


@gluon.jit
def _ready(b, phase, row):
    """Wait for stage b: the scales of rows of x there."""
    hopper.wait(_BARS + b * 8, phase)
    return hopper.at_byte(_SCALES + b * 512 + row * 4)


@gluon.jit
def _sums(
    w_at, w_at2, kb, xs, ws, both, b, phase, WG: gl.constexpr, BM: gl.constexpr, ACC: gl.constexpr
):
    """Sums [64, BM] of both tiles of a unit, whose first stage is b."""
    ROW: gl.constexpr = WG * 64 if BM == 128 else 0
    COLUMN: gl.constexpr = WG * 64 if BM == 64 else 0
    row = ROW + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    zeros = gl.zeros([64, BM], gl.float32, ACC)
    a0, a1 = zeros, zeros
    scales, scales2 = _row_of_scales(w_at, 0, kb), _row_of_scales(w_at2, 0, kb)
    later, later2 = _row_of_scales(w_at, 32, kb), _row_of_scales(w_at2, 32, kb)
    x_scale = _ready(b, phase, row)
    scale = product(x_scale, of_lane(scales, 0))
    x, w, w2 = _stage(xs, ws, b, ROW, COLUMN, BM)
    for k in range(kb):
        p = warpgroup_mma(x, w, zeros, use_acc=False, is_async=True)
        if BM == 64:
            p2 = warpgroup_mma(x, w2, zeros, use_acc=False, is_async=True)
        scale2 = product(x_scale, of_lane(scales2, k))
        if k % 32 == 31:
            scales, scales2 = later, later2
            later, later2 = _row_of_scales(w_at, k + 33, kb), _row_of_scales(w_at2, k + 33, kb)
        w_scale = of_lane(scales, k + 1)
        p = warpgroup_mma_wait(1 if BM == 64 else 0, deps=(p,))
        a0 = add_scaled(p, scale[:, None], a0)
        if BM == 128:  # the other warpgroup's products run while this one scales
            p2 = warpgroup_mma(x, w2, p, use_acc=False, is_async=True)
        empty = _BARS + (_EMPTY + b) * 8
        b, phase = _next(b, phase)
        x, w, w2 = _stage(xs, ws, b, ROW, COLUMN, BM)
        if k + 1 < kb:
            x_scale = _ready(b, phase, row)
        scale = product(x_scale, w_scale)
        p2 = warpgroup_mma_wait(0, deps=(p2,))
        hopper.arrive(both, empty)
        a1 = add_scaled(p2, scale2[:, None], a1)
    return a0, a1, b, phase


@gluon.jit
def _sum(w_at, kb, xs, ws, both, b, phase, WG: gl.constexpr, ACC: gl.constexpr):
    """Sums [64, 128] of a unit of one tile, whose first stage is b; kb is a multiple of 4."""
    row = WG * 64 + gl.arange(0, 64, gl.SliceLayout(1, ACC))
    zeros = gl.zeros([64, 128], gl.float32, ACC)
    a = zeros
    scales, later = _row_of_scales(w_at, 0, kb), _row_of_scales(w_at, 32, kb)
    x_scale = _ready(b, phase, row)
    for k in range(0, kb, 4):
        x, w, _ = _stage(xs, ws, b, WG * 64, 0, 128)
        p = warpgroup_mma(x, w, zeros, use_acc=False, is_async=True)
        scale = product(x_scale, of_lane(scales, k))
        for j in gl.static_range(1, 4):  # a product runs while the one before is added
            empty = _BARS + (_EMPTY + b) * 8
            b, phase = _next(b, phase)
            x_scale = _ready(b, phase, row)
            x, w, _ = _stage(xs, ws, b, WG * 64, 0, 128)
            p2 = warpgroup_mma(x, w, zeros, use_acc=False, is_async=True)
            scale2 = product(x_scale, of_lane(scales, k + j))
            p = warpgroup_mma_wait(1, deps=(p,))
            hopper.arrive(both, empty)
            a = add_scaled(p, scale[:, None], a)
            p, scale = p2, scale2
        if k % 32 == 28:
            scales, later = later, _row_of_scales(w_at, k + 36, kb)
        empty = _BARS + (_EMPTY + b) * 8
        b, phase = _next(b, phase)
        if k + 4 < kb:
            x_scale = _ready(b, phase, row)
        p = warpgroup_mma_wait(0, deps=(p,))
        hopper.arrive(both, empty)
        a = add_scaled(p, scale[:, None], a)
    return a, b, phase


@gluon.jit
def _multiply(
    w_scales, out, out_scales, size, memory, both, b, phase, WG: gl.constexpr, SWIGLU: gl.constexpr,
    SMALL: gl.constexpr,
):  # fmt: skip
    """Multiply a pair's units, big or small ones, from stage b of the ring on."""
    BM: gl.constexpr = 64 if SMALL and SWIGLU else 128
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 32])
    M, x_stride, width, kb, units, big, _, _, _, sub_tiles, tiles = size
    xs, ws, bars, peaks = memory
    end = (units - big) * 2 if SMALL else big
    item = b * 0
    for t in range(gl.program_id(0) // 2, end, gl.num_programs(0) // 2):
        n, m = _place(t, size, SMALL)
        tile = n if SWIGLU else n * 2
        if SMALL and SWIGLU:
            m += t % 2 * 64
        else:
            m += WG * 64
            if SMALL:
                tile = gl.minimum(tile + t % 2, tiles - 1)
        row = m + gl.arange(0, 64, gl.SliceLayout(1, ACC))
        w_at, w_at2 = w_scales + tile * kb, w_scales + gl.minimum(tile + sub_tiles, tiles - 1) * kb
        if SWIGLU:
            a0, a1, b, phase = _sums(w_at, w_at2, kb, xs, ws, both, b, phase, WG, BM, ACC)
            q, scale = hidden(a0, a1, width, n, item, peaks, bars.index(_MET), ACC, WG, BM, _MIN)
            store_wide(q, out, width, m, M, n * 128 + (WG * 64 if SMALL else 0), width)
            if WG == 0 or not SMALL:
                gl.store(out_scales + n * x_stride + row, scale, mask=row < M)
        elif SMALL:
            a0, b, phase = _sum(w_at, kb, xs, ws, both, b, phase, WG, ACC)
            store_wide(a0.to(out.dtype.element_ty), out, width, m, M, n * 256 + t % 2 * 128, width)
        else:
            a0, a1, b, phase = _sums(w_at, w_at2, kb, xs, ws, both, b, phase, WG, BM, ACC)
            store_wide(a0.to(out.dtype.element_ty), out, width, m, M, n * 256, width)
            store_wide(a1.to(out.dtype.element_ty), out, width, m, M, n * 256 + 128, width)
        item += 1
    return b, phase


@gluon.jit
def _consume(w_scales, out, out_scales, size, memory, WG: gl.constexpr, SWIGLU: gl.constexpr):
    hopper.meet()
    gdc_wait()
    b, phase = gl.program_id(0) * 0, gl.program_id(0) * 0
    both = hopper.of_both()
    for small in gl.static_range(2):
        b, phase = _multiply(
            w_scales, out, out_scales, size, memory, both, b, phase, WG, SWIGLU, small == 1
        )


@hopper.paired(
    do_not_specialize=["M", "kb", "units", "big", "row_blocks", "columns", "sub_tiles", "tiles"]
)
def tile_units(
    w_rows, x_rows, x_scales, w_scales, out, out_scales, M, x_stride, width, kb, units, big, row_blocks, columns,
    sub_rows, sub_tiles, tiles, SWIGLU: gl.constexpr,
):  # fmt: skip
    """Products of x [M, K] with the rows of w; `units` cover all, of which the first `big` are not cut.

    w_rows, x_rows: descriptors of what a request fetches; x_scales [kb, x_stride]. The second tile is sub_rows further.
    With SWIGLU out is q [M, width] and out_scales [blocks, x_stride] has its scales.
    """
    gdc_launch_dependents()
    KIND: gl.constexpr = x_rows.layout
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ring = gl.allocate_shared_memory(gl.int32, [_BARS // 512 + 1 + STAGES, 1, 128], WORDS)
    hopper.check_base(ring, _BARS)
    xs = view(hopper.part(ring, 0, STAGES * 32), gl.float8e4nv, [STAGES, 128, 128], KIND)
    ws = view(hopper.part(ring, STAGES * 32, STAGES * 64), gl.float8e4nv, [STAGES, 256, 128], KIND)
    bars = view(ring.index(_BARS // 512), gl.int64, [64, 1], mbarrier.MBarrierLayout())
    peaks = gl.allocate_shared_memory(gl.int32, [4, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
        mbarrier.init(bars.index(_EMPTY + i), count=16)  # by the warps of both programs' warpgroups
    mbarrier.init(bars.index(_MET), count=2)
    fence_async_shared()
    barrier()
    size = M, x_stride, width, kb, units, big, row_blocks, columns, sub_rows, sub_tiles, tiles
    memory = xs, ws, bars, peaks
    gl.warp_specialize(
        [
            (_consume, (w_scales, out, out_scales, size, memory, 0, SWIGLU)),
            (_consume, (w_scales, out, out_scales, size, memory, 1, SWIGLU)),
            (hopper.meet, ()),
            (hopper.meet, ()),
            (_produce, (w_rows, x_rows, x_scales, size, xs, bars, SWIGLU)),
        ],
        [4, 2, 1, 1],
        [240, 24, 24, 24],
    )
