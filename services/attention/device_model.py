"""The attention side of the model on a device, a layer or half of one at a time, captured in CUDA graphs.

    state.fill(spans)
    for i, layer in enumerate(config.moe_layers):
        model.before_experts(state, i)     # add the experts of the layer before, attention, gate, quantisation
        model.shared_expert(state, i)      # while the rows are out; or both at once: model.layer(state, i)
        state.answered(...)                # the rows
    logits = model.head(state, rows)

Dense layers belong to the segment that follows them. Prompt rows go through naive prefill, generated ones through
absorbed decode, as on CPU (`services.attention.mla`). A row's result depends on no other row of its step, but its bits
on the number of rows: products take other kernels above 64 rows. Exact mode (the fp32 wire) is not this module's.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from common.model.hf_config import GateKind, ModelConfig
from kernels import ops
from kernels.graphs import Replays
from kernels.reference.linear import pad_out
from kernels.reference.rope import rope_tables
from services.attention.batch import Span
from services.attention.device_batch import LaneState, PromptPart
from services.attention.device_weights import DeviceLayer, DeviceWeights, Quantised
from services.attention.gate_bias import GateBias
from services.attention.latent_cache import LatentCache
from services.attention.model import frequencies

_LATENT_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says


class DeviceModel:
    """Weights and the steps of a layer. Everything runs on the current stream, in the order of the calls."""

    def __init__(
        self, config: ModelConfig, weights: DeviceWeights, cache: LatentCache, *, max_context: int,
        capture: bool = True,
    ) -> None:  # fmt: skip
        self.config = config
        self.weights = weights
        self.cache = cache
        self.max_context = min(max_context, config.max_position)
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        self.graphs = Replays(self.device, capture=capture)
        table = frequencies(config)
        cos, sin = rope_tables(table, self.max_context, config.rope.attention_factor)
        self._cos, self._sin = cos.to(self.device), sin.to(self.device)
        self._moe = tuple(config.moe_layers)
        self._gates = {i: pad_out(_needed(weights.layers[i].gate)) for i in self._moe}
        self.gate_biases = {i: GateBias(weights.layers[i].gate_bias) for i in self._moe}

    def __repr__(self) -> str:
        return (
            f"<DeviceModel {self.config.family} [{self.config.num_layers} layers | {self.graphs}]>"
        )

    def state(self, max_rows: int) -> LaneState:
        """Buffers for one lane."""
        config, cache = self.config, self.cache
        return LaneState(
            max_rows=max_rows, max_pages=-(-self.max_context // cache.page_tokens),
            width=config.hidden_size, top_k=config.top_k, rope=config.qk_rope_head_dim,
            page_tokens=cache.page_tokens, null_page=cache.null_page, device=self.device,
            dtype=self.dtype,
        )  # fmt: skip

    def before_experts(self, s: LaneState, segment: int) -> None:
        """Everything between the answers of MoE layer `segment` - 1 and the rows of MoE layer `segment`.

        Leaves the quantised rows in `s.rows` and `s.scales`, the same in `s.x`, and, once the device is there, expert
        ids and gate weights in `s.experts` and `s.weights` (host memory): `s.published` tells.
        """
        s.num_launched += 1
        self._run(s, "before", segment, self._before)

    def shared_expert(self, s: LaneState, segment: int) -> None:
        """The shared expert of a MoE layer on `s.x`, into `s.shared`."""
        if self.weights.layers[self._moe[segment]].shared is not None:
            self._run(s, "shared", segment, self._shared)

    def layer(self, s: LaneState, segment: int) -> None:
        """Both, in one graph: the rows are there before it has ended."""
        s.num_launched += 1
        self._run(s, "layer", segment, self._layer)

    @torch.inference_mode()
    def warm_up(self, s: LaneState) -> None:
        """Compile what steps launch, before anybody waits for one. What is in the cache's first pages is lost.

        Every kind of number of rows, as prompts and as generated tokens. Layers are alike.
        """
        page_tokens, num_pages = self.cache.page_tokens, self.cache.num_pages
        most = min(s.max_rows, self.max_context - 1, page_tokens * num_pages)
        for n in ops.KINDS_OF_EXPERT_ROWS:
            if n > most:
                break
            pages = tuple(range(-(-n // page_tokens)))
            for spans in ([Span([0] * n, 0, n, pages)], [Span([0], 1, 1, pages)] * n):
                s.fill(spans)
                for segment in range(min(2, len(self._moe))):
                    s.num_launched += 1
                    self._layer(s, segment)
                self.head(s, s.last_row_index())

    def _layer(self, s: LaneState, segment: int) -> None:
        self._before(s, segment)
        self._shared(s, segment)

    def _shared(self, s: LaneState, segment: int) -> None:
        network, b = self.weights.layers[self._moe[segment]].shared, s.bucket
        if network is not None:
            s.shared[:b].copy_(network(s.x[:b], (s.rows, s.scales)))

    def head(self, s: LaneState, rows: Tensor | None) -> Tensor:
        """Next-token logits: fp32 [rows, vocab] of some rows (int64 indices; None: the first `num_rows`)."""
        if self._moe:
            self._add_experts(s, len(self._moe) - 1)
        else:
            self._run(s, "dense", self.config.num_layers, self._start)
        h = s.h[: s.num_rows] if rows is None else s.h.index_select(0, rows)
        x = ops.rms_norm(h, self.weights.final_norm, self.config.rms_norm_eps)
        if x.is_cuda and x.dtype is torch.bfloat16:
            return torch.mm(x, self.weights.head.t(), out_dtype=torch.float32)
        return linear(x, self.weights.head).float()

    def _run(
        self, s: LaneState, what: str, number: int, step: Callable[[LaneState, int], None]
    ) -> None:
        if s.graph_key is None:
            step(s, number)
        else:
            self.graphs.run((what, number, s.graph_key), lambda: step(s, number))

    def _before(self, s: LaneState, segment: int) -> None:
        layer = self._moe[segment]
        if segment == 0:
            self._start(s, layer)
        else:
            self._add_experts(s, segment - 1)
        b, weights = s.bucket, self.weights.layers[layer]
        self._attend(s, layer)
        x = ops.rms_norm(s.h[:b], weights.post_norm, self.config.rms_norm_eps, out=s.x[:b])
        ids, gate_weights = self._gate(layer, x)
        ops.quantise_rows(x, s.block.tensor, rows_offset=0, scales_offset=s.segment.scales_offset)
        s.publish(ids, gate_weights)

    def _start(self, s: LaneState, dense_layers: int) -> None:
        """Embedding and the dense layers."""
        b, positions = s.bucket, s.input("positions")
        torch.index_select(self._cos, 0, positions, out=s.cos[:b])
        torch.index_select(self._sin, 0, positions, out=s.sin[:b])
        torch.index_select(self.weights.embedding, 0, s.input("token_ids"), out=s.h[:b])
        for layer in range(dense_layers):
            self._attend(s, layer)
            weights = self.weights.layers[layer]
            x = ops.rms_norm(s.h[:b], weights.post_norm, self.config.rms_norm_eps)
            assert weights.dense is not None, f"layer {layer} is a MoE layer"
            s.h[:b] += weights.dense(x)

    def _add_experts(self, s: LaneState, segment: int) -> None:
        b, has_shared = s.bucket, self.weights.layers[self._moe[segment]].shared is not None
        ops.add_placed(s.h[:b], s.place, s.shared[:b] if has_shared else None)

    def _attend(self, s: LaneState, layer: int) -> None:
        """h += attention(norm(h)); the rows' latents go into the cache first."""
        config, w, b = self.config, self.weights.layers[layer], s.bucket
        h, cos, sin = s.h[:b], s.cos[:b], s.sin[:b]
        both = w.latent_in(ops.rms_norm(h, w.input_norm, config.rms_norm_eps))
        query = both[:, : w.query_width]
        if w.q_b is not None and w.q_norm is not None:
            query = w.q_b(ops.rms_norm(query.contiguous(), w.q_norm, _LATENT_EPS))
        query = query.contiguous().view(b, config.num_heads, config.qk_head_dim)
        entries = ops.norm_rope(
            both[:, w.query_width :], w.kv_norm, cos, sin, eps=_LATENT_EPS,
            interleaved=config.rope_interleave,
        )  # fmt: skip
        pages = self.cache.layer(layer)
        ops.cache_write(entries, pages, s.input("slots"), latent=config.kv_lora_rank)
        if s.prompt is None:
            heads = self._decode(
                w, query, (cos, sin), s.input("table"), s.input("context"), pages, s
            )
        else:
            heads = self._mixed(w, query, s, s.prompt, pages)
        h += w.out(heads)

    def _mixed(
        self, w: DeviceLayer, query: Tensor, s: LaneState, prompt: PromptPart, pages: Tensor
    ) -> Tensor:
        cos, sin = s.cos[: s.bucket], s.sin[: s.bucket]
        if prompt.rows is None:
            return self._prefill(w, query, (cos, sin), prompt, pages)
        config = self.config
        heads = query.new_zeros(query.shape[0], config.num_heads * config.v_head_dim)
        rows = prompt.rows
        heads[rows] = self._prefill(w, query[rows], (cos[rows], sin[rows]), prompt, pages)
        if s.decode_rows is not None:
            rows = s.decode_rows
            heads[rows] = self._decode(
                w, query[rows], (cos[rows], sin[rows]), s.input("table")[rows],
                s.input("context")[rows], pages, s,
            )  # fmt: skip
        return heads

    def _decode(
        self, w: DeviceLayer, query: Tensor, rope: Quantised, table: Tensor, context: Tensor,
        pages: Tensor, s: LaneState,
    ) -> Tensor:  # fmt: skip
        """Absorbed attention of query [rows, heads, nope + rope], not yet rotated: [rows, heads * v]."""
        config, (rows, heads, _) = self.config, query.shape
        nope, latent = config.qk_nope_head_dim, config.kv_lora_rank
        queries = query.new_empty(rows, heads, config.latent_width)
        absorbed = queries[..., :latent].transpose(0, 1)
        torch.bmm(query[..., :nope].transpose(0, 1), w.to_latent, out=absorbed)
        ops.rope_queries(query, *rope, queries, nope=nope, interleaved=config.rope_interleave)
        attended = ops.mla_decode_paged(
            queries, pages, table, context, scale=config.softmax_scale, latent=latent,
            max_context=s.max_context,
        )  # fmt: skip
        values = query.new_empty(rows, heads, config.v_head_dim)
        torch.bmm(attended.transpose(0, 1), w.from_latent, out=values.transpose(0, 1))
        return values.view(rows, -1)

    def _prefill(
        self, w: DeviceLayer, query: Tensor, rope: Quantised, part: PromptPart, pages: Tensor
    ) -> Tensor:
        """Naive attention of query [prompt rows, heads, nope + rope], not yet rotated: [rows, heads * v]."""
        config = self.config
        nope, latent, heads = config.qk_nope_head_dim, config.kv_lora_rank, config.num_heads
        query = query.contiguous()
        rotated = query.clone()
        ops.rope_queries(query, *rope, rotated, nope=nope, interleaved=config.rope_interleave)
        context = pages.view(-1, config.latent_width).index_select(0, part.context)
        tokens = context.shape[0]
        latents = context[:, :latent].contiguous()
        keys = query.new_empty(tokens, heads, config.qk_head_dim)
        keys[..., :nope] = linear(latents, w.to_latent.view(heads * nope, latent)).view(
            tokens, heads, nope
        )
        keys[..., nope:] = context[:, None, latent:]
        values = torch.matmul(latents, w.from_latent).transpose(0, 1).contiguous()
        attended = ops.mla_prefill_rows(
            rotated, keys, values, part.starts_q, part.starts_k, scale=config.softmax_scale,
            max_rows=part.max_rows,
        )  # fmt: skip
        return attended.view(query.shape[0], -1)

    def _gate(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        config, bias = self.config, self.gate_biases[layer].tensor
        if bias is None or config.gate is not GateKind.SIGMOID_GROUPS:
            return ops.gate_v2(
                x, self._gates[layer], bias, num_experts=config.num_experts, top_k=config.top_k,
                num_groups=config.num_groups if config.gate is GateKind.SOFTMAX_GROUPS else 1,
                top_k_groups=config.top_k_groups, routed_scaling_factor=config.routed_scaling_factor,
            )  # fmt: skip
        return ops.gate_v3(
            x, self._gates[layer], bias, top_k=config.top_k, num_groups=config.num_groups,
            top_k_groups=config.top_k_groups, norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )  # fmt: skip


def _needed(weight: Tensor | None) -> Tensor:
    assert weight is not None, "a MoE layer without gate"
    return weight
