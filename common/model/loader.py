"""Checkpoint tensors -> the weights that a worker computes with. Each worker calls only for what it holds.

Decides dequantisation (FP8 weight times its block's `weight_scale_inv`, in fp32) and checks every shape against the
config. The layouts are transformers' own: a projection is [out, in].
"""

from dataclasses import dataclass

import torch

from common.errors import ModelError
from common.model import names
from common.model.hf_config import GateKind, ModelConfig
from common.model.source import Source

_STORED_16_BIT = {"F16": torch.float16, "BF16": torch.bfloat16}
_WEIGHT_DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F64")


@dataclass(frozen=True, slots=True)
class FfnWeights:
    """SwiGLU network: `gate_up` [2 * inner, width] (gate rows first), `down` [width, inner]; biases or None."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionLayerWeights:
    """MLA of one layer, names as in transformers. Without query compression `q_a*` are None and `q_b` is `q_proj`."""

    input_norm: torch.Tensor  # [width]
    post_attention_norm: torch.Tensor  # [width]
    q_a: torch.Tensor | None  # [q_lora, width]
    q_a_bias: torch.Tensor | None
    q_a_norm: torch.Tensor | None  # [q_lora]
    q_b: torch.Tensor  # [heads * (nope + rope), q_lora or width]
    kv_a: torch.Tensor  # [kv_lora + rope, width]
    kv_a_bias: torch.Tensor | None
    kv_a_norm: torch.Tensor  # [kv_lora]
    kv_b: torch.Tensor  # [heads * (nope + v), kv_lora]
    out: torch.Tensor  # [width, heads * v]
    out_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class GateWeights:
    """`weight` [experts, width] and `bias` [experts] (V3 only), both fp32 whatever the compute dtype."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A layer without its routed experts: `dense` in dense layers, `gate` and perhaps `shared` in MoE layers."""

    attention: AttentionLayerWeights
    dense: FfnWeights | None
    gate: GateWeights | None
    shared: FfnWeights | None


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Everything that an attention worker holds. With tied embeddings `lm_head` is `embedding`."""

    embedding: torch.Tensor  # [vocab, width]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [width]
    lm_head: torch.Tensor  # [vocab, width]


def load_attention_weights(checkpoint: Source, config: ModelConfig) -> AttentionWeights:
    """All weights but the routed experts, in fp32 on CPU; projections and feed-forward matrices of 16 bits as stored.

    Raises ModelError naming the tensor that is missing or has a wrong shape.
    """
    reader = _Reader(checkpoint, config, keep_16_bit=True)
    embedding = reader.weight(names.EMBEDDING, config.vocab_size, config.hidden_size)
    return AttentionWeights(
        embedding=embedding,
        layers=tuple(_layer(reader, config, index) for index in range(config.num_layers)),
        final_norm=reader.weight(names.FINAL_NORM, config.hidden_size),
        lm_head=embedding
        if config.tie_word_embeddings
        else reader.matrix(names.LM_HEAD, config.vocab_size, config.hidden_size),
    )


def load_expert(
    checkpoint: Source, config: ModelConfig, layer: int, expert: int, *,
    dtype: torch.dtype = torch.float32, device: str = "cpu", keep_16_bit: bool = False,
) -> FfnWeights:  # fmt: skip
    """One routed expert. Raises ModelError naming the tensor that is missing or has a wrong shape.

    With `keep_16_bit`, matrices stored in 16 bits stay as stored.
    """
    reader = _Reader(checkpoint, config, dtype, device, keep_16_bit=keep_16_bit)
    prefix = names.layer(layer, names.expert(expert))
    return _ffn(reader, prefix, config.moe_intermediate_size, bias=False)


def expert_tensor_names(checkpoint: Source, layer: int, expert: int) -> list[str]:
    """Tensors of one routed expert, scales included, in a fixed order. Raises ModelError on a missing weight."""
    found: list[str] = []
    for name in names.ffn_weights(names.layer(layer, names.expert(expert))):
        checkpoint.entry(name)
        found.append(name)
        if name + names.SCALE_SUFFIX in checkpoint:
            found.append(name + names.SCALE_SUFFIX)
    return found


def dequantise(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """fp32 weight [m, n] from e4m3 and one scale per block [ceil(m / rows), ceil(n / columns)], in fp32."""
    rows = scales.float().repeat_interleave(block[0], dim=0)[: weight.shape[0]]
    return weight.float() * rows.repeat_interleave(block[1], dim=1)[:, : weight.shape[1]]


class _Reader:
    """Reads, checks, dequantises and converts; holds what every call shares."""

    def __init__(
        self, checkpoint: Source, config: ModelConfig, dtype: torch.dtype = torch.float32,
        device: str = "cpu", *, keep_16_bit: bool,
    ) -> None:  # fmt: skip
        self.checkpoint = checkpoint
        self.config = config
        self.dtype = dtype
        self.device = device
        self.keep_16_bit = keep_16_bit

    def weight(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A weight of exactly `shape` in the compute dtype (or `dtype`)."""
        entry = self.checkpoint.entry(name)
        where = f"{self.checkpoint.directory}: tensor {name}"
        if entry.shape != shape:
            raise ModelError(
                f"{where} has shape {list(entry.shape)}, config.json means {list(shape)}"
            )
        if entry.dtype not in _WEIGHT_DTYPES:
            raise ModelError(
                f"{where} has dtype {entry.dtype}, supported are {', '.join(_WEIGHT_DTYPES)}"
            )
        tensor = self.checkpoint.read(name)
        if entry.dtype == "F8_E4M3":
            tensor = self._dequantise(name, tensor)
        return tensor.to(device=self.device, dtype=dtype or self.dtype)

    def matrix(self, name: str, *shape: int) -> torch.Tensor:
        """A matrix for `kernels.reference.linear`: in the compute dtype, or as stored (see `keep_16_bit`)."""
        stored = _STORED_16_BIT.get(self.checkpoint.entry(name).dtype)
        return self.weight(name, *shape, dtype=stored if self.keep_16_bit else None)

    def optional(self, wanted: bool, name: str, *shape: int) -> torch.Tensor | None:
        """A weight, or None where the config has none."""
        return self.weight(name, *shape) if wanted else None

    def _dequantise(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        block = self.config.fp8_block
        scale_name = name + names.SCALE_SUFFIX
        where = f"{self.checkpoint.directory}: tensor {name}"
        if block is None:
            raise ModelError(f"{where} is FP8 and config.json has no quantization_config")
        if tensor.dim() != 2 or scale_name not in self.checkpoint:
            raise ModelError(f"{where} is FP8 and {scale_name} is missing")
        shape = (-(-tensor.shape[0] // block[0]), -(-tensor.shape[1] // block[1]))
        scales = self.checkpoint.read(scale_name)
        if tuple(scales.shape) != shape:
            raise ModelError(
                f"{self.checkpoint.directory}: tensor {scale_name} has shape {list(scales.shape)}, "
                f"blocks of {block[0]}x{block[1]} mean {list(shape)}"
            )
        return dequantise(tensor, scales, block)


def _layer(reader: _Reader, config: ModelConfig, index: int) -> LayerWeights:
    attention = _attention(reader, config, index)
    if index not in config.moe_layers:
        prefix = names.layer(index, names.DENSE)
        dense = _ffn(reader, prefix, config.intermediate_size, bias=config.mlp_bias)
        return LayerWeights(attention, dense, None, None)
    shape = (config.num_experts, config.hidden_size)
    gate = GateWeights(
        reader.weight(names.layer(index, names.GATE), *shape, dtype=torch.float32),
        reader.weight(names.layer(index, names.GATE_BIAS), config.num_experts, dtype=torch.float32)
        if config.gate is GateKind.SIGMOID_GROUPS
        else None,
    )
    shared = None
    if config.num_shared_experts:
        prefix = names.layer(index, names.SHARED)
        shared = _ffn(reader, prefix, config.shared_intermediate_size, bias=config.mlp_bias)
    return LayerWeights(attention, None, gate, shared)


def _attention(reader: _Reader, config: ModelConfig, index: int) -> AttentionLayerWeights:
    width, rank, heads = config.hidden_size, config.q_lora_rank, config.num_heads
    biased = config.attention_bias

    def name(tensor: str) -> str:
        return names.layer(index, tensor)

    q_a = q_a_bias = q_a_norm = None
    if rank is None:
        q_b = reader.matrix(name(names.Q), heads * config.qk_head_dim, width)
    else:
        q_a = reader.matrix(name(names.Q_A), rank, width)
        q_a_bias = reader.optional(biased, name(names.Q_A_BIAS), rank)
        q_a_norm = reader.weight(name(names.Q_A_NORM), rank)
        q_b = reader.matrix(name(names.Q_B), heads * config.qk_head_dim, rank)
    kv_out = heads * (config.qk_nope_head_dim + config.v_head_dim)
    return AttentionLayerWeights(
        input_norm=reader.weight(name(names.INPUT_NORM), width),
        post_attention_norm=reader.weight(name(names.POST_ATTENTION_NORM), width),
        q_a=q_a,
        q_a_bias=q_a_bias,
        q_a_norm=q_a_norm,
        q_b=q_b,
        kv_a=reader.matrix(name(names.KV_A), config.latent_width, width),
        kv_a_bias=reader.optional(biased, name(names.KV_A_BIAS), config.latent_width),
        kv_a_norm=reader.weight(name(names.KV_A_NORM), config.kv_lora_rank),
        kv_b=reader.weight(name(names.KV_B), kv_out, config.kv_lora_rank),
        out=reader.matrix(name(names.OUT), width, heads * config.v_head_dim),
        out_bias=reader.optional(biased, name(names.OUT_BIAS), width),
    )


def _ffn(reader: _Reader, prefix: str, inner: int, *, bias: bool) -> FfnWeights:
    width = reader.config.hidden_size
    gate, up, down = names.ffn_weights(prefix)
    gate_up = torch.cat([reader.matrix(gate, inner, width), reader.matrix(up, inner, width)])
    down_weight = reader.matrix(down, width, inner)
    if not bias:
        return FfnWeights(gate_up, down_weight)
    gate_bias, up_bias, down_bias = names.ffn_biases(prefix)
    both = torch.cat([reader.weight(gate_bias, inner), reader.weight(up_bias, inner)])
    return FfnWeights(gate_up, down_weight, both, reader.weight(down_bias, width))
