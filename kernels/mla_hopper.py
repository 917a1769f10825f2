"""The inner loop of MLA decode for Hopper in Gluon: two warpgroups, out of step, take blocks of 64 keys in turns.

As `_decode` of mla_decode, for latents of 512, pages of a multiple of 64 tokens and heads in blocks of 64. One program
holds 64 queries and a pair of blocks in shared memory. The even warpgroup scores a pair's first block and sums the left
half of the latents, the odd one scores the second and sums the right half; each leaves its weights to the other, so
that one's softmax hides behind the other's products. The running maximum goes from even to odd and back: a warpgroup
shrinks its sums to the other's maximum before it adds the other's block. The schedule is FlashMLA's ("seesaw").

Halves of the keys are numbered block * 2 + half, rotated keys 4 + block. An FP8 cache is scaled by four more warps.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.hopper import barrier, load_block, tell, view
from kernels.mla_fetch import FREE, MET, READY, fetch

HEADS = 64  # of a program
LATENTS = 512
QUERIES = gl.constexpr(6)  # of READY, behind the keys
# Of MET, each for the even block and, + 1, the odd one.
MAXIMUM, WEIGHTS, TOTALS = gl.constexpr(0), gl.constexpr(2), gl.constexpr(4)
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
ROWS = gl.constexpr(gl.SliceLayout(1, SCORES.value))


@gluon.jit
def _zero():
    """A zero the compiler does not know: what is computed from it stays in its loop, not in spilled registers."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _clear_rows(shared, first, COLUMNS: gl.constexpr):
    """Zero rows of a shared tile [64, COLUMNS] from `first` on: cache slots never written may hold NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    for c in gl.static_range(0, COLUMNS, min(64, COLUMNS)):
        part = shared.slice(c, min(64, COLUMNS), 1)
        value = part.load(layout)
        part.store(gl.where((row < first)[:, None], value, gl.zeros_like(value)))


@gluon.jit
def _score_half(q, keys, bars, scores, zero, phase, HALF: gl.constexpr, ADD: gl.constexpr):
    mbarrier.wait(bars[READY].index(HALF), phase)
    k = keys.index(zero + HALF).permute((1, 0))
    return warpgroup_mma(q.index(zero + HALF % 2), k, scores, use_acc=ADD, is_async=True)


@gluon.jit
def _score_rope(qr, ropes, bars, scores, zero, phase, B: gl.constexpr, ROPE: gl.constexpr):
    mbarrier.wait(bars[READY].index(4 + B), phase)
    k = ropes.index(zero + (2 - B) * 64 // ROPE).permute((1, 0))
    return warpgroup_mma(qr.index(zero), k, scores, is_async=True)


@gluon.jit
def _clear_block(
    keys, ropes, bars, left, phase, B: gl.constexpr, ROPE: gl.constexpr, FP8: gl.constexpr
):
    """Zero what a block has behind the split's end; latents of an FP8 cache are zero there already."""
    if left < 64:
        if not FP8:
            for half in gl.static_range(2):
                mbarrier.wait(bars[READY].index(2 * B + half), phase)
                _clear_rows(keys.index(2 * B + half), left, 256)
        mbarrier.wait(bars[READY].index(4 + B), phase)
        _clear_rows(ropes.index((2 - B) * 64 // ROPE), left, ROPE)
        fence_async_shared()
        barrier()


@gluon.jit
def _times(acc, factor):
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, SUMS))[:, None]


