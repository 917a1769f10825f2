"""The attention side of the model: everything but the routed experts, layer by layer.

    batch = model.batch(spans, cache)
    h = model.embed(batch)
    for layer in range(config.num_layers):
        h, x = model.attend(layer, h, batch, cache)
        if model.is_dense(layer):
            h = h + model.dense_mlp(layer, x)
        else:
            ids, weights = model.gate(layer, x)
            routed = ...                                    # [num_rows, width], from the experts
            h = model.add_experts(h, routed, model.shared_expert(layer, x))
    logits = model.logits(h, batch.last_rows)

Tensors with a row per token are padded (see `ForwardBatch`); only the first `batch.num_rows` rows mean something.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from common.model.hf_config import GateKind, ModelConfig, load_config
from common.model.loader import AttentionWeights, FfnWeights, load_attention_weights
from common.model.source import open_checkpoint
from kernels.reference.ffn import ffn
from kernels.reference.gate import gate_v2, gate_v3
from kernels.reference.linear import linear, pad_out, resident
from kernels.reference.norm import rms_norm
from kernels.reference.rope import rope_frequencies, rope_tables, yarn_frequencies
from services.attention.batch import ForwardBatch, Span, build_batch
from services.attention.gate_bias import GateBias
from services.attention.latent_cache import LatentCache
from services.attention.mla import MlaLayer


class AttentionModel:
    """Weights and per-layer steps. Rows are independent of one another, bit for bit."""

    def __init__(self, config: ModelConfig, weights: AttentionWeights, *, max_context: int) -> None:
        """`max_context` bounds positions (the rope tables' length); the config's own limit bounds it in turn."""
        self.config = config
        self.max_context = min(max_context, config.max_position)
        dtype = weights.embedding.dtype
        if config.tie_word_embeddings:
            self._embedding = self._head = pad_out(weights.embedding)
        else:
            self._embedding, self._head = weights.embedding, resident(weights.lm_head, dtype)
        self._final_norm = weights.final_norm
        self._layers = weights.layers
        self._mla = [MlaLayer(config, layer.attention) for layer in weights.layers]
        self._dense = [
            None if layer.dense is None else _pad_ffn(layer.dense, dtype)
            for layer in weights.layers
        ]
        self._shared = [
            None if layer.shared is None else _pad_ffn(layer.shared, dtype)
            for layer in weights.layers
        ]
        self._gates = [
            None if layer.gate is None else pad_out(layer.gate.weight) for layer in weights.layers
        ]
        self.gate_biases = {
            i: GateBias(layer.gate.bias)
            for i, layer in enumerate(weights.layers)
            if layer.gate is not None
        }
        table = frequencies(config)
        cos, sin = rope_tables(table, self.max_context, config.rope.attention_factor)
        self._rope = cos.to(dtype), sin.to(dtype)

    @classmethod
    def load(cls, directory: Path, *, max_context: int | None = None) -> "AttentionModel":
        """Read all non-expert weights of a checkpoint. Raises ModelError."""
        config = load_config(directory)
        with open_checkpoint(directory) as checkpoint:
            weights = load_attention_weights(checkpoint, config)
        return cls(config, weights, max_context=max_context or config.max_position)

    def __repr__(self) -> str:
        return f"<AttentionModel {self.config.family} [{self.config.num_layers} layers]>"

    def batch(self, spans: Sequence[Span], cache: LatentCache) -> ForwardBatch:
        """Lay out a step over `spans`, one per sequence."""
        return build_batch(
            spans, page_tokens=cache.page_tokens, null_page=cache.null_page, rope=self._rope
        )

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has a plain MLP and no experts."""
        return self._dense[layer] is not None

    def embed(self, batch: ForwardBatch) -> torch.Tensor:
        """Residual stream at the start: [padded, width]."""
        return self._embedding.index_select(0, batch.token_ids)

    def attend(
        self, layer: int, h: torch.Tensor, batch: ForwardBatch, cache: LatentCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of one layer: the residual after it and the normed input of the MLP, both [padded, width]."""
        weights, eps = self._layers[layer].attention, self.config.rms_norm_eps
        x = rms_norm(h, weights.input_norm, eps)
        h = h + self._mla[layer].forward(layer, x, batch, cache)
        return h, rms_norm(h, weights.post_attention_norm, eps)

    def dense_mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """MLP of a dense layer: [padded, width]."""
        weights = self._dense[layer]
        assert weights is not None, f"layer {layer} is a MoE layer"
        return _ffn(x, weights)

    def shared_expert(self, layer: int, x: torch.Tensor) -> torch.Tensor | None:
        """Shared expert of a MoE layer: [padded, width], or None when the model has none."""
        weights = self._shared[layer]
        return None if weights is None else _ffn(x, weights)

    def gate(self, layer: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert ids int32 and weights fp32, both [padded, top_k]."""
        weight, config = self._gates[layer], self.config
        assert weight is not None, f"layer {layer} is dense"
        bias = self.gate_biases[layer].tensor
        if bias is None or config.gate is not GateKind.SIGMOID_GROUPS:
            return gate_v2(
                x,
                weight,
                bias,
                num_experts=config.num_experts,
                top_k=config.top_k,
                num_groups=config.num_groups if config.gate is GateKind.SOFTMAX_GROUPS else 1,
                top_k_groups=config.top_k_groups,
                routed_scaling_factor=config.routed_scaling_factor,
            )
        return gate_v3(
            x,
            weight,
            bias,
            top_k=config.top_k,
            num_groups=config.num_groups,
            top_k_groups=config.top_k_groups,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )

    def add_experts(
        self, h: torch.Tensor, routed: torch.Tensor, shared: torch.Tensor | None
    ) -> torch.Tensor:
        """h + (routed + shared), the order of additions in transformers; `h` [padded, width] is changed in place.

        routed [num_rows, width] may have fewer rows than h: padding needs no experts.
        """
        num_rows = routed.shape[0]
        h[:num_rows] += routed if shared is None else routed + shared[:num_rows]
        return h

    def logits(self, h: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Next-token logits of some rows (int64 indices): fp32 [rows, vocab]."""
        x = rms_norm(h.index_select(0, rows), self._final_norm, self.config.rms_norm_eps)
        return linear(x, self._head, out=self.config.vocab_size).float()


def _pad_ffn(weights: FfnWeights, dtype: torch.dtype) -> FfnWeights:
    bias, down_bias = weights.gate_up_bias, weights.down_bias
    return replace(
        weights,
        gate_up=resident(weights.gate_up, dtype),
        down=resident(weights.down, dtype),
        gate_up_bias=None if bias is None else pad_out(bias),
        down_bias=None if down_bias is None else pad_out(down_bias),
    )


def _ffn(x: torch.Tensor, weights: FfnWeights) -> torch.Tensor:
    return ffn(
        x,
        weights.gate_up,
        weights.down,
        gate_up_bias=weights.gate_up_bias,
        down_bias=weights.down_bias,
    )


def frequencies(config: ModelConfig) -> torch.Tensor:
    """Rotary frequencies of a model: fp32 [rope / 2]."""
    rope, dim = config.rope, config.qk_rope_head_dim
    if not rope.yarn:
        return rope_frequencies(dim, rope.theta)
    return yarn_frequencies(
        dim,
        rope.theta,
        factor=rope.factor,
        original_max_position=rope.original_max_position,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        truncate=rope.truncate,
    )
