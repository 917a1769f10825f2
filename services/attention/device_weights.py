"""The attention side's weights on a device: FP8 matrices stay FP8 with their block scales, everything else is bf16.

A matrix that the FP8 kernels cannot take (not quantised in 128x128 blocks, or of a width that is no multiple of 128)
is held in the compute dtype. What can be joined into one product is joined: query and latent down-projection, gate and
up. The absorbed halves of `kv_b` are batched per head and stay in the compute dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from common.errors import ModelError
from common.model import names
from common.model.hf_config import GateKind, ModelConfig
from common.model.loader import dequantise
from common.model.source import Source
from kernels import ops
from kernels.reference.ffn import silu

BLOCK = 128
Quantised = tuple[Tensor, Tensor]  # e4m3 rows, fp32 scales


@dataclass(frozen=True, slots=True)
class Matrix:
    """weight [out, in], e4m3 when `scales` fp32 [ceil(out / 128), ceil(in / 128)] is given; bias or None."""

    weight: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, x: Tensor, quantised: Quantised | None = None) -> Tensor:
        """x [rows, in] times the weight transposed: [rows, out]. `quantised` are the same rows, if they are there."""
        if self.scales is None:
            return linear(x, self.weight, self.bias)
        rows, scales = quantised or ops.quantise(x)
        result = ops.fp8_linear(rows, scales, self.weight, self.scales)
        return result if self.bias is None else result + self.bias

    def wide(self, dtype: torch.dtype) -> Tensor:
        """The weight without scales."""
        if self.scales is None:
            return self.weight.to(dtype)
        return dequantise(self.weight, self.scales, (BLOCK, BLOCK)).to(dtype)


@dataclass(frozen=True, slots=True)
class Network:
    """SwiGLU network; `gate_up` has the gate's rows first, its scales start anew with up's."""

    gate_up: Matrix
    down: Matrix

    def __call__(self, x: Tensor, quantised: Quantised | None = None) -> Tensor:
        """x [rows, width] -> [rows, width]."""
        if self.gate_up.scales is not None and self.down.scales is not None:
            rows, scales = quantised or ops.quantise(x)
            return ops.expert_ffn(
                rows, scales, self.gate_up.weight, self.gate_up.scales, self.down.weight,
                self.down.scales,
            )  # fmt: skip
        both = self.gate_up(x).float()
        inner = both.shape[1] // 2
        return self.down((silu(both[:, :inner]) * both[:, inner:]).to(x.dtype))


@dataclass(frozen=True, slots=True)
class DeviceLayer:
    """One layer. `latent_in` gives query (or its compression) and latent side by side, `query_width` divides them."""

    input_norm: Tensor
    post_norm: Tensor
    latent_in: Matrix
    query_width: int
    q_norm: Tensor | None
    q_b: Matrix | None
    kv_norm: Tensor
    to_latent: Tensor  # [heads, nope, latent]
    from_latent: Tensor  # [heads, latent, v]
    out: Matrix
    dense: Network | None
    shared: Network | None
    gate: Tensor | None  # fp32 [experts, width]
    gate_bias: Tensor | None  # fp32 [experts]


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """All of them; the head in the compute dtype."""

    embedding: Tensor
    layers: tuple[DeviceLayer, ...]
    final_norm: Tensor
    head: Tensor


def load_device_weights(
    checkpoint: Source, config: ModelConfig, *, device: str, dtype: torch.dtype
) -> DeviceWeights:
    """Read everything but the routed experts. Raises ModelError naming what is missing or cannot run on a GPU."""
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    if latent & (latent - 1) or rope & (rope - 1) or rope < 16:
        raise ModelError(
            f"{checkpoint.directory}: kv_lora_rank {latent} and qk_rope_head_dim {rope} must be powers of two, the "
            f"latter at least 16, to run on a GPU"
        )
    width, value = config.qk_head_dim, config.v_head_dim
    if width % 8 or value % 8 or width > 192 or value > 128:
        raise ModelError(
            f"{checkpoint.directory}: queries of {width} and values of {value} columns a head must have multiples of "
            f"8, at most 192 and 128, to run on a GPU"
        )
    read = Reader(checkpoint, config, device, dtype)
    embedding = read.vector(names.EMBEDDING)
    tied = config.tie_word_embeddings
    return DeviceWeights(
        embedding, tuple(_layer(read, config, index) for index in range(config.num_layers)),
        read.vector(names.FINAL_NORM), embedding if tied else read.vector(names.LM_HEAD),
    )  # fmt: skip


class Reader:
    """Tensors of a checkpoint as they stay on the device."""

    def __init__(
        self, checkpoint: Source, config: ModelConfig, device: str, dtype: torch.dtype
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.device = device
        self.dtype = dtype

    def vector(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Anything that is no FP8 matrix."""
        return self.checkpoint.read(name, self.device).to(dtype or self.dtype)

    def matrix(self, name: str, rows: int, columns: int, bias: str = "") -> Matrix:
        """A projection. Raises ModelError when its shape is another."""
        entry = self.checkpoint.entry(name)
        if entry.shape != (rows, columns):
            raise ModelError(
                f"{self.checkpoint.directory}: tensor {name} has shape {list(entry.shape)}, "
                f"config.json means {[rows, columns]}"
            )
        weight = self.checkpoint.read(name, self.device)
        held_bias = self.vector(bias) if bias else None
        if entry.dtype != "F8_E4M3":
            return Matrix(weight.to(self.dtype), None, held_bias)
        block = self.config.fp8_block
        scales = self.checkpoint.read(name + names.SCALE_SUFFIX, self.device).float()
        if block is None:
            raise ModelError(f"{name} is FP8 and config.json has no quantization_config")
        if block == (BLOCK, BLOCK) and columns % BLOCK == 0 and rows % 16 == 0:
            return Matrix(weight, scales.contiguous(), held_bias)
        wide = dequantise(weight, scales, block)
        return Matrix(wide.to(self.dtype), None, held_bias)

    def network(self, prefix: str, inner: int, *, biased: bool) -> Network:
        """A SwiGLU network."""
        width = self.config.hidden_size
        found, biases = names.ffn_weights(prefix), names.ffn_biases(prefix) if biased else ("",) * 3
        gate, up = (self.matrix(found[i], inner, width, biases[i]) for i in range(2))
        down = self.matrix(found[2], width, inner, biases[2])
        if down.scales is None or biased:  # one form for both products
            gate, up, down = (Matrix(m.wide(self.dtype), None, m.bias) for m in (gate, up, down))
        return Network(joined(gate, up, self.dtype, halves=True), down)


