"""How keys of mla_decode_hopper come into shared memory: by the copy engine, an FP8 cache's through four warps.

The programs of a pair need the same keys: each brings half of them to both, where a place is free in both. An FP8
cache's latents come into the second half of their place, and are scaled from there into the whole of it, to f16.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kernels import hopper
from kernels.hopper import barrier, load_block, view

# Barriers, the first of each kind: for what has come; for what is free again; the other warpgroup; for raw FP8.
READY, FREE, MET, RAW = gl.constexpr(0), gl.constexpr(8), gl.constexpr(16), gl.constexpr(24)
# Bytes of shared memory: four halves of blocks; weights and rotated keys; barriers.
WEIGHTS_AT = gl.constexpr(4 * 64 * 256 * 2)
BARS_AT = gl.constexpr(WEIGHTS_AT + 3 * 64 * 64 * 2)
_ENTRIES = hopper.first_descriptor("decode_blocks")
BYTES = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))  # of four e4m3 in an int32


@gluon.jit
def place(HALF: gl.constexpr, phase, FP8: gl.constexpr):
    """Where half a block lies: half 3 is needed first, half 2's place is free first: they change places (not FP8)."""
    return HALF if HALF < 2 or FP8 else HALF ^ phase


@gluon.jit
def _entry(table, token, end, PAGE: gl.constexpr):
    """Number of the cache entry of a block's first token; beyond `end`, of the last block."""
    token = gl.minimum(token, (end - 1) // 64 * 64)
    return gl.load(table + token // PAGE) * PAGE + token % PAGE


@gluon.jit
def _prefetch_block(cache, entry, WIDTH: gl.constexpr):
    """Ask for half of a block of 64 entries into L2, in one piece; the other program asks for the other half."""
    at = cache + (entry + gl.program_id(0) % 2 * 32).to(gl.int64) * WIDTH
    hopper.prefetch(at, 32 * WIDTH * (cache.dtype.element_ty.primitive_bitwidth // 8))


@gluon.jit
def _fetch_half(bars, entry, step, HALF: gl.constexpr):
    """Fetch 128 of the 256 latents of half a block for both programs."""
    at = place(HALF, step & 1, False)
    first = gl.program_id(0) % 2 * 128
    mbarrier.wait(bars.index(FREE + at), (step + 1) & 1)  # at once in the first step
    mbarrier.expect(bars.index(READY + at), 64 * 256 * 2)
    for c in gl.static_range(0, 128, 64):
        to, column = at * (64 * 256 * 2) + (first + c) * (64 * 2), HALF % 2 * 256 + first + c
        hopper.load_to_both(entry, column, to, BARS_AT + at * 8, _ENTRIES)


@gluon.jit
def _fetch_rope(
    entries, ropes, bars, entry, step, B: gl.constexpr, ROPE: gl.constexpr, COLUMN: gl.constexpr
):
    ready = bars.index(READY + 4 + B)
    mbarrier.wait(bars.index(FREE + 4 + B), (step + 1) & 1)
    mbarrier.expect(ready, 64 * ROPE * 2)
    load_block(entries, [entry, COLUMN], ready, ropes.index((2 - B) * 64 // ROPE))


@gluon.jit
def _fetch_bf16(
    rotated, cache, ropes, bars, table, start, end, PAGE: gl.constexpr, ROPE: gl.constexpr
):
    """Fetch a split, in the order in which places become free; by then a block is in L2."""
    entry0 = _entry(table, start, end, PAGE)
    entry1 = _entry(table, start + 64, end, PAGE)
    for step in range(gl.cdiv(end - start, 128)):
        next0 = _entry(table, start + step * 128 + 128, end, PAGE)  # before they are needed
        next1 = _entry(table, start + step * 128 + 192, end, PAGE)
        _fetch_half(bars, entry0, step, 0)
        _fetch_rope(rotated, ropes, bars, entry0, step, 0, ROPE, 512)
        _prefetch_block(cache, entry1, 512 + ROPE)
        _fetch_half(bars, entry0, step, 1)
        _fetch_half(bars, entry1, step, 3)
        _fetch_half(bars, entry1, step, 2)
        _fetch_rope(rotated, ropes, bars, entry1, step, 1, ROPE, 512)
        _prefetch_block(cache, next0, 512 + ROPE)
        entry0, entry1 = next0, next1


@gluon.jit
def _ask(
    entries, cache, quarters, bars, entry, left, step, HALF: gl.constexpr, WIDTH: gl.constexpr
):
    """Fetch 128 latents of half a block in e4m3 into the second half of their place; return their scales [64]."""
    cta = gl.program_id(0) % 2
    mbarrier.wait(bars.index(FREE + HALF), (step + 1) & 1)
    mbarrier.expect(bars.index(RAW + HALF), 64 * 128)
    to = quarters.index(4 * HALF + 2 * cta + 1)
    load_block(entries, [entry, HALF % 2 * 64 + cta * 32], bars.index(RAW + HALF), to)
    row = gl.arange(0, 64, gl.SliceLayout(1, BYTES))
    at = cache + (entry + row).to(gl.int64) * (WIDTH // 4) + 128 + HALF % 2 * 2 + cta
    return gl.load(at, mask=row < left, other=0.0)


@gluon.jit
def _scaled(values, scale):
    """Four e4m3 in an int32 [64, 32] times scale [64], in f16 (bf16: thrice the work): two in an int32 [64, 64]."""
    both = gl.inline_asm_elementwise(
        "{ .reg .b16 s; cvt.rn.f16.f32 s, $1; mov.b32 $0, {s, s}; }", "=r,f", [scale], dtype=gl.int32,
        is_pure=True, pack=1,
    )  # fmt: skip
    low, high = gl.inline_asm_elementwise(
        """{ .reg .b16 l, h; .reg .b32 x, y;
        mov.b32 {l, h}, $2;
        cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h;
        mul.rn.f16x2 $0, x, $3; mul.rn.f16x2 $1, y, $3; }""",
        "=r,=r,r,r", [values, both[:, None]],
        dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return gl.join(low, high).reshape(64, 64)


@gluon.jit
def _scale_half(places, quarters, scale, left, bars, step, HALF: gl.constexpr):
    """Scale this program's part of half a block where it lies, and copy it to the other program."""
    cta = gl.program_id(0) % 2
    mbarrier.wait(bars.index(RAW + HALF), step & 1)
    values = quarters.index(4 * HALF + 2 * cta + 1).load(BYTES)
    if left < 64:  # slots never written may hold NaN
        row = gl.arange(0, 64, gl.SliceLayout(1, BYTES))
        values = gl.where((row < left)[:, None], values, 0)
    barrier()  # all has been read
    places.index(2 * HALF + cta).store(_scaled(values, scale))
    fence_async_shared()
    barrier()
    hopper.copy_to_other(HALF * 32768 + cta * 16384, BARS_AT + HALF * 8, 16384)
    mbarrier.expect(bars.index(READY + HALF), 16384)  # of the other's part


@gluon.jit
def _fetch_fp8(
    entries, rotated, cache, keys, ropes, bars, table, start, end, PAGE: gl.constexpr, ROPE: gl.constexpr,
):  # fmt: skip
    """Fetch a split of an FP8 cache, in the order in which places become free."""
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
        a = _ask(entries, cache, quarters, bars, entry0, left, step, 0, WIDTH)
        b = _ask(entries, cache, quarters, bars, entry0, left, step, 1, WIDTH)
        _scale_half(places, quarters, a, left, bars, step, 0)
        # before places of the odd block: where this one is the last, the even warpgroup frees them behind clearing it
        _fetch_rope(rotated, ropes, bars, entry0, step, 0, ROPE, WIDTH // 2 - ROPE)
        c = _ask(entries, cache, quarters, bars, entry1, left - 64, step, 2, WIDTH)
        d = _ask(entries, cache, quarters, bars, entry1, left - 64, step, 3, WIDTH)
        _scale_half(places, quarters, b, left, bars, step, 1)
        _scale_half(places, quarters, d, left - 64, bars, step, 3)
        _scale_half(places, quarters, c, left - 64, bars, step, 2)
        _fetch_rope(rotated, ropes, bars, entry1, step, 1, ROPE, WIDTH // 2 - ROPE)
        _prefetch_block(cache, next0, WIDTH // 4)
        _prefetch_block(cache, next1, WIDTH // 4)
        entry0, entry1 = next0, next1


@gluon.jit
def fetch(
    source, held, bars, start, end, PAGE: gl.constexpr, FP8: gl.constexpr, ROPE: gl.constexpr,
):  # fmt: skip
    """Fetch keys of a split: arguments as mla_decode_hopper.decode_blocks has them."""
    hopper.meet()
    entries, rotated, cache, table = source
    _, _, keys, ropes, _, _ = held
    if FP8:
        _fetch_fp8(entries, rotated, cache, keys, ropes, bars, table, start, end, PAGE, ROPE)
    else:
        _fetch_bf16(rotated, cache, ropes, bars, table, start, end, PAGE, ROPE)
    last = gl.cdiv(end - start, 128) - 1
    # The other program arrives here, when all that it was sent is there: this one stays.
    mbarrier.wait(bars.index(FREE + 0), last & 1)
    mbarrier.wait(bars.index(FREE + 1), last & 1)
    mbarrier.wait(bars.index(FREE + place(3, last & 1, FP8)), last & 1)
