"""Few-row FP8 products for Hopper, in Gluon: a whole expert in one launch, and one matrix.

In `expert_units` all programs run at once and wait for each other three times through counters in memory: for the sums
of gate and up, for the hidden rows, for the sums of down. The weights of down are on their way meanwhile.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.stream_ring import (
    arrive,
    await_all,
    block_scale,
    consume,
    magnitude,
    produce,
    quantised,
    make_ring,
    swiglu,
)


@gluon.jit
def _sum_splits(partial, group, sub, row, ok, M, whole, FUSED: gl.constexpr, SPLITS: gl.constexpr, ROWS: gl.constexpr):  # fmt: skip
    """Sum of a tile's splits in order, fp32 [4, 128]; whole groups' sums lie before those of splits unless FUSED."""
    column = gl.arange(0, 128, gl.SliceLayout(0, ROWS))
    first = (group - whole) * SPLITS
    if not FUSED:
        first = gl.where(group < whole, group, whole + first)
    total = gl.zeros([4, 128], gl.float32, ROWS)
    for s in gl.static_range(SPLITS):
        here = ok if s == 0 else ok & (group >= whole)
        at = ((first + s).to(gl.int64) * 2 + sub) * M * 128 + row[:, None] * 128 + column[None, :]
        total += gl.load(partial + at, mask=here[:, None], other=0.0)
    return total


@gluon.jit
def _hide(
    partial, q, q_scales, hidden, blocks, M, whole, me, everyone, SPLITS: gl.constexpr, MIN: gl.constexpr
):  # fmt: skip
    """SwiGLU and quantisation of the groups that were split: four rows of a block at a time, shared out to all."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    blocks_of_rows = gl.cdiv(M, 4)
    for work in range(me, (blocks - whole) * blocks_of_rows, everyone):
        group = whole + work // blocks_of_rows
        row = work % blocks_of_rows * 4 + gl.arange(0, 4, gl.SliceLayout(1, ROWS))
        ok = row < M
        gate = _sum_splits(partial, group, 0, row, ok, M, whole, True, SPLITS, ROWS)
        up = _sum_splits(partial, group, 1, row, ok, M, whole, True, SPLITS, ROWS)
        column = group * 128 + gl.arange(0, 128, gl.SliceLayout(0, ROWS))
        inside = ok[:, None] & (column < hidden)[None, :]
        x = gl.where(inside, swiglu(gate, up), 0.0)
        scale = block_scale(magnitude(x), MIN)
        gl.store(q + row[:, None] * hidden + column[None, :], quantised(x, scale), mask=inside)
        gl.store(q_scales + row * blocks + group, scale, mask=ok)


