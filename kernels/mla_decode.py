"""MLA decode on a paged latent cache: queries already projected into the latent space read each page once.

One program per request, block of 64 heads and split of the context. How a context is split depends on its own length
alone (`SPLIT_TOKENS`), so a request's bits depend on no other request; a request of one split is finished in the first
kernel, others by a second that adds the splits in order. Where the shapes allow, mla_decode_hopper does the first step.
DeepSeek-V2 (arXiv 2405.04434), section 2.1; the running softmax is arXiv 2205.14135.

Cache: bf16 [pages, page tokens, latent + rope], or uint8 [pages, page tokens, latent + latent / 32 + 2 * rope]: e4m3
latents, one fp32 scale per 128 of them, then the rotated key in bf16. On Hopper such latents and queries in the latent
space are multiplied in f16: beyond its 65,504 they give NaN, and latents of a block whose largest is below 0.027 are
off by up to 1.3e-5, as its scale, a 448th of that, has fewer bits then. Floor: max(cache bytes / read bandwidth,
2 * heads * context * (2 * latent + rope) / bf16 peak).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl

from kernels import mla_decode_hopper
from kernels.hopper import blocks_of

# 64 requests x 4,096 tokens take 165 us with 4096 and 187 us with 2048, 64 of random length 157 and 138 (H100,
# 2026-11-23): a second split writes and reads its sums, but evens out what the SMs have to do.
SPLIT_TOKENS = 4096
_HEADS = 64  # of a program: the rows of one wgmma
_LOG2_E = 1.4426950408889634


@triton.jit
def _load_entries(CACHE, entry, ok, LATENT: tl.constexpr, ROPE: tl.constexpr, FP8: tl.constexpr):
    """Latents [BK, LATENT] and rotated keys [BK, ROPE] of cache entries (their numbers), zeros where not ok."""
    latent, rope = tl.arange(0, LATENT)[None, :], tl.arange(0, ROPE)[None, :]
    mask = ok[:, None]
    if FP8:
        base = CACHE + entry[:, None] * (LATENT + LATENT // 32 + 2 * ROPE)
        q = tl.load(base.to(tl.pointer_type(tl.float8e4nv)) + latent, mask=mask, other=0.0)
        scales = (base + LATENT).to(tl.pointer_type(tl.float32))
        block = tl.arange(0, LATENT // 128)[None, :]
        scale = tl.load(scales + block, mask=mask, other=0.0)[:, :, None]
        blocks = tl.reshape(q.to(tl.float32), (entry.shape[0], LATENT // 128, 128))
        keys = tl.reshape(blocks * scale, (entry.shape[0], LATENT)).to(tl.bfloat16)
        rotated = (base + LATENT + LATENT // 32).to(tl.pointer_type(tl.bfloat16))
    else:
        base = CACHE + entry[:, None] * (LATENT + ROPE)
        keys = tl.load(base + latent, mask=mask, other=0.0)
        rotated = base + LATENT
    return keys, tl.load(rotated + rope, mask=mask, other=0.0)


@triton.jit
def _attend(q, qr, keys, rotated, ok, scale2, maximum, total, acc):
    """Add keys [BK, LATENT] to the running softmax (base 2) of BH heads; where not ok, a key has no weight."""
    new = maximum
    shrink = maximum
    weight = tl.zeros((q.shape[0], keys.shape[0]), tl.bfloat16)
    # Always true. In a region of its own the compiler does not see that another product follows, and shares the keys
    # out over both warpgroups; else each computes all 64 x 64 scores.
    scores = tl.zeros((q.shape[0], keys.shape[0]), tl.float32)
    if scale2 < 1e30:
        scores = tl.dot(qr, rotated.T)
    if scale2 > 0:
        scores = tl.dot(q, keys.T, scores) * scale2
        scores = tl.where(ok[None, :], scores, float("-inf"))
        new = tl.maximum(maximum, tl.max(scores, 1))
        shrink = tl.exp2(maximum - new)
        exact = tl.exp2(scores - new[:, None])
        total = total * shrink + tl.sum(exact, 1)
        weight = exact.to(tl.bfloat16)
    acc = tl.dot(weight, keys, acc * shrink[:, None])
    return new, total, acc


@triton.jit
def _decode(
    Q, CACHE, OUT, TABLE, CONTEXT, PARTIAL, LSE, scale2, heads, table_width, max_splits,
    LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    FP8: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    request, split = tl.program_id(2), tl.program_id(1)
    context = tl.load(CONTEXT + request)
    start = split * SPLIT
    if start >= context:
        return
    end = tl.minimum(start + SPLIT, context)
    head = tl.program_id(0) * BH + tl.arange(0, BH)
    head_ok = (head < heads)[:, None]
    latent = tl.arange(0, LATENT)[None, :]
    q_at = Q + (request * heads + head).to(tl.int64)[:, None] * (LATENT + ROPE)
    q = tl.load(q_at + latent, mask=head_ok, other=0.0)
    qr = tl.load(q_at + LATENT + tl.arange(0, ROPE)[None, :], mask=head_ok, other=0.0)
    acc = tl.zeros((BH, LATENT), tl.float32)
    maximum = tl.full((BH,), -1e30, tl.float32)
    total = tl.zeros((BH,), tl.float32)
    table = TABLE + request * table_width
    i = tl.arange(0, BK)
    for first in tl.range(start, end, BK, num_stages=STAGES):
        ok = first + i < end
        page_of = tl.load(table + (first + i) // PAGE, mask=ok, other=0).to(tl.int64)
        entry = page_of * PAGE + (first + i) % PAGE
        keys, rotated = _load_entries(CACHE, entry, ok, LATENT, ROPE, FP8)
        maximum, total, acc = _attend(q, qr, keys, rotated, ok, scale2, maximum, total, acc)
    acc = acc / total[:, None]
    row = (request * heads + head).to(tl.int64)[:, None]
    if context <= SPLIT:
        tl.store(OUT + row * LATENT + latent, acc, mask=head_ok)
    else:
        part = (request * max_splits + split).to(tl.int64) * heads + head
        tl.store(PARTIAL + part[:, None] * LATENT + latent, acc, mask=head_ok)
        tl.store(LSE + part, maximum + tl.log2(total), mask=head < heads)


@triton.jit
def _add_splits(
    PARTIAL, LSE, CONTEXT, OUT, heads, max_splits, LATENT: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    request, head = tl.program_id(1), tl.program_id(0)
    context = tl.load(CONTEXT + request)
    if context <= SPLIT:
        return
    splits = tl.cdiv(context, SPLIT)
    latent = tl.arange(0, LATENT)
    first = (request * max_splits).to(tl.int64) * heads + head
    maximum = tl.load(LSE + first)
    for s in range(1, splits):
        maximum = tl.maximum(maximum, tl.load(LSE + first + s * heads))
    acc = tl.zeros((LATENT,), tl.float32)
    total = 0.0
    for s in tl.range(0, splits, num_stages=3):
        part = first + s * heads
        weight = tl.exp2(tl.load(LSE + part) - maximum)
        acc += weight * tl.load(PARTIAL + part * LATENT + latent)
        total += weight
    row = (request * heads + head).to(tl.int64)
    tl.store(OUT + row * LATENT + latent, acc / total)


def _hopper_inputs(queries: Tensor, cache: Tensor, out: Tensor, rope: int) -> tuple[object, ...]:
    """Queries, cache and output as mla_decode_hopper.decode_blocks takes them."""
    rows = queries.view(-1, queries.shape[2])
    halves = cache.view(torch.bfloat16).flatten(0, 1)
    outs = blocks_of(out.flatten(0, 1), 64, 256)
    others = blocks_of(halves, 64, rope), blocks_of(rows, 64, 256), blocks_of(rows, 64, rope), outs
    if cache.dtype is torch.uint8:
        words = cache.view(torch.int32).flatten(0, 1)
        return (blocks_of(words, 64, 32, dtype=gl.int32), *others, cache.view(torch.float32))
    return (blocks_of(halves, 64, 256), *others, halves)


def mla_decode_paged(
    queries: Tensor, cache: Tensor, page_table: Tensor, context: Tensor, *, scale: float,
    latent: int, max_context: int,
) -> Tensor:  # fmt: skip
    """softmax(scale * queries @ keys) @ latents: bf16 [requests, heads, latent].

    queries bf16 [requests, heads, latent + rope] in the latent space; cache as above; page_table int32
    [requests, pages]; context int32 [requests], tokens of each request (at least 1), none above `max_context`.
    Raises ValueError for a latent width that is no power of two or a rope width that is not one either.
    """
    requests, heads, width = queries.shape
    rope = width - latent
    if latent & (latent - 1) or rope & (rope - 1) or rope < 16:
        raise ValueError(f"latent {latent} and rope {rope} must be powers of two, rope at least 16")
    fp8 = cache.dtype is torch.uint8
    splits = -(-max_context // SPLIT_TOKENS)
    out = torch.empty(requests, heads, latent, dtype=torch.bfloat16, device=queries.device)
    # Never written and never read where no request has a second split.
    kept = (requests * splits * heads) if splits > 1 else 1
    partial = torch.empty(kept, latent, device=queries.device)
    lse = torch.empty(kept, device=queries.device)
    given = (page_table, context, partial, lse, scale * _LOG2_E, heads, page_table.shape[1], splits)
    page = cache.shape[1]
    if latent == mla_decode_hopper.LATENTS and rope <= 64 and not (page % 64 or heads % _HEADS):
        inputs = _hopper_inputs(queries, cache, out, rope)
        mla_decode_hopper.decode_blocks[triton.cdiv(heads, 2 * _HEADS), splits, requests](
            *inputs, *given, rope, page, SPLIT_TOKENS, fp8, num_warps=4, maxnreg=168
        )
    else:
        shape = (latent, rope, page, SPLIT_TOKENS)
        _decode[triton.cdiv(heads, _HEADS), splits, requests](
            queries, cache, out, *given, *shape, fp8, _HEADS, 32, 3, num_warps=8, num_stages=3
        )
    if splits > 1:
        _add_splits[(heads, requests)](
            partial, lse, context, out, heads, splits, latent, SPLIT_TOKENS, num_warps=2
        )
    return out
