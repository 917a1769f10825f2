"""The paged latent cache and attention over it, request by request in plain torch, to check the GPU kernels.

The CPU path of the attention worker is kernels/reference/mla.py, which batches the same mathematics over fixed blocks.
"""

import itertools

import torch
from torch import Tensor

from kernels.reference.norm import rms_norm
from kernels.reference.quant import dequantise, quantise
from kernels.reference.rope import apply_rope


def norm_rope(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *, eps: float, interleaved: bool
) -> Tensor:
    """Cache entries from x [rows, latent + rope]: the latent part normalised, the rest rotated; x's dtype.

    weight [latent]; cos and sin fp32 [rows, rope / 2].
    """
    latent = weight.shape[0]
    rotated = apply_rope(x[:, latent:].float(), cos, sin, interleaved=interleaved)
    return torch.cat([rms_norm(x[:, :latent], weight, eps), rotated.to(x.dtype)], dim=1)


def cache_write(entries: Tensor, cache: Tensor, slots: Tensor, *, latent: int) -> None:
    """Write entries [rows, latent + rope] to their cache slots; a slot of -1 is skipped.

    cache [pages, page tokens, latent + rope] in the dtype of the entries, or uint8 [pages, page tokens,
    latent + latent / 32 + 2 * rope] for bf16 entries: e4m3 latents, their scales per 128, the rotated key in bf16.
    slots int64 [rows] = page * page tokens + token. Slots must be distinct.
    """
    kept = slots >= 0
    entries, slots = entries[kept], slots[kept]
    flat = cache.view(-1, cache.shape[-1])
    if cache.dtype is torch.uint8:
        rows, scales = quantise(entries[:, :latent])
        rotated = entries[:, latent:].contiguous()
        parts = [t.view(torch.uint8) for t in (rows, scales.contiguous(), rotated)]
        flat[slots] = torch.cat(parts, dim=1)
    else:
        flat[slots] = entries


def cache_entries(cache: Tensor, slots: Tensor, *, latent: int) -> Tensor:
    """Read cache slots int64 [n] back: fp32 [n, latent + rope]."""
    entries = cache.view(-1, cache.shape[-1])[slots]
    if cache.dtype is not torch.uint8:
        return entries.float()
    end = latent + latent // 32
    rows = entries[:, :latent].contiguous().view(torch.float8_e4m3fn)
    scales = entries[:, latent:end].contiguous().view(torch.float32)
    rotated = entries[:, end:].contiguous().view(torch.bfloat16)
    return torch.cat([dequantise(rows, scales, torch.float32), rotated.float()], dim=1)


def mla_decode_paged(
    queries: Tensor, cache: Tensor, page_table: Tensor, context: Tensor, *, scale: float,
    latent: int, max_context: int,
) -> Tensor:  # fmt: skip
    """softmax(scale * queries @ keys) @ latents: [requests, heads, latent] in the dtype of the queries.

    queries [requests, heads, latent + rope] in the latent space; page_table int32 [requests, pages]; context int32
    [requests], tokens of each request, none above `max_context` (ValueError).
    """
    out = torch.empty(*queries.shape[:2], latent, dtype=queries.dtype, device=queries.device)
    page = cache.shape[1]
    for request, tokens in enumerate(context.tolist()):
        if tokens > max_context:
            raise ValueError(f"request {request} has {tokens} tokens, more than {max_context}")
        token = torch.arange(tokens, device=cache.device)
        slots = page_table[request, token // page].long() * page + token % page
        keys = cache_entries(cache, slots, latent=latent)
        weights = torch.softmax(queries[request].float() @ keys.t() * scale, dim=-1)
        out[request] = weights @ keys[:, :latent]
    return out


def mla_prefill_rows(
    queries: Tensor, keys: Tensor, values: Tensor, starts_q: Tensor, starts_k: Tensor, *,
    scale: float, max_rows: int,
) -> Tensor:  # fmt: skip
    """Causal attention of several sequences: [rows, heads, v] for queries [rows, heads, qk].

    keys [tokens, heads, qk], values [tokens, heads, v]; sequence i has queries starts_q[i] .. starts_q[i + 1] and keys
    starts_k[i] .. starts_k[i + 1] (int32 [sequences + 1]), its queries being the last of its tokens. Raises ValueError
    for a sequence of more than `max_rows` queries.
    """
    out = torch.empty(
        *queries.shape[:2], values.shape[-1], dtype=queries.dtype, device=queries.device
    )
    bounds = list(zip(starts_q.tolist(), starts_k.tolist(), strict=True))
    for (q0, k0), (q1, k1) in itertools.pairwise(bounds):
        if q1 - q0 > max_rows:
            raise ValueError(f"a sequence has {q1 - q0} queries, more than {max_rows}")
        scores = torch.einsum("qhd,khd->hqk", queries[q0:q1].float(), keys[k0:k1].float()) * scale
        position = torch.arange(q1 - q0, device=queries.device) + (k1 - k0) - (q1 - q0)
        later = torch.arange(k1 - k0, device=queries.device) > position[:, None]
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        out[q0:q1] = torch.einsum("hqk,khd->qhd", weights, values[k0:k1].float())
    return out