@gluon.jit
def _finish(partial, out, width, M, whole, me, everyone, SPLITS: gl.constexpr):
    """Sums of splits to out bf16 [M, width]: four rows of a tile at a time, shared out to all."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    blocks_of_rows = gl.cdiv(M, 4)
    for work in range(me, gl.cdiv(width, 128) * blocks_of_rows, everyone):
        tile = work // blocks_of_rows
        row = work % blocks_of_rows * 4 + gl.arange(0, 4, gl.SliceLayout(1, ROWS))
        ok = row < M
        total = _sum_splits(partial, tile // 2, tile % 2, row, ok, M, whole, False, SPLITS, ROWS)
        column = tile * 128 + gl.arange(0, 128, gl.SliceLayout(0, ROWS))
        inside = ok[:, None] & (column < width)[None, :]
        gl.store(out + row[:, None] * width + column[None, :], total.to(gl.bfloat16), mask=inside)


@gluon.jit
def _expert_consumer(
    x_scales, g_scales, d_scales, partial, d_partial, q, q_scales, out, counters, M, kb, g_blocks,
    g_whole, g_splits, d_kb, d_tiles, d_whole, d_splits, d_groups, hidden, width, xs, ws, full, empty,
    peaks, met, worker, everyone, WG: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
    G_SPLITS: gl.constexpr, D_SPLITS: gl.constexpr, MIN: gl.constexpr,
):  # fmt: skip
    me = worker * 2 + WG
    gdc_wait()
    i = consume(
        x_scales, g_scales, partial, M, kb, 1, g_blocks, 2 * g_blocks, g_whole, g_splits, g_blocks, q,
        q_scales, hidden, xs, ws, full, empty, peaks, met, worker, worker * 0, WG, BM, STAGES, True, MIN,
    )  # fmt: skip
    arrive(counters)
    await_all(counters, everyone)
    _hide(partial, q, q_scales, hidden, g_blocks, M, g_whole, me, everyone, G_SPLITS, MIN)
    arrive(counters + 1)
    await_all(counters + 1, everyone)
    consume(
        q_scales, d_scales, d_partial, M, d_kb, 2, 1, d_tiles, d_whole, d_splits, d_groups, q, q_scales,
        hidden, xs, ws, full, empty, peaks, met, worker, i, WG, BM, STAGES, False, MIN,
    )  # fmt: skip
    arrive(counters + 2)
    await_all(counters + 2, everyone)
    _finish(d_partial, out, width, M, d_whole, me, everyone, D_SPLITS)
    if gl.atomic_add(counters + 3, 1, sem="acq_rel", scope="gpu") == everyone - 1:
        for c in gl.static_range(4):  # no one waits any more: as the next call wants to find them
            gl.store(counters + c, 0)


@gluon.jit
def _expert_producer(
    x_rows, g_rows, h_rows, d_rows, counters, kb, g_blocks, half_rows, g_whole, g_splits, d_kb, d_whole,
    d_splits, d_groups, xs, ws, full, empty, worker, everyone, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    i = produce(
        x_rows, g_rows, kb, 1, half_rows, g_whole, g_splits, g_blocks, xs, ws, full, empty, worker, worker * 0,
        counters, everyone, BM, STAGES, False,
    )  # fmt: skip
    produce(
        h_rows, d_rows, d_kb, 2, 128, d_whole, d_splits, d_groups, xs, ws, full, empty, worker, i,
        counters + 1, everyone, BM, STAGES, True,
    )  # fmt: skip


@gluon.jit
def expert_units(
    x_rows, x_scales, g_rows, g_scales, h_rows, q, q_scales, d_rows, d_scales, partial, d_partial, out,
    counters, M, kb, g_blocks, half_rows, g_whole, g_splits, d_kb, d_tiles, d_whole, d_splits, d_groups,
    hidden, width, BM: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    G_SPLITS: gl.constexpr, D_SPLITS: gl.constexpr, MIN: gl.constexpr,
):  # fmt: skip
    """A whole expert: out bf16 [M, width]. x_rows, g_rows, h_rows (of q) and d_rows are descriptors of blocks.

    partial and d_partial hold sums of splits; counters, four zeros, are zeros again at the end. All programs must run
    at once.
    """
    worker = gl.program_id(0)
    everyone = gl.num_programs(0) * 2
    gdc_launch_dependents()
    xs, ws, full, empty, met, peaks = make_ring(x_rows, g_rows, BM, STAGES)
    gl.warp_specialize(
        [
            (_expert_consumer, (
                x_scales, g_scales, d_scales, partial, d_partial, q, q_scales, out, counters, M, kb,
                g_blocks, g_whole, g_splits, d_kb, d_tiles, d_whole, d_splits, d_groups, hidden, width,
                xs, ws, full, empty, peaks, met, worker, everyone, 0, BM, STAGES, G_SPLITS, D_SPLITS,
                MIN)),
            (_expert_consumer, (
                x_scales, g_scales, d_scales, partial, d_partial, q, q_scales, out, counters, M, kb,
                g_blocks, g_whole, g_splits, d_kb, d_tiles, d_whole, d_splits, d_groups, hidden, width,
                xs, ws, full, empty, peaks, met, worker, everyone, 1, BM, STAGES, G_SPLITS, D_SPLITS,
                MIN)),
            (_expert_producer, (
                x_rows, g_rows, h_rows, d_rows, counters, kb, g_blocks, half_rows, g_whole, g_splits,
                d_kb, d_whole, d_splits, d_groups, xs, ws, full, empty, worker, everyone, BM, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


@gluon.jit
def _linear_consumer(
    x_scales, w_scales, partial, M, kb, tiles, whole, splits, groups, xs, ws, full, empty, peaks, met,
    worker, WG: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    gdc_wait()
    consume(
        x_scales, w_scales, partial, M, kb, 2, 1, tiles, whole, splits, groups, partial, partial, 0, xs,
        ws, full, empty, peaks, met, worker, worker * 0, WG, BM, STAGES, False, 0.0,
    )  # fmt: skip


@gluon.jit
def _linear_producer(
    x_rows, w_rows, counters, kb, whole, splits, groups, xs, ws, full, empty, worker, BM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    produce(
        x_rows, w_rows, kb, 2, 128, whole, splits, groups, xs, ws, full, empty, worker, worker * 0, counters, 0,
        BM, STAGES, False,
    )  # fmt: skip


@gluon.jit
def stream_units(
    x_rows, x_scales, w_rows, w_scales, partial, M, kb, tiles, whole, splits, groups,
    BM: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Sums of one matrix to partial [whole + splits, 2, M, 128]; x_rows and w_rows are descriptors of blocks."""
    worker = gl.program_id(0)
    gdc_launch_dependents()
    xs, ws, full, empty, met, peaks = make_ring(x_rows, w_rows, BM, STAGES)
    gl.warp_specialize(
        [
            (_linear_consumer, (
                x_scales, w_scales, partial, M, kb, tiles, whole, splits, groups, xs, ws, full, empty,
                peaks, met, worker, 0, BM, STAGES)),
            (_linear_consumer, (
                x_scales, w_scales, partial, M, kb, tiles, whole, splits, groups, xs, ws, full, empty,
                peaks, met, worker, 1, BM, STAGES)),
            (_linear_producer, (
                x_rows, w_rows, partial, kb, whole, splits, groups, xs, ws, full, empty, worker, BM,
                STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
