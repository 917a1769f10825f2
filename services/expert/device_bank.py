"""Experts resident on a GPU: FP8 weights stay FP8 and go through the fused kernel, others are bf16 (fp32 on that wire).

What is launched here runs on the current stream; nothing waits for it. Exact mode is the CPU's: on a GPU the fp32 wire
computes in fp32, but the library's products may give a row other bits in another batch.
"""

import bisect
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn.functional import linear

from common.config import ClusterConfig
from common.errors import ModelError
from common.model import names
from common.model.hf_config import ModelConfig, load_config
from common.model.loader import FfnWeights, load_expert
from common.model.manifest import cluster_manifest, hash_expert
from common.model.slices import sliced_config
from common.model.source import Source, open_checkpoint
from common.placement.plan import Place
from common.plan_file import first_residents
from common.transport.device import open_copy
from common.wire.header import Wire
from kernels import ops
from kernels.graphs import Replays
from kernels.reference.quant import BLOCK
from services.expert.bank import Bank, read_expert

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DeviceExpert:
    """gate_up [2 * hidden, width], gate first; down [width, hidden]. e4m3 where there are scales per 128x128 block."""

    gate_up: Tensor
    down: Tensor
    gate_up_scales: Tensor | None = None
    down_scales: Tensor | None = None

    @property
    def is_fp8(self) -> bool:
        """Whether it goes through the fused kernel."""
        return self.gate_up_scales is not None

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


class GraphedExperts:
    """FP8 experts on few rows as CUDA graphs: a call costs 133 us of Python, copies included; its kernels launched
    one by one cost 271 (128 rows, hidden 2048, two H100 hosts, 2026-11-25).

    A graph per expert and bucket of rows, on buffers that all share; rows that are left over in a bucket hold what
    was there before, and nobody reads theirs.
    """

    BUCKETS = (8, 16, 32, 64, 128)

    def __init__(self, width: int, device: torch.device) -> None:
        blocks = -(-width // BLOCK)
        self._graphs = Replays(device)
        self._width = width
        most = self.BUCKETS[-1]
        self._rows = torch.zeros(most, width, dtype=torch.uint8, device=device)
        self._scales = torch.ones(most, blocks, device=device)
        self._out = torch.empty(most, width, dtype=torch.bfloat16, device=device)
        self._copy = open_copy(device)

    def __call__(self, expert: DeviceExpert, rows: Tensor, scales: Tensor) -> Tensor:
        """rows e4m3 [n, width] with scales fp32, n at most the largest bucket, contiguous: bf16 [n, width]."""
        n = len(rows)
        bucket = self.BUCKETS[bisect.bisect_left(self.BUCKETS, n)]
        self._copy(self._rows.data_ptr(), rows.data_ptr(), rows.nbytes)
        self._copy(self._scales.data_ptr(), scales.data_ptr(), scales.nbytes)
        self._graphs.run((expert, bucket), partial(self._compute, expert, bucket))
        out = torch.empty_like(rows, dtype=torch.bfloat16)
        self._copy(out.data_ptr(), self._out.data_ptr(), out.nbytes)
        return out

    def _compute(self, expert: DeviceExpert, bucket: int) -> None:
        """The step of a graph."""
        rows = self._rows[:bucket].view(torch.float8_e4m3fn)
        self._out[:bucket].copy_(expert(rows, self._scales[:bucket]))

    def forget(self, expert: DeviceExpert) -> None:
        """Its weights are given up: a graph would read them."""
        for bucket in self.BUCKETS:
            self._graphs.forget((expert, bucket))


@dataclass(slots=True)
class DeviceBank(Bank):
    """A bank whose experts are `DeviceExpert`s on the current GPU."""

    experts: dict[Place, DeviceExpert] = field(default_factory=dict)
    graphed: GraphedExperts | None = None

    def __contains__(self, place: object) -> bool:
        return place in self.experts

    def add(self, place: Place, weights: DeviceExpert, digest: str) -> None:  # type: ignore[override]
        """Hold one expert more."""
        self.experts[place] = weights
        self.hashes[place] = digest
        self.rows.setdefault(place, 0)

    def drop(self, place: Place) -> None:
        """Hold an expert no longer; others may stand for the same weights."""
        network = self.experts.pop(place, None)
        shared = any(other is network for other in self.experts.values())
        if network is not None and self.graphed is not None and not shared:
            self.graphed.forget(network)
        Bank.drop(self, place)  # slots: a class of its own, which `super()` would not find

    def ffn(
        self, layer: int, expert: int, rows: Tensor, scales: Tensor | None = None
    ) -> torch.Tensor:
        """SwiGLU network of one expert: rows [n, width] (e4m3 with scales) -> [n, width]."""
        self.rows[layer, expert] += len(rows)
        network = self.experts[layer, expert]
        few = len(rows) <= GraphedExperts.BUCKETS[-1]
        if self.graphed is not None and few and scales is not None and network.is_fp8:
            return self.graphed(network, rows, scales)
        return network(rows, scales)


def load_bank(config: ClusterConfig, worker: int) -> Bank:
    """Read what the plan gives this worker, and nothing else of the checkpoint. Raises ModelError."""
    device = config.cluster.device
    if device == "cpu":
        return Bank.load(config, worker)
    slices, stored = config.placement.expert_slices, load_config(config.model.path)
    model, wire = sliced_config(stored, slices), Wire.parse(config.cluster.wire)
    manifest = cluster_manifest(config)
    places = first_residents(config, stored, worker)
    with open_checkpoint(config.model.path, slices) as checkpoint:
        distinct = {place: checkpoint.stands_for(*place) for place in places}  # each held once
        held = {
            place: load_device_expert(checkpoint, model, place, wire, device)
            for place in set(distinct.values())
        }
        experts = {place: held[same] for place, same in distinct.items()}
        hashes = {place: hash_expert(checkpoint, *place) for place in places}
    counts = dict.fromkeys(places, 0)
    graphed = GraphedExperts(model.hidden_size, torch.device(device))
    return DeviceBank(model.hidden_size, manifest.model_hash, {}, hashes, counts, experts, graphed)


@torch.inference_mode()
def read_one(config: ClusterConfig, place: Place) -> tuple[FfnWeights | DeviceExpert, str]:
    """One expert for a bank, and its hash; may run in a thread. Raises ModelError."""
    slices, device = config.placement.expert_slices, config.cluster.device
    model = sliced_config(load_config(config.model.path), slices)
    with open_checkpoint(config.model.path, slices) as checkpoint:
        digest = hash_expert(checkpoint, *place)
        if device == "cpu":
            return read_expert(checkpoint, model, place), digest
        wire = Wire.parse(config.cluster.wire)
        weights = load_device_expert(checkpoint, model, place, wire, device)
    torch.cuda.current_stream().synchronize()  # this thread's stream is not the one that computes
    return weights, digest


def load_device_expert(
    checkpoint: Source, config: ModelConfig, place: Place, wire: Wire, device: str
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
        weights.append(checkpoint.read(name, device).view(torch.uint8))
        scales.append(checkpoint.read(name + names.SCALE_SUFFIX, device).float())
    gate_up = torch.cat(weights[:2]).view(torch.float8_e4m3fn)
    down = weights[2].view(torch.float8_e4m3fn)
    return DeviceExpert(gate_up, down, torch.cat(scales[:2]), scales[2].contiguous())