def joined(a: Matrix, b: Matrix, dtype: torch.dtype, *, halves: bool = False) -> Matrix:
    """One product for both; FP8 where block rows stay block rows (or, with `halves`, start anew by agreement)."""
    bias = None
    if a.bias is not None or b.bias is not None:
        parts = [
            m.weight.new_zeros(m.weight.shape[0], dtype=dtype) if m.bias is None else m.bias
            for m in (a, b)
        ]
        bias = torch.cat(parts)
    if a.scales is not None and b.scales is not None and (halves or a.weight.shape[0] % BLOCK == 0):
        weight = torch.cat([m.weight.view(torch.uint8) for m in (a, b)]).view(torch.float8_e4m3fn)
        return Matrix(weight, torch.cat([a.scales, b.scales]), bias)
    return Matrix(torch.cat([a.wide(dtype), b.wide(dtype)]), None, bias)


def _layer(read: Reader, config: ModelConfig, index: int) -> DeviceLayer:
    width, rank, heads, biased = (
        config.hidden_size, config.q_lora_rank, config.num_heads, config.attention_bias,
    )  # fmt: skip

    def name(tensor: str) -> str:
        return names.layer(index, tensor)

    def bias(tensor: str) -> str:
        return name(tensor) if biased else ""

    query_rows = heads * config.qk_head_dim
    if rank is None:
        query = read.matrix(name(names.Q), query_rows, width)
        q_b = q_norm = None
    else:
        query = read.matrix(name(names.Q_A), rank, width, bias(names.Q_A_BIAS))
        q_b = read.matrix(name(names.Q_B), query_rows, rank)
        q_norm = read.vector(name(names.Q_A_NORM))
    kv_a = read.matrix(name(names.KV_A), config.latent_width, width, bias(names.KV_A_BIAS))
    nope, value, latent = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    kv_b = read.matrix(name(names.KV_B), heads * (nope + value), latent)
    per_head = kv_b.wide(read.dtype).view(heads, nope + value, latent)
    moe = index in config.moe_layers
    inner = config.shared_intermediate_size
    return DeviceLayer(
        input_norm=read.vector(name(names.INPUT_NORM)),
        post_norm=read.vector(name(names.POST_ATTENTION_NORM)),
        latent_in=joined(query, kv_a, read.dtype),
        query_width=query.weight.shape[0],
        q_norm=q_norm,
        q_b=q_b,
        kv_norm=read.vector(name(names.KV_A_NORM)),
        to_latent=per_head[:, :nope].contiguous(),
        from_latent=per_head[:, nope:].transpose(1, 2).contiguous(),
        out=read.matrix(name(names.OUT), width, heads * value, bias(names.OUT_BIAS)),
        dense=None
        if moe
        else read.network(name(names.DENSE), config.intermediate_size, biased=config.mlp_bias),
        shared=read.network(name(names.SHARED), inner, biased=config.mlp_bias)
        if moe and inner
        else None,
        gate=read.vector(name(names.GATE), torch.float32) if moe else None,
        gate_bias=read.vector(name(names.GATE_BIAS), torch.float32)
        if moe and config.gate is GateKind.SIGMOID_GROUPS
        else None,
    )
