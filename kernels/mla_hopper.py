"""The inner loop of MLA decode for Hopper in Gluon: one or four warps fetch keys, two warpgroups attend to them.

As `_decode` of mla_decode, for latents of 512, pages of a multiple of 64 tokens and heads in blocks of 64. One program
holds 64 queries and one block of 128 keys in shared memory, the keys in four chunks of 128 latents. Each warpgroup
scores half of the keys and sums half of the latents. A chunk's sums are the last use of its keys: the next block's
are fetched there while the other chunks are still multiplied, and its scores begin with the chunk that came first.
An FP8 cache passes through the registers of the fetching warps, which scale it.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.hopper import barrier, load_block, view

HEADS = 64  # of a program
LATENTS = 512
FETCH_REGISTERS = gl.constexpr(64)  # per thread, where it scales an FP8 cache


@gluon.jit
def _entry(table, token, end, PAGE: gl.constexpr):
    """Number of the cache entry of a block's first token; beyond `end`, of the last block."""
    token = gl.minimum(token, (end - 1) // 64 * 64)
    return gl.load(table + token // PAGE) * PAGE + token % PAGE


@gluon.jit
def _fetch(
    entries, rotated, blocks, rope_blocks, ready, free, table, start, end, PAGE: gl.constexpr,
    ROPE: gl.constexpr,
):  # fmt: skip
    """Fetch all keys of a split, chunk by chunk: blocks of 64 x 64 in the order of a [128, 128] tile."""
    entry0 = _entry(table, start, end, PAGE)
    entry1 = _entry(table, start + 64, end, PAGE)
    for step in range(gl.cdiv(end - start, 128)):
        # asked for before they are needed
        next0 = _entry(table, start + step * 128 + 128, end, PAGE)
        next1 = _entry(table, start + step * 128 + 192, end, PAGE)
        for c in gl.static_range(4):
            mbarrier.wait(free.index(c), (step + 1) & 1)  # at once in the first step
            mbarrier.expect(ready.index(c), 128 * 128 * 2)
            for i in gl.static_range(2):
                at = c * 128 + i * 64
                load_block(entries, [entry0, at], ready.index(c), blocks.index(c * 4 + 2 * i))
                load_block(entries, [entry1, at], ready.index(c), blocks.index(c * 4 + 2 * i + 1))
        mbarrier.wait(free.index(4), (step + 1) & 1)
        mbarrier.expect(ready.index(4), 128 * ROPE * 2)
        load_block(rotated, [entry0, 512], ready.index(4), rope_blocks.index(0))
        load_block(rotated, [entry1, 512], ready.index(4), rope_blocks.index(1))
        entry0, entry1 = next0, next1


@gluon.jit
def _entries(table, token, end, PAGE: gl.constexpr, ROWS: gl.constexpr):
    """Numbers [128] of the cache entries of the keys from `token` on."""
    row = gl.arange(0, 128, ROWS)
    token0 = _entry(table, token, end, PAGE)
    token1 = _entry(table, token + 64, end, PAGE)
    return gl.where(row < 64, token0 + row, token1 + row - 64)


@gluon.jit
def _prefetch(cache, table, token, end, PAGE: gl.constexpr, WIDTH: gl.constexpr):
    """Ask for the entries of the keys from `token` on to be brought into L2."""
    ROWS: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    at = cache + _entries(table, token, end, PAGE, ROWS).to(gl.int64) * (WIDTH // 4)
    nbytes = gl.full([128], WIDTH, gl.int32, ROWS)
    gl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
        [at.to(gl.int64, bitcast=True), nbytes], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _read_chunk(cache, scales, entry, left, CHUNK: gl.constexpr, WIDTH: gl.constexpr, L: gl.constexpr):  # fmt: skip
    """Latents of a chunk, four e4m3 in an int32 [128, 32], and scales [128]; zeros from the key `left` on."""
    ok = gl.arange(0, 128, gl.SliceLayout(1, L)) < left
    at = entry.to(gl.int64) * (WIDTH // 4)
    column = CHUNK * 32 + gl.arange(0, 32, gl.SliceLayout(0, L))
    values = gl.load(cache + at[:, None] + column[None, :], mask=ok[:, None], other=0)
    return values, gl.load(scales + at + 128 + CHUNK, mask=ok, other=0.0)


@gluon.jit
def _write_chunk(values, scale, keys, ready, free, step, CHUNK: gl.constexpr):
    """Scale a chunk, in fp32, into shared memory as bf16, two of them in an int32."""
    mbarrier.wait(free.index(CHUNK), (step + 1) & 1)
    left, right = gl.inline_asm_elementwise(
        """{
        .reg .b16 l, h, a, b, c, d;
        .reg .b32 x, y;
        .reg .f32 e, f, g, i;
        mov.b32 {l, h}, $2;
        cvt.rn.f16x2.e4m3x2 x, l;
        cvt.rn.f16x2.e4m3x2 y, h;
        mov.b32 {a, b}, x;
        mov.b32 {c, d}, y;
        cvt.f32.f16 e, a;
        cvt.f32.f16 f, b;
        cvt.f32.f16 g, c;
        cvt.f32.f16 i, d;
        mul.f32 e, e, $3;
        mul.f32 f, f, $3;
        mul.f32 g, g, $3;
        mul.f32 i, i, $3;
        cvt.rn.bf16x2.f32 $0, f, e;
        cvt.rn.bf16x2.f32 $1, i, g;
        }""",
        "=r,=r,r,f", [values, scale[:, None]], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    pairs = gl.join(left, right).reshape(128, 64)
    keys.index(CHUNK).store(pairs)
    fence_async_shared()
    barrier()
    mbarrier.arrive(ready.index(CHUNK), count=1)


@gluon.jit
def _fetch_fp8(
    cache, scales, keys, key_ropes, ready, free, table, start, end, PAGE: gl.constexpr,
    ROPE: gl.constexpr,
):  # fmt: skip
    """As `_fetch`, from an FP8 cache: a block is asked for into L2, then chunk after chunk into registers."""
    WIDTH: gl.constexpr = 512 + 16 + 2 * ROPE
    L: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, L)
    column = 132 + gl.arange(0, ROPE // 2, gl.SliceLayout(0, L))
    row = gl.arange(0, 128, ROWS)
    entry = _entries(table, start, end, PAGE, ROWS)
    values, scale = _read_chunk(cache, scales, entry, end - start, 0, WIDTH, L)
    for step in range(gl.cdiv(end - start, 128)):
        left = end - start - step * 128
        if left > 128:
            _prefetch(cache, table, end - left + 128, end, PAGE, WIDTH)
        for c in gl.static_range(3):
            _write_chunk(values, scale, keys, ready, free, step, c)
            values, scale = _read_chunk(cache, scales, entry, left, c + 1, WIDTH, L)
        _write_chunk(values, scale, keys, ready, free, step, 3)
        at = cache + entry.to(gl.int64)[:, None] * (WIDTH // 4) + column[None, :]
        rope = gl.load(at, mask=(row < left)[:, None], other=0)
        entry = _entries(table, end - left + 128, end, PAGE, ROWS)
        values, scale = _read_chunk(cache, scales, entry, left - 128, 0, WIDTH, L)
        mbarrier.wait(free.index(4), (step + 1) & 1)
        key_ropes.index(0).store(rope)
        fence_async_shared()
        barrier()
        mbarrier.arrive(ready.index(4), count=1)


@gluon.jit
def _clear_rows(shared, first, COLUMNS: gl.constexpr):
    """Zero rows of a shared tile [128, COLUMNS] from `first` on: cache slots never written may hold NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    row = gl.arange(0, 128, gl.SliceLayout(1, layout))
    for c in gl.static_range(0, COLUMNS, min(64, COLUMNS)):
        part = shared.slice(c, min(64, COLUMNS), 1)
        value = part.load(layout)
        part.store(gl.where((row < first)[:, None], value, gl.zeros_like(value)))


@gluon.jit
def _zero():
    """A zero the compiler does not know: what is computed from it stays in its loop, not in spilled registers."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _release(free):
    barrier()  # both warpgroups are done with it
    mbarrier.arrive(free, count=1)


@gluon.jit
def _attend(
    q, qr, keys, key_ropes, weights, ready, free, out, partial, lse, scale2, start, end, row, part,
    whole, FP8: gl.constexpr, ROPE: gl.constexpr,
):  # fmt: skip
    """The running softmax (base 2) of 64 heads over a split, to out at `row`, or partial and lse at `part`."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    mbarrier.wait(ready.index(5), 0)
    a0 = gl.zeros([64, 128], gl.float32, S)
    a1 = gl.zeros([64, 128], gl.float32, S)
    a2 = gl.zeros([64, 128], gl.float32, S)
    a3 = gl.zeros([64, 128], gl.float32, S)
    maximum = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, S))
    column = gl.arange(0, 128, gl.SliceLayout(0, S))
    for step in range(gl.cdiv(end - start, 128)):
        left = end - start - step * 128
        phase = step & 1
        if not FP8:  # noqa: SIM102 (decided when compiled, the inner one at run time)
            if left < 128:
                for c in gl.static_range(4):
                    mbarrier.wait(ready.index(c), phase)
                    _clear_rows(keys.index(c), left, 128)
                mbarrier.wait(ready.index(4), phase)
                _clear_rows(key_ropes.index(0), left, ROPE)
                fence_async_shared()
                barrier()
        zero = _zero()
        scores = gl.zeros([64, 128], gl.float32, S)
        for c in gl.static_range(4):
            mbarrier.wait(ready.index(c), phase)
            k = keys.index(zero + c).permute((1, 0))
            scores = warpgroup_mma(q.index(zero + c), k, scores, use_acc=c > 0, is_async=True)
        mbarrier.wait(ready.index(4), phase)
        rotated = key_ropes.index(zero).permute((1, 0))
        scores = warpgroup_mma(qr.index(zero), rotated, scores, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        if left < 128:
            scores = gl.where((column < left)[None, :], scores, float("-inf"))
        new = gl.maximum(maximum, gl.max(scores, 1) * scale2)
        barrier()  # both warpgroups have read the rotated keys: weights are written over them
        shrink = gl.exp2(maximum - new)
        weight = gl.exp2(scores * scale2 - new[:, None])
        shared = weights.index(zero)
        shared.store(weight.to(gl.bfloat16))
        maximum = new
        if FP8:  # registers are short: the weights must go
            total = total * shrink + gl.sum(weight, 1)
        barrier()
        p = shared.load(P)
        a0 = warpgroup_mma(p, keys.index(zero + 0), a0 * shrink[:, None], is_async=True)
        a1 = warpgroup_mma(p, keys.index(zero + 1), a1 * shrink[:, None], is_async=True)
        a2 = warpgroup_mma(p, keys.index(zero + 2), a2 * shrink[:, None], is_async=True)
        a3 = warpgroup_mma(p, keys.index(zero + 3), a3 * shrink[:, None], is_async=True)
        if not FP8:
            total = total * shrink + gl.sum(weight, 1)
        a0 = warpgroup_mma_wait(3, deps=(a0,))
        _release(free.index(0))
        a1 = warpgroup_mma_wait(2, deps=(a1,))
        _release(free.index(1))
        a2 = warpgroup_mma_wait(1, deps=(a2,))
        _release(free.index(2))
        a3 = warpgroup_mma_wait(0, deps=(a3,))
        _release(free.index(3))
        mbarrier.arrive(free.index(4), count=1)
    head = gl.arange(0, 64, gl.SliceLayout(1, S))
    inverse = (1.0 / total)[:, None]
    at = head[:, None] * 512 + column[None, :]
    if whole:
        wide = out + row * 512 + at
        gl.store(wide, (a0 * inverse).to(gl.bfloat16))
        gl.store(wide + 128, (a1 * inverse).to(gl.bfloat16))
        gl.store(wide + 256, (a2 * inverse).to(gl.bfloat16))
        gl.store(wide + 384, (a3 * inverse).to(gl.bfloat16))
    else:
        to = partial + part * 512 + at
        gl.store(to, a0 * inverse)
        gl.store(to + 128, a1 * inverse)
        gl.store(to + 256, a2 * inverse)
        gl.store(to + 384, a3 * inverse)
        gl.store(lse + part + head, maximum + gl.log2(total))


@gluon.jit
def decode_blocks(
    queries, query_ropes, entries, rotated, cache, scales, table, contexts, out, partial,
    lse, scale2, heads, table_width, max_splits, ROPE: gl.constexpr, PAGE: gl.constexpr,
    SPLIT: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    """As `_decode`; queries, query_ropes, entries, rotated are descriptors of blocks of 64 x 128, ROPE, 64, ROPE.

    An FP8 cache has no entries and rotated, but is given as int32 (cache) and fp32 (scales).
    """
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    PAIRS: gl.constexpr = gl.NVMMASharedLayout(128, 32, rank=2)
    ROPES: gl.constexpr = gl.NVMMASharedLayout(2 * ROPE, 16, rank=2)
    ROPE_PAIRS: gl.constexpr = gl.NVMMASharedLayout(2 * ROPE, 32, rank=2)
    request, split, block = gl.program_id(2), gl.program_id(1), gl.program_id(0)
    context = gl.load(contexts + request)
    start = split * SPLIT
    if start < context:
        end = gl.minimum(start + SPLIT, context)
        q = gl.allocate_shared_memory(gl.bfloat16, [4, 64, 128], queries.layout)
        qr = gl.allocate_shared_memory(gl.bfloat16, [1, 64, ROPE], query_ropes.layout)
        blocks = gl.allocate_shared_memory(gl.bfloat16, [16, 64, 64], TILE)
        keys = view(blocks, gl.bfloat16, [4, 128, 128], TILE)
        pairs = view(blocks, gl.int32, [4, 128, 64], PAIRS)
        # Rotated keys are read by the scores alone, which are done when the weights are written over them.
        weights = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 128], TILE)
        rope_blocks = view(weights, gl.bfloat16, [128 // ROPE, 64, ROPE], ROPES)
        key_ropes = view(weights, gl.bfloat16, [64 // ROPE, 128, ROPE], ROPES)
        rope_pairs = view(weights, gl.int32, [64 // ROPE, 128, ROPE // 2], ROPE_PAIRS)
        ready = gl.allocate_shared_memory(gl.int64, [6, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [5, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(6):
            mbarrier.init(ready.index(i), count=1)
        for i in gl.static_range(5):
            mbarrier.init(free.index(i), count=1)
        fence_async_shared()
        barrier()
        row = request * heads + block * 64
        mbarrier.expect(ready.index(5), 64 * (512 + ROPE) * 2)
        for c in gl.static_range(4):
            load_block(queries, [row, c * 128], ready.index(5), q.index(c))
        load_block(query_ropes, [row, 512], ready.index(5), qr.index(0))
        table += request * table_width
        part = (request * max_splits + split).to(gl.int64) * heads + block * 64
        if FP8:
            gl.warp_specialize(
                [
                    (_attend, (q, qr, keys, key_ropes, weights, ready, free, out, partial, lse,
                               scale2, start, end, row.to(gl.int64), part, context <= SPLIT, FP8,
                               ROPE)),
                    (_fetch_fp8, (cache, scales, pairs, rope_pairs, ready, free, table, start,
                                  end, PAGE, ROPE)),
                ],
                [8],
                [FETCH_REGISTERS],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (_attend, (q, qr, keys, key_ropes, weights, ready, free, out, partial, lse,
                               scale2, start, end, row.to(gl.int64), part, context <= SPLIT, FP8,
                               ROPE)),
                    (_fetch, (entries, rotated, blocks, rope_blocks, ready, free, table, start, end,
                              PAGE, ROPE)),
                ],
                [1],
                [24],
            )  # fmt: skip
