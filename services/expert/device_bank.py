"""Experts resident on a GPU: FP8 weights stay FP8 and go through the fused kernel, others are bf16 (fp32 on that wire).

What is launched here runs on the current stream; nothing waits for it. Exact mode is the CPU's: on a GPU the fp32 wire
computes in fp32, but the library's products may give a row other bits in another batch.
"""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import linear

from common.config import ClusterConfig
from common.errors import ModelError
from common.model import names
from common.model.checkpoint import Checkpoint
from common.model.hf_config import ModelConfig, load_config
from common.model.loader import load_expert
from common.model.manifest import cluster_manifest, hash_expert
from common.model.slices import SlicedCheckpoint, sliced_config
from common.plan_file import cluster_plan
from common.wire.header import Wire
from kernels import ops
from kernels.reference.quant import BLOCK
from services.expert.bank import Bank, Place

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceExpert:
    """gate_up [2 * hidden, width], gate first; down [width, hidden]. e4m3 where there are scales per 128x128 block."""

    gate_up: Tensor
    down: Tensor
    gate_up_scales: Tensor | None = None
    down_scales: Tensor | None = None

    def __call__(self, rows: Tensor, scales: Tensor | None) -> Tensor:
        """rows [n, width], e4m3 where `scales` fp32 [n, ceil(width / 128)] are given: [n, width], bf16 or fp32."""
        if self.gate_up_scales is not None and self.down_scales is not None:
            if scales is None:
                rows, scales = ops.quantise(rows)
            return ops.expert_ffn(
                rows, scales, self.gate_up, self.gate_up_scales, self.down, self.down_scales
            )
        dtype = self.gate_up.dtype
        x = rows.to(dtype) if scales is None else ops.dequantise(rows, scales, dtype)
        gate, up = linear(x, self.gate_up).float().chunk(2, dim=1)
        return linear((torch.nn.functional.silu(gate) * up).to(dtype), self.down)


@dataclass(slots=True)
class DeviceBank(Bank):
    """A bank whose experts are `DeviceExpert`s on the current GPU."""

    experts: dict[Place, DeviceExpert] = field(default_factory=dict)

    def __contains__(self, place: object) -> bool:
        return place in self.experts

    def ffn(
        self, layer: int, expert: int, rows: Tensor, scales: Tensor | None = None
    ) -> torch.Tensor:
        """SwiGLU network of one expert: rows [n, width] (e4m3 with scales) -> [n, width]."""
        self.rows[layer, expert] += len(rows)
        return self.experts[layer, expert](rows, scales)


def load_bank(config: ClusterConfig, worker: int) -> Bank:
    """Read what the plan gives this worker, and nothing else of the checkpoint. Raises ModelError."""
    device = config.cluster.device
    if device == "cpu":
        return Bank.load(config, worker)
    stored, slices = load_config(config.model.path), config.placement.expert_slices
    model, wire = sliced_config(stored, slices), Wire.parse(config.cluster.wire)
    manifest = cluster_manifest(config)
    places = cluster_plan(config, stored).residents(worker)
    with SlicedCheckpoint(config.model.path, slices) as checkpoint:
        experts = {p: load_device_expert(checkpoint, model, p, wire, device) for p in places}
        hashes = {place: hash_expert(checkpoint, *place) for place in places}
    counts = dict.fromkeys(places, 0)
    return DeviceBank(model.hidden_size, manifest.model_hash, {}, hashes, counts, experts)


def load_device_expert(
    checkpoint: Checkpoint, config: ModelConfig, place: Place, wire: Wire, device: str
) -> DeviceExpert:
    """One routed expert. Raises ModelError naming the tensor that is missing or has a wrong shape."""
    width, hidden = config.hidden_size, config.moe_intermediate_size
    found = names.ffn_weights(names.layer(place[0], names.expert(place[1])))
    is_fp8 = all(checkpoint.entry(name).dtype == "F8_E4M3" for name in found)
    fits = config.fp8_block == (BLOCK, BLOCK) and width % 16 == 0 and hidden % 16 == 0
    if wire is Wire.FP32 or not is_fp8 or not fits:
        dtype = torch.float32 if wire is Wire.FP32 else torch.bfloat16
        plain = load_expert(checkpoint, config, *place, dtype=dtype, device=device)
        return DeviceExpert(plain.gate_up, plain.down)
    shapes = ((hidden, width), (hidden, width), (width, hidden))
    weights, scales = [], []
    for name, shape in zip(found, shapes, strict=True):
        blocks = tuple(-(-n // BLOCK) for n in shape)
        for tensor, wanted in ((name, shape), (name + names.SCALE_SUFFIX, blocks)):
            entry = checkpoint.entry(tensor)
            if entry.shape != wanted:
                raise ModelError(
                    f"{checkpoint.directory}: tensor {tensor} has shape {list(entry.shape)}, "
                    f"config.json means {list(wanted)}"
                )
        weights.append(checkpoint.read(name).view(torch.uint8))
        scales.append(checkpoint.read(name + names.SCALE_SUFFIX).float())
    gate_up = torch.cat(weights[:2]).to(device).view(torch.float8_e4m3fn)
    down = weights[2].to(device).view(torch.float8_e4m3fn)
    return DeviceExpert(
        gate_up, down, torch.cat(scales[:2]).to(device), scales[2].contiguous().to(device)
    )
