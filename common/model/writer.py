"""Writes small random checkpoints in Hugging Face layout: the default model, `--ep N` models and tests.

The same config and seed give the same bytes; `common.model.tensor_shapes` says how they are distributed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from common.model import names
from common.model.checkpoint import INDEX, SINGLE
from common.model.hf_config import ModelConfig, parse_config
from common.model.safetensors_file import DTYPES, write_safetensors
from common.model.tensor_shapes import tensor_shapes

_FP8_MAX = 448.0


def write_random(
    directory: Path, config: dict[str, Any], *, seed: int = 0, storage: str = "F32",
    max_shard_nbytes: int | None = None,
) -> ModelConfig:  # fmt: skip
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
    for name, shape, std, mean in tensor_shapes(config):
        values = torch.randn(*shape, generator=generator) * std
        yield name, values + mean if mean else values


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
    padded = pad(weight.float(), (0, -weight.shape[1] % block[1], 0, -weight.shape[0] % block[0]))
    blocks = padded.view(padded.shape[0] // block[0], block[0], -1, block[1])
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
