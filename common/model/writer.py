"""Writes small random checkpoints in Hugging Face layout: the default model, `--ep N` models and tests.

The same config and seed give the same bytes. Standard deviations are chosen so that greedy output wanders (no token
repeated for ever) and every expert gets rows: each branch adds about as much to the residual as is there, the
embedding is weak against it (with tied embeddings a strong one would repeat its own token), gates are sharp.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common.model import names
from common.model.checkpoint import INDEX, SINGLE
from common.model.hf_config import GateKind, ModelConfig, parse_config
from common.model.safetensors_file import DTYPES, write_safetensors

_EMBEDDING_STD = 0.3
# Spread of the logits and gain of the routed experts: with larger ones a network of random weights is chaotic (the FP8
# wire alone moved distributions by 0.1 nats), which no trained one is; smaller ones make dull text.
_LOGIT_STD = 2.0
_ROUTED_GAIN = 0.85
_GATE_LOGIT_STD = 1.2
_GATE_BIAS_STD = 0.02
_FP8_MAX = 448.0


def write_random(
    directory: Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    storage: str = "F32",
    max_shard_nbytes: int | None = None,
) -> ModelConfig:
    """Write config.json and safetensors files into `directory` (made if needed) and return the parsed config.

    `storage` is F32, F16, BF16 or F8_E4M3 (projections in FP8 with `weight_scale_inv`, the rest in BF16; the config
    gets a quantization_config). With `max_shard_nbytes` several files and an index are written.
    """
    document = dict(config)
    if storage == "F8_E4M3":
        quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
        document["quantization_config"] = quantization | {"weight_block_size": [128, 128]}
    parsed = parse_config(document, source="config.json")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(document, indent=2) + "\n")
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        stored
        for name, tensor in random_tensors(parsed, generator)
        for stored in _store(name, tensor, storage, parsed.fp8_block)
    ]
    if max_shard_nbytes is None:
        write_safetensors(directory / SINGLE, tensors)
    else:
        _write_shards(directory, tensors, max_shard_nbytes)
    return parsed


def random_tensors(
    config: ModelConfig, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a checkpoint in fp32, in a fixed order."""

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    width = config.hidden_size
    logit_std = _LOGIT_STD / math.sqrt(width)
    embedding_std = logit_std if config.tie_word_embeddings else _EMBEDDING_STD
    yield names.EMBEDDING, normal(config.vocab_size, width, std=embedding_std)
    for index in range(config.num_layers):
        for name, tensor in _layer(config, index, generator):
            yield names.layer(index, name), tensor
    yield names.FINAL_NORM, 1 + normal(width, std=0.1)
    if not config.tie_word_embeddings:
        yield names.LM_HEAD, normal(config.vocab_size, width, std=logit_std)


def _layer(
    config: ModelConfig, index: int, generator: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    def projection(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))

    def norm(size: int) -> torch.Tensor:
        return 1 + torch.randn(size, generator=generator) * 0.1

    def bias(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator) * 0.1

    def ffn(
        prefix: str, inner: int, *, biased: bool, gain: float
    ) -> Iterator[tuple[str, torch.Tensor]]:
        gate, up, down = names.ffn_weights(prefix)
        yield gate, projection(inner, width)
        yield up, projection(inner, width)
        yield down, projection(width, inner, gain)
        if biased:
            for name, size in zip(names.ffn_biases(prefix), (inner, inner, width), strict=True):
                yield name, bias(size)

    width, rank, biased = config.hidden_size, config.q_lora_rank, config.attention_bias
    yield names.INPUT_NORM, norm(width)
    yield names.POST_ATTENTION_NORM, norm(width)
    if rank is None:
        yield names.Q, projection(config.num_heads * config.qk_head_dim, width, 1.5)
    else:
        yield names.Q_A, projection(rank, width)
        if biased:
            yield names.Q_A_BIAS, bias(rank)
        yield names.Q_A_NORM, norm(rank)
        yield names.Q_B, projection(config.num_heads * config.qk_head_dim, rank, 1.5)
    yield names.KV_A, projection(config.latent_width, width, 1.5)
    if biased:
        yield names.KV_A_BIAS, bias(config.latent_width)
    yield names.KV_A_NORM, norm(config.kv_lora_rank)
    kv_out = config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield names.KV_B, projection(kv_out, config.kv_lora_rank)
    yield names.OUT, projection(width, config.num_heads * config.v_head_dim, 1.5)
    if biased:
        yield names.OUT_BIAS, bias(width)
    if index not in config.moe_layers:
        yield from ffn(names.DENSE, config.intermediate_size, biased=config.mlp_bias, gain=2.0)
        return
    yield names.GATE, projection(config.num_experts, width, _GATE_LOGIT_STD)
    if config.gate is GateKind.SIGMOID_GROUPS:
        yield names.GATE_BIAS, torch.randn(config.num_experts, generator=generator) * _GATE_BIAS_STD
    # softmax weights are small where there are many experts; sigmoid weights are normalised or near one each
    routed_gain = _ROUTED_GAIN * (
        1.0 if config.gate is GateKind.SIGMOID_GROUPS else math.sqrt(config.num_experts)
    )
    for expert in range(config.num_experts):
        gain = routed_gain / config.routed_scaling_factor
        yield from ffn(names.expert(expert), config.moe_intermediate_size, biased=False, gain=gain)
    if config.num_shared_experts:
        yield from ffn(
            names.SHARED, config.shared_intermediate_size, biased=config.mlp_bias, gain=1.5
        )


def _store(
    name: str, tensor: torch.Tensor, storage: str, block: tuple[int, int] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    if name.endswith(names.GATE_BIAS):
        yield name, tensor  # stays fp32, as in published checkpoints
    elif storage != "F8_E4M3":
        yield name, tensor.to(DTYPES[storage])
    elif block is not None and "_proj" in name and name.endswith(".weight"):
        quantised, scales = quantise_blocks(tensor, block)
        yield name, quantised
        yield name + names.SCALE_SUFFIX, scales
    else:
        yield name, tensor.to(torch.bfloat16)


def quantise_blocks(
    weight: torch.Tensor, block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 [m, n] and fp32 scales [ceil(m / rows), ceil(n / columns)]: each block's largest value becomes 448."""
    rows, columns = -(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])
    padded = torch.zeros(rows * block[0], columns * block[1])
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, block[0], columns, block[1])
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / _FP8_MAX
    scaled = (blocks / scales[:, None, :, None]).reshape(padded.shape)
    quantised = scaled[: weight.shape[0], : weight.shape[1]].clamp(-_FP8_MAX, _FP8_MAX)
    return quantised.to(torch.float8_e4m3fn), scales


def _write_shards(
    directory: Path, tensors: list[tuple[str, torch.Tensor]], max_shard_nbytes: int
) -> None:
    shards: list[list[tuple[str, torch.Tensor]]] = [[]]
    used = 0
    for name, tensor in tensors:
        if shards[-1] and used + tensor.nbytes > max_shard_nbytes:
            shards.append([])
            used = 0
        shards[-1].append((name, tensor))
        used += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, shard)
        weight_map |= {name: file for name, _ in shard}
    total = sum(tensor.nbytes for _, tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