@gluon.jit
def _step(
    held, bars, scores, maximum, total, acc, scale2, left, step, LAST: gl.constexpr,
    ODD: gl.constexpr, ROPE: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    """Add a pair of blocks to one half of the latents, then score this warpgroup's block of the next pair."""
    q, qr, keys, ropes, weights, maxima = held
    phase = step & 1
    zero = _zero()
    if LAST:
        column = gl.arange(0, 64, gl.SliceLayout(0, SCORES))
        scores = gl.where((column < left)[None, :], scores, float("-inf"))
    highest = gl.max(scores, 1) * scale2
    if ODD:
        mbarrier.wait(bars[MET].index(MAXIMUM), phase)
        new = gl.maximum(maxima.index(0).load(ROWS), highest)
    else:
        new = gl.maximum(maximum, highest)
    maxima.index(ODD).store(new)
    tell(bars[MET].index(MAXIMUM + ODD))
    shrink = gl.exp2(maximum - new)
    weight = gl.exp2(scores * scale2 - new[:, None])
    total = total * shrink + gl.sum(weight, 1)
    if ODD:
        weights.index(1).store(weight.to(gl.bfloat16))  # over the rotated keys, which are scored
        fence_async_shared()
        tell(bars[MET].index(WEIGHTS + 1))
    p = gl.convert_layout(weight.to(gl.bfloat16), gl.DotOperandLayout(0, SUMS, 2))
    acc = _times(acc, shrink)
    if ODD:
        mbarrier.wait(bars[MET].index(WEIGHTS), phase)
        acc = warpgroup_mma(weights.index(zero), keys.index(zero + 1), acc, is_async=True)
        acc = warpgroup_mma(p, keys.index(zero + 3), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        tell(bars[FREE].index(1))
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        tell(bars[FREE].index(3))
        maximum = new
    else:
        acc = warpgroup_mma(p, keys.index(zero), acc, is_async=True)
        mbarrier.wait(bars[MET].index(MAXIMUM + 1), phase)
        maximum = maxima.index(1).load(ROWS)
        shrink = gl.exp2(new - maximum)
        total *= shrink
        weights.index(0).store((weight * shrink[:, None]).to(gl.bfloat16))
        fence_async_shared()
        tell(bars[MET].index(WEIGHTS))
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        tell(bars[FREE].index(0))
    if not LAST:
        _clear_block(keys, ropes, bars, left - 128, phase ^ 1, ODD, ROPE, FP8)
    if not ODD:
        acc = _times(acc, shrink)
        mbarrier.wait(bars[MET].index(WEIGHTS + 1), phase)
        acc = warpgroup_mma(weights.index(zero + 1), keys.index(zero + 2), acc, is_async=True)
    if not LAST:
        scores = gl.zeros([64, 64], gl.float32, SCORES)
        scores = _score_half(q, keys, bars, scores, zero, phase ^ 1, 3 * ODD, False)
        if ODD:
            scores = _score_half(q, keys, bars, scores, zero, phase ^ 1, 2, True)
            scores = _score_rope(qr, ropes, bars, scores, zero, phase ^ 1, 1, ROPE)
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
            tell(bars[FREE].index(2))
            mbarrier.arrive(bars[FREE].index(5), count=1)
            scores = _score_rope(qr, ropes, bars, scores, zero, phase ^ 1, 0, ROPE)
            scores = _score_half(q, keys, bars, scores, zero, phase ^ 1, 1, True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        if not ODD:
            tell(bars[FREE].index(4))
    elif not ODD:
        acc = warpgroup_mma_wait(0, deps=(acc,))
    return scores, maximum, total, acc


@gluon.jit
def _attend(
    q, qr, keys, ropes, weights, maxima, ready, free, met, out, partial, lse, scale2, start, end, row,
    part, whole, ODD: gl.constexpr, FP8: gl.constexpr, ROPE: gl.constexpr,
):  # fmt: skip
    """The running softmax (base 2) of 64 heads over a split, to out at `row`, or partial and lse at `part`."""
    held, bars = (q, qr, keys, ropes, weights, maxima), (ready, free, met)
    left = end - start - 64 * ODD
    zero = _zero()
    mbarrier.wait(bars[READY].index(QUERIES), 0)
    _clear_block(keys, ropes, bars, left, 0, ODD, ROPE, FP8)
    scores = gl.zeros([64, 64], gl.float32, SCORES)
    scores = _score_half(q, keys, bars, scores, zero, 0, 3 * ODD, False)
    scores = _score_half(q, keys, bars, scores, zero, 0, 1 + ODD, True)
    scores = _score_rope(qr, ropes, bars, scores, zero, 0, ODD, ROPE)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    if not ODD:
        tell(bars[FREE].index(4))
    maximum = gl.full([64], -1e30, gl.float32, ROWS)
    total = gl.zeros([64], gl.float32, ROWS)
    acc = gl.zeros([64, 256], gl.float32, SUMS)
    last = gl.cdiv(end - start, 128) - 1
    for step in range(last):
        scores, maximum, total, acc = _step(
            held, bars, scores, maximum, total, acc, scale2, left, step, False, ODD, ROPE, FP8
        )
        left -= 128
    scores, maximum, total, acc = _step(
        held, bars, scores, maximum, total, acc, scale2, left, last, True, ODD, ROPE, FP8
    )
    maxima.index(ODD).store(total)  # the last maximum there has been read
    tell(bars[MET].index(TOTALS + ODD))
    mbarrier.wait(bars[MET].index(TOTALS + 1 - ODD), 0)
    total = maxima.index(0).load(ROWS) + maxima.index(1).load(ROWS)
    acc = _times(acc, 1.0 / total)
    head = gl.arange(0, 64, gl.SliceLayout(1, SUMS))
    column = ODD * 256 + gl.arange(0, 256, gl.SliceLayout(0, SUMS))
    at = head[:, None] * 512 + column[None, :]
    if whole:
        gl.store(out + row * 512 + at, acc.to(gl.bfloat16))
    else:
        gl.store(partial + part * 512 + at, acc)
        if not ODD:
            gl.store(lse + part + gl.arange(0, 64, ROWS), maximum + gl.log2(total))


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def decode_blocks(
    queries, query_ropes, entries, rotated, scales, table, contexts, out, partial, lse, scale2, heads,
    table_width, max_splits, ROPE: gl.constexpr, PAGE: gl.constexpr, SPLIT: gl.constexpr,
    FP8: gl.constexpr,
):  # fmt: skip
    """As `_decode`; queries, query_ropes, entries, rotated are descriptors of blocks of 64 x 256, ROPE, 256, ROPE.

    Entries of an FP8 cache are blocks of 64 x 64 int32, its scales the same memory in fp32.
    """
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    ROPES: gl.constexpr = gl.NVMMASharedLayout(2 * ROPE, 16, rank=2)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    request, split, block = gl.program_id(2), gl.program_id(1), gl.program_id(0)
    context = gl.load(contexts + request)
    start = split * SPLIT
    if start < context:
        end = gl.minimum(start + SPLIT, context)
        q = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], TILE)
        qr = gl.allocate_shared_memory(gl.bfloat16, [1, 64, ROPE], query_ropes.layout)
        keys = gl.allocate_shared_memory(gl.bfloat16, [4, 64, 256], TILE)
        # Even weights; rotated keys of the odd block, then its weights; rotated keys of the even block.
        weights = gl.allocate_shared_memory(gl.bfloat16, [3, 64, 64], TILE)
        ropes = view(weights, gl.bfloat16, [3 * 64 // ROPE, 64, ROPE], ROPES)
        maxima = gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR)
        ready, free, met, raw = _barriers(7), _barriers(6), _barriers(6), _barriers(4)
        fence_async_shared()
        barrier()
        row = request * heads + block * 64
        mbarrier.expect(ready.index(QUERIES), 64 * (512 + ROPE) * 2)
        load_block(queries, [row, 0], ready.index(QUERIES), q.index(0))
        load_block(queries, [row, 256], ready.index(QUERIES), q.index(1))
        load_block(query_ropes, [row, 512], ready.index(QUERIES), qr.index(0))
        table += request * table_width
        part = (request * max_splits + split).to(gl.int64) * heads + block * 64
        row, whole = row.to(gl.int64), context <= SPLIT
        gl.warp_specialize(
            [
                (_attend, (q, qr, keys, ropes, weights, maxima, ready, free, met, out, partial, lse, scale2,
                           start, end, row, part, whole, 0, FP8, ROPE)),
                (_attend, (q, qr, keys, ropes, weights, maxima, ready, free, met, out, partial, lse, scale2,
                           start, end, row, part, whole, 1, FP8, ROPE)),
                (fetch, (entries, rotated, scales, keys, ropes, ready, free, met, raw, table,
                          start, end, PAGE, FP8, ROPE)),
            ],
            [4, 4 if FP8 else 1],
            [216 if FP8 else 240, 72 if FP8 else 24],
        )  # fmt: skip
