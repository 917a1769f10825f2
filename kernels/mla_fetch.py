"""How mla_hopper's keys come into shared memory: by the copy engine, an FP8 cache's through four warps that scale it.

An FP8 cache's latents are fetched into the second half of their place, and scaled from there into the whole of it.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kernels.hopper import barrier, load_block, tell, view

# Barriers, and who waits for them: for what has come; for what is free again; the other warpgroup; for raw FP8.
READY, FREE, MET, RAW = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2), gl.constexpr(3)
BYTES = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))  # of four e4m3 in an int32


@gluon.jit
def _entry(table, token, end, PAGE: gl.constexpr):
    """Number of the cache entry of a block's first token; beyond `end`, of the last block."""
    token = gl.minimum(token, (end - 1) // 64 * 64)
    return gl.load(table + token // PAGE) * PAGE + token % PAGE


@gluon.jit
def _fetch_half(entries, keys, bars, entry, step, HALF: gl.constexpr):
    mbarrier.wait(bars[FREE].index(HALF), (step + 1) & 1)  # at once in the first step
    mbarrier.expect(bars[READY].index(HALF), 64 * 256 * 2)
    load_block(entries, [entry, HALF % 2 * 256], bars[READY].index(HALF), keys.index(HALF))


@gluon.jit
def _fetch_rope(
    entries, ropes, bars, entry, step, B: gl.constexpr, ROPE: gl.constexpr,
    COLUMN: gl.constexpr,
):  # fmt: skip
    mbarrier.wait(bars[FREE].index(4 + B), (step + 1) & 1)
    mbarrier.expect(bars[READY].index(4 + B), 64 * ROPE * 2)
    load_block(
        entries, [entry, COLUMN], bars[READY].index(4 + B), ropes.index((2 - B) * 64 // ROPE)
    )


@gluon.jit
def _fetch_bf16(
    entries, rotated, keys, ropes, bars, table, start, end, PAGE: gl.constexpr,
    ROPE: gl.constexpr,
):  # fmt: skip
    """Fetch all keys of a split, in the order in which their places become free."""
    entry0 = _entry(table, start, end, PAGE)
    entry1 = _entry(table, start + 64, end, PAGE)
    for step in range(gl.cdiv(end - start, 128)):
        # asked for before they are needed
        next0 = _entry(table, start + step * 128 + 128, end, PAGE)
        next1 = _entry(table, start + step * 128 + 192, end, PAGE)
        _fetch_half(entries, keys, bars, entry0, step, 0)
        _fetch_rope(rotated, ropes, bars, entry0, step, 0, ROPE, 512)
        _fetch_half(entries, keys, bars, entry0, step, 1)
        _fetch_half(entries, keys, bars, entry1, step, 3)
        _fetch_half(entries, keys, bars, entry1, step, 2)
        _fetch_rope(rotated, ropes, bars, entry1, step, 1, ROPE, 512)
        entry0, entry1 = next0, next1


@gluon.jit
def _ask(entries, scales, places, bars, entry, left, step, HALF: gl.constexpr, WIDTH: gl.constexpr):
    """Fetch half a block in e4m3 into the second half of its place; return its scales, two of [64]."""
    mbarrier.wait(bars[FREE].index(HALF), (step + 1) & 1)
    mbarrier.expect(bars[RAW].index(HALF), 64 * 256)
    load_block(entries, [entry, HALF % 2 * 64], bars[RAW].index(HALF), places.index(2 * HALF + 1))
    row = gl.arange(0, 64, gl.SliceLayout(1, BYTES))
    at = scales + (entry + row).to(gl.int64) * (WIDTH // 4) + 128 + HALF % 2 * 2
    return gl.load(at, mask=row < left, other=0.0), gl.load(at + 1, mask=row < left, other=0.0)


@gluon.jit
def _scaled(values, scale, left):
    """Four e4m3 in an int32 [64, 32] times scale [64], in fp32: bf16, two in an int32 [64, 64]; 0 from row `left`."""
    row = gl.arange(0, 64, gl.SliceLayout(1, BYTES))
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b16 l, h, a, b, c, d;
        .reg .b32 x, y;
        .reg .f32 e, f, g, i;
        mov.b32 {l, h}, $2;
        cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h;
        mov.b32 {a, b}, x; mov.b32 {c, d}, y;
        cvt.f32.f16 e, a; cvt.f32.f16 f, b; cvt.f32.f16 g, c; cvt.f32.f16 i, d;
        mul.f32 e, e, $3; mul.f32 f, f, $3; mul.f32 g, g, $3; mul.f32 i, i, $3;
        cvt.rn.bf16x2.f32 $0, f, e; cvt.rn.bf16x2.f32 $1, i, g;
        }""",
        "=r,=r,r,f", [gl.where((row < left)[:, None], values, 0), scale[:, None]],
        dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return gl.join(low, high).reshape(64, 64)


@gluon.jit
def _scale_half(places, quarters, scale0, scale1, left, bars, step, HALF: gl.constexpr):
    """Scale half a block where it lies: what has come stands in its place's third and fourth quarter."""
    mbarrier.wait(bars[RAW].index(HALF), step & 1)
    places.index(2 * HALF).store(_scaled(quarters.index(4 * HALF + 2).load(BYTES), scale0, left))
    values = quarters.index(4 * HALF + 3).load(BYTES)
    barrier()  # all has been read
    places.index(2 * HALF + 1).store(_scaled(values, scale1, left))
    fence_async_shared()
    tell(bars[READY].index(HALF))


@gluon.jit
def _fetch_fp8(
    entries, rotated, scales, keys, ropes, bars, table, start, end, PAGE: gl.constexpr,
    ROPE: gl.constexpr,
):  # fmt: skip
    """As `_fetch_bf16`, from an FP8 cache."""
    WIDTH: gl.constexpr = 512 + 16 + 2 * ROPE
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32, rank=2)
    places = view(keys, gl.int32, [8, 64, 64], WORDS)
    quarters = view(keys, gl.int32, [16, 64, 32], WORDS)
    entry0 = _entry(table, start, end, PAGE)
    entry1 = _entry(table, start + 64, end, PAGE)
    for step in range(gl.cdiv(end - start, 128)):
        left = end - start - step * 128
        next0 = _entry(table, start + step * 128 + 128, end, PAGE)
        next1 = _entry(table, start + step * 128 + 192, end, PAGE)
        a0, a1 = _ask(entries, scales, places, bars, entry0, left, step, 0, WIDTH)
        b0, b1 = _ask(entries, scales, places, bars, entry0, left, step, 1, WIDTH)
        d0, d1 = _ask(entries, scales, places, bars, entry1, left - 64, step, 3, WIDTH)
        _scale_half(places, quarters, a0, a1, left, bars, step, 0)
        _fetch_rope(rotated, ropes, bars, entry0, step, 0, ROPE, WIDTH // 2 - ROPE)
        c0, c1 = _ask(entries, scales, places, bars, entry1, left - 64, step, 2, WIDTH)
        _scale_half(places, quarters, b0, b1, left, bars, step, 1)
        _scale_half(places, quarters, d0, d1, left - 64, bars, step, 3)
        _scale_half(places, quarters, c0, c1, left - 64, bars, step, 2)
        _fetch_rope(rotated, ropes, bars, entry1, step, 1, ROPE, WIDTH // 2 - ROPE)
        entry0, entry1 = next0, next1


@gluon.jit
def fetch(
    entries, rotated, scales, keys, ropes, ready, free, met, raw, table, start, end, PAGE: gl.constexpr,
    FP8: gl.constexpr, ROPE: gl.constexpr,
):  # fmt: skip
    """Fetch all keys of a split: entries, rotated and scales as mla_hopper.decode_blocks has them."""
    bars = (ready, free, met, raw)
    if FP8:
        _fetch_fp8(entries, rotated, scales, keys, ropes, bars, table, start, end, PAGE, ROPE)
    else:
        _fetch_bf16(entries, rotated, keys, ropes, bars, table, start, end, PAGE, ROPE)
