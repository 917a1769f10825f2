"""What becomes of products in registers (stream_hopper): scaled sums, SwiGLU, quantisation; for Hopper in Gluon."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kernels.hopper import barrier
from kernels.quant import quotients


@gluon.jit
def add_scaled(product, scale, acc):
    """acc + product * scale, in place among the products: the compiler would hold all products to the end."""
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, scale, acc], dtype=gl.float32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _swiglu(gate, up):
    return gate / (1.0 + gl.exp(-gate)) * up


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


@gluon.jit
def store_hidden(
    gate, up, q, q_scales, hidden, blocks, group, item, row, ok, peaks, met, ACC: gl.constexpr,
    WG: gl.constexpr, BM: gl.constexpr, MIN: gl.constexpr,
):  # fmt: skip
    """SwiGLU and quantisation of a group whose sums [64, BM] are whole: the same bits as from stored sums."""
    column = group * 128 + gl.arange(0, BM, gl.SliceLayout(0, ACC))
    if BM == 64:
        column += WG * 64
    inside = (column < hidden)[None, :]
    x = gl.where(inside, _swiglu(gate, up), 0.0)
    peak = _magnitude(x)
    if BM == 64:
        # The other half of the block's columns is the other warpgroup's.
        peaks.index(item % 2 * 2 + WG).store(peak)
        barrier()
        mbarrier.arrive(met, count=1)
        mbarrier.wait(met, item & 1)
        peak = gl.maximum(peak, peaks.index(item % 2 * 2 + 1 - WG).load(gl.SliceLayout(1, ACC)))
    scale = _block_scale(peak, MIN)
    at = q + row[:, None] * hidden + column[None, :]
    gl.store(at, _quotients(x, scale).to(gl.float8e4nv), mask=ok[:, None] & inside)
    if WG == 0 or BM == 128:
        gl.store(q_scales + row * blocks + group, scale, mask=ok)
