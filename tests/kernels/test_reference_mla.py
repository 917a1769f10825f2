"""Paged attention in both regimes against plain attention in float64; rotary tables against transformers'."""

import pytest
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from kernels.reference.mla import mla_decode, mla_prefill
from kernels.reference.rope import apply_rope, rope_frequencies, rope_tables, yarn_frequencies
from services.attention.batch import Span, build_batch

PAGE, LATENT, ROPE, HEADS = 64, 24, 8, 3
TABLES = (torch.ones(600, ROPE // 2), torch.zeros(600, ROPE // 2))


def plain(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:
    """One row: queries [heads, d], keys [context, heads, d], values [context, heads, v] in float64."""
    scores = torch.einsum("hd,chd->hc", queries.double(), keys.double()) * scale
    return torch.einsum("hc,chv->hv", scores.softmax(-1), values.double())


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("contexts", [[1], [64], [65, 3, 200], [130, 131, 132, 7, 64, 500]])
def test_decode(contexts: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(contexts))
    cache = torch.randn(40, PAGE, LATENT + ROPE, generator=generator).to(dtype)
    queries = torch.randn(8, HEADS, LATENT + ROPE, generator=generator).to(dtype)
    order = torch.randperm(39, generator=generator).tolist()
    spans = []
    for context in contexts:
        pages = [order.pop() for _ in range(-(-context // PAGE))]
        spans.append(Span([0], context - 1, 0, pages))
    tables = TABLES[0].to(dtype), TABLES[1].to(dtype)
    part = build_batch(spans, page_tokens=PAGE, null_page=39, rope=tables).decode[0]
    out = mla_decode(queries, cache, part.items, scale=0.2, latent=LATENT)
    for row, (context, span) in enumerate(zip(contexts, spans, strict=True)):
        rows = cache[list(span.pages)].reshape(-1, LATENT + ROPE)[:context]
        rows = rows[:, None].expand(-1, HEADS, -1)
        expected = plain(queries[row], rows, rows[..., :LATENT], 0.2)
        close(out[part.restore[row]], expected, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "chunks", [[(0, 1)], [(0, 64)], [(5, 30), (0, 17)], [(100, 140), (0, 3), (63, 66)]]
)
def test_prefill(chunks: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """Chunks of prompts (start, end) with what came before in the cache."""
    generator = torch.Generator().manual_seed(3)
    spans, first = [], 0
    for start, end in chunks:
        pages = range(first, first + (end - 1) // PAGE + 1)
        first = pages.stop
        spans.append(Span([0] * (end - start), start, end, pages))
    tiles = build_batch(spans, page_tokens=PAGE, null_page=39, rope=TABLES).prefill
    assert tiles is not None
    assert tiles.tiles.pages.tolist() == list(range(first))
    keys = torch.randn(first, HEADS, PAGE, 20, generator=generator).to(dtype)
    values = torch.randn(first, HEADS, PAGE, 12, generator=generator).to(dtype)
    queries = torch.randn(tiles.rows.shape[0], HEADS, 20, generator=generator).to(dtype)
    out = mla_prefill(queries, keys, values, tiles.tiles, scale=0.3)
    row = 0
    for (start, end), span in zip(chunks, spans, strict=True):
        flat_keys = keys[list(span.pages)].transpose(1, 2).flatten(0, 1)
        flat_values = values[list(span.pages)].transpose(1, 2).flatten(0, 1)
        for position in range(start, end):
            seen = slice(0, position + 1)
            expected = plain(queries[row], flat_keys[seen], flat_values[seen], 0.3)
            close(out[row], expected, TOLERANCES[dtype])
            row += 1


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("factor", "mscale", "all_dim"), [(40.0, 1.0, 1.0), (4.0, 0.707, 1.0), (8.0, 0.0, 0.0)]
)
def test_yarn_tables(factor: float, mscale: float, all_dim: float, truncate: bool) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": factor, "truncate": truncate}
    rope |= {"original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
    if mscale:
        rope |= {"mscale": mscale, "mscale_all_dim": all_dim}
    config = DeepseekV3Config(
        qk_rope_head_dim=16, max_position_embeddings=int(64 * factor), rope_parameters=rope
    )
    theirs = DeepseekV3RotaryEmbedding(config)
    ours = yarn_frequencies(
        16,
        10000.0,
        factor=factor,
        original_max_position=64,
        beta_fast=32,
        beta_slow=1,
        truncate=truncate,
    )
    assert torch.equal(ours, theirs.inv_freq)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope(interleaved: bool) -> None:
    config = DeepseekV3Config(qk_rope_head_dim=10)
    q, k, positions = torch.randn(1, 4, 30, 10), torch.randn(1, 1, 30, 10), torch.arange(30)
    cos, sin = DeepseekV3RotaryEmbedding(config)(q, positions[None])
    theirs = (apply_rotary_pos_emb_interleave if interleaved else apply_rotary_pos_emb)(
        q, k, cos, sin
    )
    tables = rope_tables(rope_frequencies(10, 10000.0), 30, 1.0)
    for x, expected in zip((q, k), theirs, strict=True):
        assert torch.equal(apply_rope(x, *tables, interleaved=interleaved), expected)
