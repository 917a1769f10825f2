"""What becomes of products in registers: scaled sums, SwiGLU, quantisation; for Hopper in Gluon."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.hopper import barrier
from kernels.quant import quotients
from kernels.swiglu import swiglu as _swiglu


@gluon.jit
def add_scaled(product, scale, acc):
    """acc + product * scale, in place among the products: the compiler would hold all products to the end."""
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, scale, acc], dtype=gl.float32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _magnitude(x):
    """Bits of the largest magnitude of each row: NaN is the largest, so a bad number reaches the scale."""
    return gl.max(x.to(gl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@gluon.jit
def _block_scale(magnitude, MIN: gl.constexpr):
    peak = magnitude.to(gl.float32, bitcast=True)
    scale = gl.div_rn(peak, gl.full_like(peak, 448.0))
    return gl.where(scale < MIN, MIN, scale)


_quotients = gluon.jit(quotients.fn)
swiglu = gluon.jit(_swiglu.fn)


@gluon.jit
def hidden(
    gate, up, width, group, item, peaks, met, ACC: gl.constexpr, WG: gl.constexpr, BM: gl.constexpr,
    MIN: gl.constexpr,
):  # fmt: skip
    """SwiGLU of a group whose sums [64, BM] are whole, as e4m3, and its scales: the same bits as from stored sums."""
    column = group * 128 + gl.arange(0, BM, gl.SliceLayout(0, ACC))
    if BM == 64:
        column += WG * 64
    x = gl.where((column < width)[None, :], swiglu(gate, up), 0.0)
    peak = _magnitude(x)
    if BM == 64:
        # The other half of the block's columns is the other warpgroup's.
        peaks.index(item % 2 * 2 + WG).store(peak)
        barrier()
        mbarrier.arrive(met, count=1)
        mbarrier.wait(met, item & 1)
        peak = gl.maximum(peak, peaks.index(item % 2 * 2 + 1 - WG).load(gl.SliceLayout(1, ACC)))
    scale = _block_scale(peak, MIN)
    return _quotients(x, scale).to(gl.float8e4nv), scale


@gluon.jit
def store_hidden(
    gate, up, q, q_scales, width, blocks, group, item, row, ok, peaks, met, ACC: gl.constexpr,
    WG: gl.constexpr, BM: gl.constexpr, MIN: gl.constexpr,
):  # fmt: skip
    """SwiGLU and quantisation of a group whose sums [64, BM] are whole, to q [M, width] and its scales."""
    value, scale = hidden(gate, up, width, group, item, peaks, met, ACC, WG, BM, MIN)
    column = group * 128 + gl.arange(0, BM, gl.SliceLayout(0, ACC))
    if BM == 64:
        column += WG * 64
    at = q + row[:, None] * width + column[None, :]
    gl.store(at, value, mask=ok[:, None] & (column < width)[None, :])
    if WG == 0 or BM == 128:
        gl.store(q_scales + row * blocks + group, scale, mask=ok)


@gluon.jit
def quantise_rest(
    left, q, q_scales, width, blocks, first_block, block, first_row, M, MIN: gl.constexpr
):
    """Quantise 32 rows of a block of 128 columns of left [M, width - 128 * first_block] fp32, to q and its scales."""
    # a row of a warp
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [gl.num_warps(), 1], [1, 0])
    row = first_row + gl.arange(0, 32, gl.SliceLayout(1, LAYOUT))
    column = block * 128 + gl.arange(0, 128, gl.SliceLayout(0, LAYOUT))
    rest = width - first_block * 128
    ok = (row < M)[:, None] & (column < rest)[None, :]
    x = gl.load(left + row[:, None] * rest + column[None, :], mask=ok, other=0.0)
    scale = _block_scale(_magnitude(x), MIN)
    at = q + first_block * 128 + row[:, None] * width + column[None, :]
    gl.store(at, _quotients(x, scale).to(gl.float8e4nv), mask=ok)
    gl.store(q_scales + row * blocks + first_block + block, scale, mask=row < M)


@gluon.jit
def row_places(out, stride, places, row, ok, PLACED: gl.constexpr):
    """Where rows of out begin, in its elements, multiples of 8: by stride or, anywhere, as `stage.stage` noted it."""
    if PLACED:
        address = gl.load(places + 1 + row, mask=ok, other=0)
        size: gl.constexpr = out.dtype.element_ty.primitive_bitwidth // 8
        return gl.multiple_of((address - out.to(gl.int64)) // size, [8])
    return row.to(gl.int64) * stride


@gluon.jit
def store_wide(
    value, out, stride, first, M, column, end, places=None, PLACED: gl.constexpr = False
):
    """Store value [64, N] from row `first` and `column` on, below M and `end`: 16 bytes a thread, whole cache lines."""
    EACH: gl.constexpr = 128 // value.dtype.primitive_bitwidth  # columns of a thread
    ACROSS: gl.constexpr = value.shape[1] // EACH  # threads
    # the rows of a warp stay there
    WIDE: gl.constexpr = gl.BlockedLayout(
        [ACROSS // 2, EACH], [32 // ACROSS, ACROSS], [4, 1], [1, 0]
    )
    row = first + gl.arange(0, 64, gl.SliceLayout(1, WIDE))
    c = column + gl.arange(0, value.shape[1], gl.SliceLayout(0, WIDE))
    ok = row < M
    at = out + row_places(out, stride, places, row, ok, PLACED)[:, None] + c[None, :]
    gl.store(at, gl.convert_layout(value, WIDE), mask=ok[:, None] & (c < end)[None, :])
