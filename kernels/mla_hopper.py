"""The inner loop of MLA decode for Hopper in Gluon: Triton cannot be told to load early and to share products out.

As `_decode` of mla_decode, for bf16 caches whose pages are a multiple of 64 tokens, and heads in blocks of 64. One
program holds 64 queries in shared memory and two blocks of 64 keys: while one is computed, the other is loaded. Both
warpgroups share every product: half the keys each of the scores, half the latents each of the sums.
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

# renamed between Triton 3.6 and 3.9
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

BLOCK = 64  # heads of a program, keys of a step


@gluon.jit
def _fetch(entries, rotated, entry, ready, keys, key_ropes, LATENT: gl.constexpr, ROPE: gl.constexpr):  # fmt: skip
    mbarrier.expect(ready, 64 * (LATENT + ROPE) * 2)
    _load(entries, [entry, 0], ready, keys)
    _load(rotated, [entry, LATENT], ready, key_ropes)


@gluon.jit
def _clear_rows(shared, first, rows: gl.constexpr, columns: gl.constexpr):
    """Zero rows of a shared tile from `first` on: cache slots never written may hold NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    row = gl.arange(0, rows, gl.SliceLayout(1, layout))
    for c in gl.static_range(0, columns, min(64, columns)):
        part = shared.slice(c, min(64, columns), 1)
        value = part.load(layout)
        part.store(gl.where((row < first)[:, None], value, gl.zeros_like(value)))
    fence_async_shared()
    _barrier()


@gluon.jit
def decode_blocks(
    queries, query_ropes, entries, rotated, table, contexts, out, partial, lse, scale2, heads,
    table_width, max_splits, LATENT: gl.constexpr, ROPE: gl.constexpr, PAGE: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """Arguments as `_decode`; queries, query_ropes, entries and rotated are descriptors of 64-row blocks."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, LATENT // 2, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    request, split, block = gl.program_id(2), gl.program_id(1), gl.program_id(0)
    context = gl.load(contexts + request)
    start = split * SPLIT
    if start < context:
        end = gl.minimum(start + SPLIT, context)
        q = gl.allocate_shared_memory(gl.bfloat16, [64, LATENT], queries.layout)
        qr = gl.allocate_shared_memory(gl.bfloat16, [64, ROPE], query_ropes.layout)
        keys = gl.allocate_shared_memory(gl.bfloat16, [2, 64, LATENT], entries.layout)
        ropes = gl.allocate_shared_memory(gl.bfloat16, [2, 64, ROPE], rotated.layout)
        ready = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(3):
            mbarrier.init(ready.index(i), count=1)
        fence_async_shared()
        _barrier()
        row = request * heads + block * 64
        mbarrier.expect(ready.index(2), 64 * (LATENT + ROPE) * 2)
        _load(queries, [row, 0], ready.index(2), q)
        _load(query_ropes, [row, LATENT], ready.index(2), qr)
        table += request * table_width
        page = gl.load(table + start // PAGE)
        entry = page * PAGE + start % PAGE
        _fetch(entries, rotated, entry, ready.index(0), keys.index(0), ropes.index(0), LATENT, ROPE)
        page = gl.load(table + gl.minimum(start + 64, end - 1) // PAGE)
        mbarrier.wait(ready.index(2), 0)
        acc = gl.zeros([64, LATENT], gl.float32, SUM)
        maximum = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, S))
        total = gl.zeros([64, 64], gl.float32, S)
        column = gl.arange(0, 64, gl.SliceLayout(0, S))
        for step in range(gl.cdiv(end - start, 64)):
            first = start + step * 64
            b = step % 2
            mbarrier.wait(ready.index(b), (step // 2) % 2)
            k, kr = keys.index(b), ropes.index(b)
            if first + 64 > end:
                _clear_rows(k, end - first, 64, LATENT)
                _clear_rows(kr, end - first, 64, ROPE)
            scores = gl.zeros([64, 64], gl.float32, S)
            scores = warpgroup_mma(qr, kr.permute((1, 0)), scores, use_acc=False, is_async=True)
            scores = warpgroup_mma(q, k.permute((1, 0)), scores, is_async=True)
            if first + 64 < end:  # the other half was freed when the last step ended
                entry = page * PAGE + (first + 64) % PAGE
                other = 1 - b
                _fetch(
                    entries, rotated, entry, ready.index(other), keys.index(other),
                    ropes.index(other), LATENT, ROPE,
                )  # fmt: skip
                page = gl.load(table + gl.minimum(first + 128, end - 1) // PAGE)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            if first + 64 > end:
                scores = gl.where((first + column < end)[None, :], scores, float("-inf"))
            new = gl.maximum(maximum, gl.max(scores, 1) * scale2)
            shrink = gl.exp2(maximum - new)
            weight = gl.exp2(scores * scale2 - new[:, None])
            total = total * shrink[:, None] + weight  # summed over keys once, at the end
            maximum = new
            weight = gl.convert_layout(weight.to(gl.bfloat16), P)
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, SUM))[:, None]
            acc = warpgroup_mma(weight, k, acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            _barrier()  # both warpgroups are done with this half
        row_total = gl.sum(total, 1)
        acc = acc / gl.convert_layout(row_total, gl.SliceLayout(1, SUM))[:, None]
        head = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, SUM))
        latent = gl.arange(0, LATENT, gl.SliceLayout(0, SUM))[None, :]
        if context <= SPLIT:
            at = (request * heads + head).to(gl.int64)[:, None] * LATENT
            gl.store(out + at + latent, acc.to(gl.bfloat16))
        else:
            part = (request * max_splits + split).to(gl.int64) * heads
            gl.store(partial + (part + head)[:, None] * LATENT + latent, acc)
            lse_head = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, S))
            gl.store(lse + part + lse_head, maximum + gl.log2(row_total))
        for i in gl.static_range(3):
            mbarrier.invalidate(ready.index(i))
