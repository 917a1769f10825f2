"""Multi-head latent attention of one layer: projections, cache write, the two regimes of `kernels.reference.mla`."""

import torch

from common.model.hf_config import ModelConfig
from common.model.loader import AttentionLayerWeights
from kernels.reference.linear import OUT_MULTIPLE, linear, pad_out, resident
from kernels.reference.mla import mla_decode, mla_prefill
from kernels.reference.norm import rms_norm
from kernels.reference.rope import apply_rope
from services.attention.batch import DecodePart, ForwardBatch, PrefillPart
from services.attention.latent_cache import LatentCache

_LATENT_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says (modeling_deepseek_v3.py)


class MlaLayer:
    """One layer's attention weights, arranged for few and row-independent operations."""

    def __init__(self, config: ModelConfig, weights: AttentionLayerWeights) -> None:
        self.config = config
        query = weights.q_b if weights.q_a is None else weights.q_a
        dtype = weights.kv_b.dtype
        self._query_width = query.shape[0]
        self._in = resident(torch.cat([query, weights.kv_a]), dtype)  # one product for both
        self._in_bias = self._both_biases(weights)
        self._q_norm = weights.q_a_norm
        self._q_b = None if weights.q_a is None else resident(weights.q_b, dtype)
        self._kv_norm = weights.kv_a_norm
        self._kv_b = pad_out(weights.kv_b)
        self._out = resident(weights.out, dtype)
        self._out_bias = None if weights.out_bias is None else pad_out(weights.out_bias)
        nope, heads = config.qk_nope_head_dim, config.num_heads
        per_head = weights.kv_b.view(heads, nope + config.v_head_dim, config.kv_lora_rank)
        self._to_latent = _pad_last(per_head[:, :nope])  # [heads, nope, latent]
        self._from_latent = _pad_last(per_head[:, nope:].transpose(1, 2))  # [heads, latent, v]

    def forward(
        self, layer: int, x: torch.Tensor, batch: ForwardBatch, cache: LatentCache
    ) -> torch.Tensor:
        """Attention of normed rows x [padded, width] -> [padded, width]; their latents go into the cache first."""
        nope, rotary, latents = self._project(x, batch)
        cache.write(layer, batch.slots, latents)
        pages = cache.layer(layer)
        if len(batch.decode) == 1 and batch.decode[0].rows is None:
            heads = self._decode(nope, rotary, batch.decode[0], pages)
        else:
            heads = x.new_zeros(x.shape[0], self.config.num_heads * self.config.v_head_dim)
            for part in batch.decode:
                assert part.rows is not None
                rows, count = part.rows, part.num_rows
                chosen = nope.index_select(0, rows), rotary.index_select(0, rows)
                heads.index_copy_(0, rows[:count], self._decode(*chosen, part, pages)[:count])
            if batch.prefill is not None:
                rows = batch.prefill.rows
                queries = torch.cat([nope, rotary], dim=-1).index_select(0, rows)
                heads.index_copy_(0, rows, self._prefill(queries, batch.prefill, pages))
        return linear(heads, self._out, self._out_bias, out=self.config.hidden_size)

    def _project(
        self, x: torch.Tensor, batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [padded, heads, nope] and, rotated, [padded, heads, rope]; cache rows [padded, latent + rope]."""
        config = self.config
        both = linear(x, self._in, self._in_bias)
        query = both[:, : self._query_width]
        if self._q_b is not None and self._q_norm is not None:
            normed = rms_norm(query, self._q_norm, _LATENT_EPS)
            query = linear(normed, self._q_b, out=config.num_heads * config.qk_head_dim)
        query = query.view(x.shape[0], config.num_heads, config.qk_head_dim)
        nope, start = config.qk_nope_head_dim, self._query_width + config.kv_lora_rank
        latent = rms_norm(both[:, self._query_width : start], self._kv_norm, _LATENT_EPS)
        key = both[:, None, start : start + config.qk_rope_head_dim]
        rotated = apply_rope(  # the shared key as one head more
            torch.cat([query[..., nope:], key], dim=1),
            batch.cos[:, None],
            batch.sin[:, None],
            interleaved=config.rope_interleave,
        )
        return query[..., :nope], rotated[:, :-1], torch.cat([latent, rotated[:, -1]], dim=-1)

    def _decode(
        self, nope: torch.Tensor, rotary: torch.Tensor, part: DecodePart, pages: torch.Tensor
    ) -> torch.Tensor:
        """Absorbed attention of queries [padded decode rows, heads, nope or rope] -> [the same rows, heads * v]."""
        config, rank = self.config, self.config.kv_lora_rank
        absorbed = torch.bmm(nope.transpose(0, 1), self._to_latent)[..., :rank]
        queries = torch.cat([absorbed.transpose(0, 1), rotary], dim=-1)
        attended = mla_decode(queries, pages, part.items, scale=config.softmax_scale, latent=rank)
        attended = attended.index_select(0, part.restore)
        values = torch.bmm(attended.transpose(0, 1), self._from_latent)[..., : config.v_head_dim]
        return values.transpose(0, 1).reshape(nope.shape[0], -1)

    def _prefill(
        self, queries: torch.Tensor, part: PrefillPart, pages: torch.Tensor
    ) -> torch.Tensor:
        """Naive attention of queries [prompt rows, heads, nope + rope] -> [prompt rows, heads * v]."""
        config = self.config
        nope, heads = config.qk_nope_head_dim, config.num_heads
        context = pages.index_select(
            0, part.tiles.pages
        )  # [distinct pages, page tokens, latent + rope]
        num_pages, tokens = context.shape[:2]
        latent = context[..., : config.kv_lora_rank].reshape(num_pages * tokens, -1)
        expanded = linear(latent, self._kv_b, out=heads * (nope + config.v_head_dim))
        expanded = expanded.reshape(num_pages, tokens, heads, -1).transpose(1, 2)
        rotary = context[:, None, :, config.kv_lora_rank :].expand(-1, heads, -1, -1)
        keys = torch.cat([expanded[..., :nope], rotary], dim=-1)
        attended = mla_prefill(
            queries, keys, expanded[..., nope:], part.tiles, scale=config.softmax_scale
        )
        return attended.reshape(queries.shape[0], -1)

    def _both_biases(self, weights: AttentionLayerWeights) -> torch.Tensor | None:
        """Bias of the joint projection; q_proj has none even where kv_a has one."""
        if weights.kv_a_bias is None:
            return None
        query = weights.q_a_bias
        if query is None:
            query = weights.kv_a_bias.new_zeros(self._query_width)
        return pad_out(torch.cat([query, weights.kv_a_bias]))


def _pad_last(weight: torch.Tensor) -> torch.Tensor:
    """[heads, in, out] with `out` padded by zeros: narrow outputs are not row-independent (see `linear`)."""
    return torch.nn.functional.pad(weight, (0, -weight.shape[-1] % OUT_MULTIPLE)).contiguous()
