"""Experts resident on a GPU: FP8 weights stay FP8 and go through the fused kernel, others are bf16 (fp32 on that wire).

What is launched here runs on the current stream; nothing waits for it. Exact mode is the CPU's: on a GPU the fp32 wire
computes in fp32, but the library's products may give a row other bits in another batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

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
from common.wire.header import Wire
from kernels import ops
from kernels.reference.quant import BLOCK
from services.expert.bank import MAX_BATCH_ROWS, Bank, Call, read_expert
from services.expert.desk import Answered, Desk
from services.expert.device_experts import DeviceExpert, GraphedExperts, Group, GroupedExperts

Tensor = torch.Tensor


@dataclass(slots=True)
class DeviceBank(Bank):
    """A bank whose experts are `DeviceExpert`s on the current GPU."""

    experts: dict[Place, DeviceExpert] = field(default_factory=dict)
    graphed: GraphedExperts | None = None
    grouped: GroupedExperts | None = None  # where a layer has several experts here
    by_graph: bool = False  # the last `together`, of one expert
    desk: Desk | None = None

    def __contains__(self, place: object) -> bool:
        return place in self.experts

    def add(self, place: Place, weights: DeviceExpert, digest: str) -> None:  # type: ignore[override]
        """Hold one expert more."""
        if self.grouped is not None and weights.is_fp8:
            weights = self.grouped.hold(weights)
        self.experts[place] = weights
        self.hashes[place] = digest
        self.rows.setdefault(place, 0)

    def open_desk(self, answered: Answered) -> Desk | None:
        """Let small questions be answered without Python, where that can be; `answered` is told of them."""
        if self.graphed is not None:
            self.desk = self.graphed.open_desk(answered)
        return self.desk

    def drop(self, place: Place) -> None:
        """Hold an expert no longer; others may stand for the same weights."""
        if self.desk is not None:
            self.desk.forget(place)
        network = self.experts.pop(place, None)
        shared = any(other is network for other in self.experts.values())
        if network is not None and not shared:
            if self.graphed is not None:
                self.graphed.forget(network)
            if self.grouped is not None:
                self.grouped.forget(network)
        Bank.drop(self, place)  # slots: a class of its own, which `super()` would not find

    @property
    def max_batch_rows(self) -> int:
        # as many as a graph takes, unless experts share launches
        return MAX_BATCH_ROWS if self.grouped else GraphedExperts.BUCKETS[-1]

    def copies(self, call: Call) -> bool:
        return call.scales is not None and self._fits(call.num_rows)

    def ffn(
        self, layer: int, expert: int, rows: Tensor, scales: Tensor | None = None
    ) -> torch.Tensor:
        """SwiGLU network of one expert: rows [n, width] (e4m3 with scales) -> [n, width]."""
        self.rows[layer, expert] += len(rows)
        network = self.experts[layer, expert]
        if (
            self.graphed is not None
            and network.is_fp8
            and scales is not None
            and self._fits(len(rows))
        ):
            outputs = self.graphed(network, [Call(rows, scales, [])])
            if outputs is not None:
                return outputs[0]
        return network(rows, scales)

    def _fits(self, num_rows: int) -> bool:
        return num_rows <= GraphedExperts.BUCKETS[-1]

    def together(self, layer: int, calls: Sequence[Call]) -> list[Tensor] | None:
        """FP8 rows of one expert as a graph, of several experts as one launch, if they have slots for it."""
        groups: list[Group] = []
        num_rows, outputs, self.by_graph = 0, None, False
        for call in calls:
            if call.scales is None:
                return None
            for expert, count in call.segments:
                groups.append((self.experts[layer, expert], num_rows, num_rows + count))
                num_rows += count
        one, is_one = groups[0][0], all(group[0] is groups[0][0] for group in groups)
        if self.graphed is not None and is_one and one.is_fp8 and self._fits(num_rows):
            outputs = self.graphed(one, calls)
            self.by_graph = outputs is not None
            if self.desk is not None:
                place = layer, calls[0].segments[0][0]
                self.graphed.teach(self.desk, place, one, num_rows)
        elif self.grouped is not None:
            outputs = self.grouped(groups, calls)
        if outputs is not None:
            for call in calls:
                for expert, count in call.segments:
                    self.rows[layer, expert] += count
        return outputs

    def written(self) -> Callable[[], bool] | None:
        return self.graphed.written() if self.graphed is not None and self.by_graph else None


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
        held: dict[Place, DeviceExpert] = {}
        grouped: GroupedExperts | None = None
        several = len(places) > len({layer for layer, _ in places})
        for place in sorted(set(distinct.values())):
            expert = load_device_expert(checkpoint, model, place, wire, device)
            if several and expert.is_fp8:
                if grouped is None:
                    size = len(set(distinct.values()))
                    grouped = GroupedExperts(expert, size, torch.device(device))
                expert = grouped.hold(expert)
            held[place] = expert
        experts = {place: held[same] for place, same in distinct.items()}
        hashes = {place: hash_expert(checkpoint, *place) for place in places}
    counts = dict.fromkeys(places, 0)
    graphed = GraphedExperts(model.hidden_size, torch.device(device))
    bank = DeviceBank(
        model.hidden_size, manifest.model_hash, {}, hashes, counts, experts, graphed, grouped
    )
    _warm_up(bank, wire, torch.device(device))
    return bank


@torch.inference_mode()
def _warm_up(bank: DeviceBank, wire: Wire, device: torch.device) -> None:
    """Compile what experts launch, before anybody waits for one: for every kind of number of rows."""
    networks = list(bank.experts.values())[:1]  # all are alike
    for n in ops.KINDS_OF_EXPERT_ROWS:
        rows = torch.zeros(n, bank.width, device=device, dtype=torch.bfloat16)
        for network in networks:
            values, scales = ops.quantise(rows)
            network(values, scales) if wire is Wire.FP8 else network(rows, None)
            if bank.grouped is not None and wire is Wire.FP8:
                bank.grouped([(network, 0, n)], [Call(values, scales, [])])


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
