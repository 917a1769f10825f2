"""The inner loop of MLA decode for Hopper in Gluon: two warpgroups, out of step, take blocks of 64 keys in turns.

As `_decode` of mla_decode, for latents of 512, pages of a multiple of 64 tokens and heads in blocks of 64, two of which
are a cluster of two programs that fetch keys together. A program holds 64 queries and a pair of blocks in shared
memory. The even warpgroup scores a pair's first block and sums the left half of the latents, the odd one scores the
second and sums the right half; each leaves its weights to the other, so that one's softmax hides behind the other's
products. What scores are scaled by, a maximum so far, goes from even to odd and back: where it has changed, which is
seldom (SLACK), a warpgroup shrinks its sums to it before it adds the other's block. The schedule is FlashMLA's
("seesaw").

Halves of the keys are numbered block * 2 + half, rotated keys 4 + block. An FP8 cache's become f16, by four more warps.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels import hopper
from kernels.hopper import arrive, barrier, load_block, store_block, tell, view
from kernels.mla_decode_fetch import BARS_AT, FREE, MET, RAW, READY, WEIGHTS_AT, fetch, place

LATENTS = 512
QUERIES = gl.constexpr(6)  # of READY, behind the keys
# Of MET, each for the even block and, + 1, the odd one.
MAXIMUM, WEIGHTS, TOTALS, IN_F16 = (gl.constexpr(i) for i in (0, 2, 4, 6))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))  # of bf16 or f16
# Powers of two by which scores may exceed what their row is scaled by, so that sums are seldom multiplied
# (FlashAttention-4): a weight is at most 256, and 4,096 of them, times a latent, are far from fp32's end.
SLACK = gl.constexpr(8.0)
ROWS = gl.constexpr(gl.SliceLayout(1, SCORES.value))


@gluon.jit
def _zero():
    """A zero the compiler does not know: what is computed from it stays in its loop, not in spilled registers."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _to_f16(queries, bars, ODD: gl.constexpr):
    """Turn all queries from bf16 to f16 where they lie, each warpgroup its half of the latents."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    came = view(queries, gl.bfloat16, [2, 64, 256], TILE)
    for c in gl.static_range(0, 256, 64):
        value = came.index(ODD).slice(c, 64, 1).load(layout)
        queries.index(ODD).slice(c, 64, 1).store(value.to(gl.float16))
    fence_async_shared()
    tell(bars.index(MET + IN_F16 + ODD))
    mbarrier.wait(bars.index(MET + IN_F16 + 1 - ODD), 0)


@gluon.jit
def _freed(both, HALF: gl.constexpr, phase, FP8: gl.constexpr):
    arrive(both, BARS_AT + (FREE + place(HALF, phase, FP8)) * 8)


@gluon.jit
def _score_half(
    q, keys, bars, scores, zero, phase, HALF: gl.constexpr, ADD: gl.constexpr, FP8: gl.constexpr
):
    at = place(HALF, phase, FP8)
    mbarrier.wait(bars.index(READY + at), phase)
    k = keys.index(zero + at).permute((1, 0))
    return warpgroup_mma(q.index(zero + HALF % 2), k, scores, use_acc=ADD, is_async=True)


@gluon.jit
def _score_rope(qr, ropes, bars, scores, zero, phase, B: gl.constexpr, ROPE: gl.constexpr):
    mbarrier.wait(bars.index(READY + 4 + B), phase)
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
                at = place(2 * B + half, phase, FP8)
                mbarrier.wait(bars.index(READY + at), phase)
                hopper.clear_rows(keys.index(at), left)
        mbarrier.wait(bars.index(READY + 4 + B), phase)
        hopper.clear_rows(ropes.index((2 - B) * 64 // ROPE), left)
        fence_async_shared()
        barrier()


# A thread has 128 sums, of two rows; a warp whose rows' factors are all 1 multiplies nothing.
_MULTIPLY = gl.constexpr(
    "{ .reg .pred p, q; setp.ne.f32 p, $256, 0f3F800000; setp.ne.f32 q, $258, 0f3F800000; or.pred p, p, q; "
    "vote.sync.any.pred p, p, 0xffffffff; @!p bra done; "
    + " ".join(f"mul.rn.f32 ${i}, ${i}, ${i + 256};" for i in range(128))
    + " done: }"
)
_SUMS = gl.constexpr(",".join(["=f"] * 128 + [str(i) for i in range(128)] + ["f"] * 128))


@gluon.jit
def _times(acc, factor):
    by = gl.convert_layout(factor, gl.SliceLayout(1, SUMS))[:, None]
    return gl.inline_asm_elementwise(
        _MULTIPLY, _SUMS, [acc, by], dtype=gl.float32, is_pure=False, pack=128
    )


@gluon.jit
def _step(
    held, bars, both, scores, maximum, total, acc, scale2, left, step, LAST: gl.constexpr,
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
    new = maximum
    if ODD:
        mbarrier.wait(bars.index(MET + MAXIMUM), phase)
        new = maxima.index(0).load(ROWS)
    new = gl.where(highest > new + SLACK, highest, new)
    maxima.index(ODD).store(new)
    tell(bars.index(MET + MAXIMUM + ODD))
    shrink = gl.exp2(maximum - new)
    weight = gl.exp2(scores * scale2 - new[:, None])
    total = total * shrink + gl.sum(weight, 1)
    if ODD:
        weights.index(1).store(weight.to(weights.dtype))  # over the rotated keys, which are scored
        fence_async_shared()
        tell(bars.index(MET + WEIGHTS + 1))
    p = gl.convert_layout(weight.to(weights.dtype), gl.DotOperandLayout(0, SUMS, 2))
    acc = _times(acc, shrink)
    if ODD:
        mbarrier.wait(bars.index(MET + WEIGHTS), phase)
        acc = warpgroup_mma(weights.index(zero), keys.index(zero + 1), acc, is_async=True)
        acc = warpgroup_mma(p, keys.index(zero + place(3, phase, FP8)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        _freed(both, 1, phase, FP8)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        _freed(both, 3, phase, FP8)
        maximum = new
    else:
        acc = warpgroup_mma(p, keys.index(zero), acc, is_async=True)
        mbarrier.wait(bars.index(MET + MAXIMUM + 1), phase)
        maximum = maxima.index(1).load(ROWS)
        shrink = gl.exp2(new - maximum)
        total *= shrink
        weights.index(0).store((weight * shrink[:, None]).to(weights.dtype))
        fence_async_shared()
        tell(bars.index(MET + WEIGHTS))
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        _freed(both, 0, phase, FP8)
    if not LAST:
        _clear_block(keys, ropes, bars, left - 128, phase ^ 1, ODD, ROPE, FP8)
    if not ODD:
        acc = _times(acc, shrink)
        mbarrier.wait(bars.index(MET + WEIGHTS + 1), phase)
        k = keys.index(zero + place(2, phase, FP8))
        acc = warpgroup_mma(weights.index(zero + 1), k, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if not LAST:  # at once: before the next keys have come
            _freed(both, 2, phase, FP8)
            tell(bars.index(FREE + 5))
    if not LAST:
        scores = gl.zeros([64, 64], gl.float32, SCORES)
        scores = _score_half(q, keys, bars, scores, zero, phase ^ 1, 3 * ODD, False, FP8)
        if ODD:
            scores = _score_half(q, keys, bars, scores, zero, phase ^ 1, 2, True, FP8)
            scores = _score_rope(qr, ropes, bars, scores, zero, phase ^ 1, 1, ROPE)
        else:
            scores = _score_rope(qr, ropes, bars, scores, zero, phase ^ 1, 0, ROPE)
            scores = _score_half(q, keys, bars, scores, zero, phase ^ 1, 1, True, FP8)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        if not ODD:
            tell(bars.index(FREE + 4))
    return scores, maximum, total, acc


@gluon.jit
def _attend(
    held, bars, to, scale2, start, end, ODD: gl.constexpr, FP8: gl.constexpr, ROPE: gl.constexpr
):
    """The running softmax (base 2) of 64 heads over a split, to out at `row`, or partial and lse at `part`."""
    hopper.meet()
    both = hopper.of_both()
    q, qr, keys, ropes, _, maxima = held
    outs, partial, lse, row, part, whole, has_heads = to
    left = end - start - 64 * ODD
    zero = _zero()
    mbarrier.wait(bars.index(READY + QUERIES), 0)
    if FP8:
        _to_f16(q, bars, ODD)
    _clear_block(keys, ropes, bars, left, 0, ODD, ROPE, FP8)
    scores = gl.zeros([64, 64], gl.float32, SCORES)
    scores = _score_half(q, keys, bars, scores, zero, 0, 3 * ODD, False, FP8)
    scores = _score_half(q, keys, bars, scores, zero, 0, 1 + ODD, True, FP8)
    scores = _score_rope(qr, ropes, bars, scores, zero, 0, ODD, ROPE)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    if not ODD:
        tell(bars.index(FREE + 4))
    maximum = gl.full([64], -1e30, gl.float32, ROWS)
    total = gl.zeros([64], gl.float32, ROWS)
    acc = gl.zeros([64, 256], gl.float32, SUMS)
    last = gl.cdiv(end - start, 128) - 1
    for step in range(last):
        scores, maximum, total, acc = _step(
            held, bars, both, scores, maximum, total, acc, scale2, left, step, False, ODD, ROPE, FP8
        )
        left -= 128
    scores, maximum, total, acc = _step(
        held, bars, both, scores, maximum, total, acc, scale2, left, last, True, ODD, ROPE, FP8
    )
    maxima.index(ODD).store(total)  # the last maximum there has been read
    tell(bars.index(MET + TOTALS + ODD))
    mbarrier.wait(bars.index(MET + TOTALS + 1 - ODD), 0)
    total = maxima.index(0).load(ROWS) + maxima.index(1).load(ROWS)
    acc = _times(acc, 1.0 / total)
    head = gl.arange(0, 64, gl.SliceLayout(1, SUMS))
    column = ODD * 256 + gl.arange(0, 256, gl.SliceLayout(0, SUMS))
    at = head[:, None] * 512 + column[None, :]
    if has_heads:
        if whole:
            # over keys that this warpgroup was the last to read
            rows = view(keys.index(ODD), gl.bfloat16, [64, 256], TILE)
            rows.store(acc.to(gl.bfloat16))
            fence_async_shared()
            barrier()
            store_block(outs, [row, ODD * 256], rows)
            tma.store_wait(0)
        else:
            gl.store(partial + part * 512 + at, acc)
            if not ODD:
                gl.store(lse + part + gl.arange(0, 64, ROWS), maximum + gl.log2(total))


@hopper.paired()
def decode_blocks(
    entries, rotated, queries, query_ropes, outs, cache, table, contexts, partial, lse, scale2, heads,
    table_width, max_splits, ROPE: gl.constexpr, PAGE: gl.constexpr, SPLIT: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    """As `_decode`; entries, rotated, queries, query_ropes are descriptors of blocks of 64 x 256, ROPE, 256, ROPE.

    Entries of an FP8 cache are blocks of 64 x 32 int32; `cache` is a pointer to the same memory, of fp32, else of bf16.
    """
    ROPES: gl.constexpr = gl.NVMMASharedLayout(2 * ROPE, 16, rank=2)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    WORDS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    request, split, block = gl.program_id(2), gl.program_id(1), gl.program_id(0)
    context = gl.load(contexts + request)
    start = split * SPLIT
    if start < context:
        end = gl.minimum(start + SPLIT, context)
        q = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], TILE)
        qr = gl.allocate_shared_memory(gl.bfloat16, [1, 64, ROPE], query_ropes.layout)
        shared = gl.allocate_shared_memory(gl.int32, [BARS_AT // 512 + 1, 1, 128], WORDS)
        hopper.check_base(shared, BARS_AT)
        KIND: gl.constexpr = gl.float16 if FP8 else gl.bfloat16  # also of queries and weights
        keys = view(hopper.part(shared, 0, WEIGHTS_AT // 512), KIND, [4, 64, 256], TILE)
        # Even weights; rotated keys of the odd block, then its weights; rotated keys of the even block.
        weights = view(hopper.part(shared, WEIGHTS_AT // 512, 48), KIND, [3, 64, 64], TILE)
        ropes = view(weights, gl.bfloat16, [3 * 64 // ROPE, 64, ROPE], ROPES)
        maxima = gl.allocate_shared_memory(gl.float32, [2, 64], VECTOR)
        bars = view(shared.index(BARS_AT // 512), gl.int64, [64, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(RAW + 4):  # places of keys are freed by the warps of both programs
            mbarrier.init(bars.index(i), count=8 if i >= FREE and i < FREE + 4 else 1)
        fence_async_shared()
        barrier()
        row = request * heads + block * 64
        mbarrier.expect(bars.index(READY + QUERIES), 64 * (512 + ROPE) * 2)
        load_block(queries, [row, 0], bars.index(READY + QUERIES), q.index(0))
        load_block(queries, [row, 256], bars.index(READY + QUERIES), q.index(1))
        load_block(query_ropes, [row, 512], bars.index(READY + QUERIES), qr.index(0))
        table += request * table_width
        part = (request * max_splits + split).to(gl.int64) * heads + block * 64
        # of an odd number of blocks the last one's neighbour fetches, and computes what nobody asked for
        to = outs, partial, lse, row, part, context <= SPLIT, block * 64 < heads
        held = view(q, KIND, [2, 64, 256], TILE), qr, keys, ropes, weights, maxima
        source = entries, rotated, cache, table
        if FP8:
            gl.warp_specialize(
                [(_attend, (held, bars, to, scale2, start, end, 0, FP8, ROPE)),
                 (_attend, (held, bars, to, scale2, start, end, 1, FP8, ROPE)),
                 (fetch, (source, held, bars, start, end, PAGE, FP8, ROPE))], [4, 4], [224, 56],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [(_attend, (held, bars, to, scale2, start, end, 0, FP8, ROPE)),
                 (_attend, (held, bars, to, scale2, start, end, 1, FP8, ROPE)),
                 (hopper.meet, ()),  # all warps must
                 (hopper.meet, ()),
                 (fetch, (source, held, bars, start, end, PAGE, FP8, ROPE))], [4, 2, 1, 1], [240, 24, 24, 24],
            )  # fmt: skip
