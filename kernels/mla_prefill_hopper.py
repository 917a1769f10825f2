"""Causal attention of prompt rows for Hopper, in Gluon: one warp fetches, two warpgroups have 64 rows of a head each.

Keys come 128 at a time into two stages, their values into two more. A warpgroup adds a block's values and scores the
next block in one go, so that its softmax runs while the other's products do. Keys are taken in ascending blocks from
the sequence's first, so a row's bits depend on its own position and context alone.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels import hopper
from kernels.hopper import barrier, load_block, tell, view

ROWS = 128  # of a program
KEYS = gl.constexpr(128)  # of a block
STAGES = gl.constexpr(2)
# Barriers, one for each stage, then one for the queries.
_HAS_K, _HAS_V, _NO_K, _NO_V, _HAS_Q = (gl.constexpr(2 * i) for i in range(5))
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
_OF_HEAD = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=3))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
# of output, in whole cache lines
_LINES = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def _fetch(rows, row, head, ready, tiles, FIRST: gl.constexpr, PARTS: gl.constexpr):
    """Fetch what rows have of a head, 64 columns a tile; there are zeros where it has fewer."""
    N: gl.constexpr = tiles.shape[1]
    for c in gl.static_range(PARTS):
        tile = view(tiles.index(FIRST + c), gl.bfloat16, [N, 1, 64], _OF_HEAD)
        load_block(rows, [row, head, c * 64], ready, tile)


@gluon.jit
def _produce(keys, values, ks, vs, bars, row, head, blocks):
    PARTS: gl.constexpr = ks.shape[0] // STAGES
    VALUE_PARTS: gl.constexpr = vs.shape[0] // STAGES
    phase = blocks * 0 + 1  # at once the first time
    for block in range(0, blocks, STAGES):
        for stage in gl.static_range(STAGES):
            if block + stage < blocks:
                ready = bars.index(_HAS_K + stage)
                mbarrier.wait(bars.index(_NO_K + stage), phase)
                mbarrier.expect(ready, PARTS * KEYS * 64 * 2)
                _fetch(keys, row, head, ready, ks, stage * PARTS, PARTS)
                ready = bars.index(_HAS_V + stage)
                mbarrier.wait(bars.index(_NO_V + stage), phase)
                mbarrier.expect(ready, VALUE_PARTS * KEYS * 64 * 2)
                _fetch(values, row, head, ready, vs, stage * VALUE_PARTS, VALUE_PARTS)
                row += KEYS
        phase ^= 1


@gluon.jit
def _score(q, ks, bars, block, WG: gl.constexpr):
    """Begin to multiply 64 queries with a block of keys."""
    PARTS: gl.constexpr = ks.shape[0] // STAGES
    stage = block % STAGES
    scores = gl.zeros([64, KEYS], gl.float32, SCORES)
    mbarrier.wait(bars.index(_HAS_K + stage), block // STAGES & 1)
    for c in gl.static_range(PARTS):
        k = ks.index(stage * PARTS + c).permute((1, 0))
        scores = warpgroup_mma(q.index(WG * PARTS + c), k, scores, use_acc=c > 0, is_async=True)
    return scores


@gluon.jit
def _softmax(scores, maximum, total, acc, scale2):
    new = gl.maximum(maximum, gl.max(scores, 1) * scale2)
    shrink = gl.exp2(maximum - new)
    weight = gl.exp2(scores * scale2 - new[:, None])
    total = total * shrink + gl.sum(weight, 1)
    sums: gl.constexpr = acc.type.layout
    p = gl.convert_layout(weight.to(gl.bfloat16), gl.DotOperandLayout(0, sums, 2))
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, sums))[:, None]
    return p, new, total, acc


@gluon.jit
def _attend(q, ks, vs, bars, to, scale2, position, count, blocks, WG: gl.constexpr):
    """Rows at `position` and the 63 after it, of a sequence of `count` keys, of which `blocks` are fetched."""
    PARTS: gl.constexpr = ks.shape[0] // STAGES
    VALUE: gl.constexpr = vs.shape[0] // STAGES * 64
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE, 16])
    out, stride, rows, width = to
    vs = view(vs, gl.bfloat16, [STAGES, KEYS, VALUE], TILE)
    row = gl.arange(0, 64, gl.SliceLayout(1, SCORES))
    column = gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
    maximum = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([64, VALUE], gl.float32, SUMS)
    last = gl.minimum(gl.cdiv(position + 64, KEYS), blocks) - 1  # that one of these rows sees
    mbarrier.wait(bars.index(_HAS_Q), 0)
    scores = warpgroup_mma_wait(0, deps=(_score(q, ks, bars, 0, WG),))
    tell(bars.index(_NO_K))
    for block in range(last):
        if (block + 1) * KEYS > position:  # not all rows see all of it
            seen = (block * KEYS + column)[None, :] <= (position + row)[:, None]
            scores = gl.where(seen, scores, float("-inf"))
        p, maximum, total, acc = _softmax(scores, maximum, total, acc, scale2)
        mbarrier.wait(bars.index(_HAS_V + block % STAGES), block // STAGES & 1)
        acc = warpgroup_mma(p, vs.index(block % STAGES), acc, is_async=True)
        scores = _score(q, ks, bars, block + 1, WG)
        acc, p, scores = warpgroup_mma_wait(0, deps=(acc, p, scores))
        tell(bars.index(_NO_V + block % STAGES))
        tell(bars.index(_NO_K + (block + 1) % STAGES))
    seen = (last * KEYS + column)[None, :] <= (position + row)[:, None]
    scores = gl.where(seen, scores, float("-inf"))
    p, maximum, total, acc = _softmax(scores, maximum, total, acc, scale2)
    stage = last % STAGES
    mbarrier.wait(bars.index(_HAS_V + stage), last // STAGES & 1)
    if (last + 1) * KEYS > count:  # rows behind are another sequence's, and may be NaN
        hopper.clear_rows(vs.index(stage), count - last * KEYS)
        fence_async_shared()
        barrier()
    acc = warpgroup_mma(p, vs.index(stage), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, SUMS))[:, None]
    mine = hopper.part(q, WG * PARTS, VALUE // 64)  # queries that have been multiplied
    staged = view(mine, gl.bfloat16, [1, 64, VALUE], TILE).index(0)
    staged.store(acc.to(gl.bfloat16))
    barrier()
    value = staged.load(_LINES)
    i = gl.arange(0, 64, gl.SliceLayout(1, _LINES))
    column = gl.arange(0, VALUE, gl.SliceLayout(0, _LINES))
    at = i.to(gl.int64)[:, None] * stride + column[None, :]
    gl.store(out + at, value, mask=(i < rows)[:, None] & (column < width)[None, :])


@gluon.jit
def attend_rows(
    queries, keys, values, out, starts_q, starts_k, scale2, heads, width, PARTS: gl.constexpr,
    VALUE_PARTS: gl.constexpr,
):  # fmt: skip
    """As mla_prefill.mla_prefill_rows; queries, keys, values: descriptors of blocks of 64, 128 and 128 rows of a head.

    A block has 64 columns; queries and keys have PARTS of them, values VALUE_PARTS, `width` columns in all.
    """
    head, sequence = gl.program_id(1), gl.program_id(2)
    q0, q1 = gl.load(starts_q + sequence), gl.load(starts_q + sequence + 1)
    k0, k1 = gl.load(starts_k + sequence), gl.load(starts_k + sequence + 1)
    # The longest tiles first: they decide when the grid ends.
    m0 = (gl.num_programs(0) - 1 - gl.program_id(0)) * 128
    rows, count = q1 - q0, k1 - k0
    if m0 < rows:
        q = gl.allocate_shared_memory(gl.bfloat16, [2 * PARTS, 64, 64], TILE)
        ks = gl.allocate_shared_memory(gl.bfloat16, [STAGES * PARTS, KEYS, 64], TILE)
        vs = gl.allocate_shared_memory(gl.bfloat16, [STAGES * VALUE_PARTS, KEYS, 64], TILE)
        bars = gl.allocate_shared_memory(gl.int64, [_HAS_Q + 1, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(_HAS_Q + 1):
            mbarrier.init(bars.index(i), count=2 if i >= _NO_K and i < _HAS_Q else 1)
        fence_async_shared()
        barrier()
        mbarrier.expect(bars.index(_HAS_Q), 2 * PARTS * 64 * 64 * 2)
        for w in gl.static_range(2):
            _fetch(queries, q0 + m0 + w * 64, head, bars.index(_HAS_Q), q, w * PARTS, PARTS)
        position = count - rows + m0  # of the first row
        blocks = gl.cdiv(gl.minimum(position + 128, count), KEYS)
        out += ((q0 + m0).to(gl.int64) * heads + head) * width
        stride = heads * width
        to0 = out, stride, rows - m0, width
        to1 = out + stride.to(gl.int64) * 64, stride, rows - m0 - 64, width
        gl.warp_specialize(
            [(_attend, (q, ks, vs, bars, to0, scale2, position, count, blocks, 0)),
             (_attend, (q, ks, vs, bars, to1, scale2, position + 64, count, blocks, 1)),
             (_produce, (keys, values, ks, vs, bars, k0, head, blocks))], [4, 1], [240, 24],
        )  # fmt: skip
