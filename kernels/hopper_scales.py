"""Scales of products whose rows are x's, loaded a stage ahead, or more and kept in lanes; for Hopper in Gluon.

In assembly: the compiler would move what it loads to other registers, or to a uniform one, and wait for it there.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

_WARP = gl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 31, -1;")
_FOUR = gl.constexpr("shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, -1;")


@gluon.jit
def scale_addresses(x_scales, w_scales, row, M, kb, tile, tile2):
    """Where the scales of rows and of two tiles begin, one address per row [64]."""
    nothing = row * 0
    x = x_scales + gl.minimum(row, M - 1) * kb
    return x, w_scales + (tile * kb + nothing), w_scales + (tile2 * kb + nothing)


@gluon.jit
def _load(at, block, kb, WIDE: gl.constexpr):
    """Scales of two blocks from `block` on, as tensors of at's shape; behind K any: products there are zero."""
    if WIDE:
        at += gl.minimum(block, kb - 2)
        a, b = gl.inline_asm_elementwise(
            "ld.global.v2.f32 {$0, $1}, [$2];", "=f,=f,l", [at], dtype=(gl.float32, gl.float32),
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        a = gl.load(at + gl.minimum(block, kb - 1))
        b = gl.load(at + gl.minimum(block + 1, kb - 1))
    return a, b


@gluon.jit
def load_scales(at, block, kb, WIDE: gl.constexpr):
    """Scales of two blocks from `block` on, each: of rows of x [64], of the first tile and of the second.

    WIDE: by 8 bytes, which takes addresses that are multiples of 8 and an even kb.
    """
    return (
        _load(at[0], block, kb, WIDE),
        _load(at[1], block, kb, WIDE),
        _load(at[2], block, kb, WIDE),
    )


@gluon.jit
def product(x, w):
    """x * w here and not later: the next scales are loaded into the registers of both."""
    return gl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, w], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def products_of(x, w):
    """Two products, of tensors in order."""
    return product(x[0], w[0]), product(x[1], w[1])


@gluon.jit
def scales_of_rows(scales, at, block, last):
    """Of rows one of 4 scales from `block` on, none behind `last`: four lanes have a row. at [64]: a row's first."""
    return gl.inline_asm_elementwise(
        """{ .reg .u32 t; .reg .u64 a;
        mov.u32 t, %laneid; and.b32 t, t, 3; add.u32 t, t, $3; min.u32 t, t, $4; add.u32 t, t, $2;
        mad.wide.u32 a, t, 4, $1; ld.global.f32 $0, [a]; }""", "=f,l,r,r,r", [scales, at, block, last],
        dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def scales_of_tiles(scales, at, at2, block, last):
    """One of the 16 scales from `block` on, none behind `last`, of each of two tiles: by lane."""
    return gl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .u32 t, b; .reg .u64 a;
        mov.u32 t, %laneid; setp.lt.u32 p, t, 16; and.b32 b, t, 15; add.u32 b, b, $4; min.u32 b, b, $5;
        selp.b32 t, $2, $3, p; add.u32 t, t, b; mad.wide.u32 a, t, 4, $1; ld.global.f32 $0, [a]; }""",
        "=f,l,r,r,r,r", [scales, at, at2, block, last], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def of_lane(value, lane, PTX: gl.constexpr = _WARP):
    """What a lane of the warp has, or with _FOUR one of every four."""
    return gl.inline_asm_elementwise(
        PTX, "=f,f,r", [value, lane], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def product_scale(rows, tiles, k, j, TILE: gl.constexpr):
    """Of block k + j, by scales that `scales_of_rows` and `scales_of_tiles` have: each row's times the tile's."""
    return product(of_lane(rows, k % 4 + j, _FOUR), of_lane(tiles, k % 16 + j + TILE * 16))
