"""The paged cache and attention over it: references against float64, page orders, poisoned slots."""

import pytest
import torch

from kernels import mla_prefill as on_gpu
from kernels.reference.norm import rms_norm
from kernels.reference.paged import (
    cache_entries,
    cache_write,
    mla_decode_paged,
    mla_prefill_rows,
    norm_rope,
)
from kernels.reference.rope import apply_rope

LATENT, ROPE, PAGE = 128, 16, 8


def filled(contexts, *, fp8=False, seed=0):
    """A cache whose unused slots are poison, its page table, and each request's entries in order."""
    g = torch.Generator().manual_seed(seed)
    pages = [-(-c // PAGE) for c in contexts]
    order = torch.randperm(sum(pages), generator=g)
    width = LATENT + LATENT // 32 + 2 * ROPE if fp8 else LATENT + ROPE
    if fp8:
        cache = torch.full((len(order), PAGE, width), 0xFF, dtype=torch.uint8)
    else:
        cache = torch.full((len(order), PAGE, width), float("nan"), dtype=torch.bfloat16)
    table = torch.zeros(len(contexts), max(pages), dtype=torch.int32)
    entries, start = [], 0
    for i, (tokens, n) in enumerate(zip(contexts, pages, strict=True)):
        table[i, :n] = order[start : start + n]
        start += n
        token = torch.arange(tokens)
        slots = table[i, token // PAGE].long() * PAGE + token % PAGE
        entry = torch.randn(tokens, LATENT + ROPE, generator=g).bfloat16()
        cache_write(entry, cache, slots, latent=LATENT)
        entries.append(cache_entries(cache, slots, latent=LATENT) if fp8 else entry.float())
    return cache, table, entries


@pytest.mark.parametrize("fp8", [False, True])
def test_decode_against_float64_over_poisoned_pages(fp8):
    contexts = [1, 7, 8, 9, 50]
    cache, table, entries = filled(contexts, fp8=fp8)
    queries = torch.randn(5, 4, LATENT + ROPE)
    context = torch.tensor(contexts, dtype=torch.int32)
    got = mla_decode_paged(queries, cache, table, context, scale=0.1, latent=LATENT, max_context=50)
    for i, entry in enumerate(entries):
        weights = torch.softmax(queries[i].double() @ entry.double().t() * 0.1, -1)
        assert torch.allclose(got[i].double(), weights @ entry[:, :LATENT].double(), atol=1e-5)
    with pytest.raises(ValueError, match="request 4 has 50 tokens"):
        mla_decode_paged(queries, cache, table, context, scale=0.1, latent=LATENT, max_context=49)


def test_fp8_entries_keep_the_rotated_key_exactly():
    _, _, (entry,) = filled([5], fp8=True)
    plain, _, (same,) = filled([5])
    assert plain.dtype is torch.bfloat16
    assert torch.equal(entry[:, LATENT:], same[:, LATENT:])
    assert (entry - same).abs().max() <= same.abs().max() * 2**-4


def test_a_slot_of_minus_one_is_skipped():
    cache = torch.zeros(1, PAGE, LATENT + ROPE)
    entries = torch.ones(2, LATENT + ROPE)
    cache_write(entries, cache, torch.tensor([-1, 3]), latent=LATENT)
    assert cache.sum() == LATENT + ROPE
    assert cache[0, 3].all()


def test_prefill_is_causal_and_sees_the_context_before():
    lengths_q, lengths_k = [1, 3, 9], [1, 20, 9]
    starts_q, starts_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k))
    q = torch.randn(13, 2, 24)
    k, v = torch.randn(30, 2, 24), torch.randn(30, 2, 16)
    got = mla_prefill_rows(q, k, v, starts_q, starts_k, scale=0.2, max_rows=9)
    for i in range(3):
        for row in range(lengths_q[i]):
            seen = slice(int(starts_k[i]), int(starts_k[i]) + lengths_k[i] - lengths_q[i] + row + 1)
            at = int(starts_q[i]) + row
            scores = torch.einsum("hd,khd->hk", q[at].double(), k[seen].double()) * 0.2
            expected = torch.einsum("hk,khd->hd", scores.softmax(-1), v[seen].double())
            assert torch.allclose(got[at].double(), expected, atol=1e-5)


@pytest.mark.parametrize(("width", "value"), [(200, 128), (192, 136), (60, 56), (64, 60)])
def test_widths_that_the_kernel_for_prompts_cannot_take_are_named(width, value):
    q, k, v = (torch.zeros(3, 2, w, dtype=torch.bfloat16) for w in (width, width, value))
    starts = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"queries of {width} and values of {value} columns"):
        on_gpu.mla_prefill_rows(q, k, v, starts, starts, scale=1.0, max_rows=3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_norm_rope_is_norm_and_rope(interleaved):
    x, weight = torch.randn(5, LATENT + ROPE), torch.randn(LATENT)
    angle = torch.randn(5, ROPE // 2)
    got = norm_rope(x, weight, angle.cos(), angle.sin(), eps=1e-6, interleaved=interleaved)
    assert torch.equal(got[:, :LATENT], rms_norm(x[:, :LATENT], weight, 1e-6))
    rotated = apply_rope(x[:, LATENT:], angle.cos(), angle.sin(), interleaved=interleaved)
    assert torch.equal(got[:, LATENT:], rotated)
