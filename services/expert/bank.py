"""The weights that an expert worker holds: its experts of each of its layers, with the content hash of each."""

from dataclasses import dataclass, field
from typing import Self

import torch

from common.config import ClusterConfig
from common.model.hf_config import load_config
from common.model.loader import FfnWeights, load_expert
from common.model.manifest import cluster_manifest, hash_expert
from common.model.slices import SlicedCheckpoint, sliced_config
from common.plan_file import cluster_plan
from kernels.reference.ffn import ffn
from kernels.reference.linear import resident

Place = tuple[int, int]  # (layer, expert)


@dataclass(slots=True)
class Bank:
    """Resident experts by (layer, expert). `rows` counts the rows that each has computed."""

    width: int
    model_hash: str
    weights: dict[Place, FfnWeights]
    hashes: dict[Place, str]
    rows: dict[Place, int] = field(default_factory=dict)

    @classmethod
    def load(cls, config: ClusterConfig, worker: int) -> Self:
        """Read what the plan gives this worker, and nothing else of the checkpoint. Raises ModelError."""
        slices = config.placement.expert_slices
        stored = load_config(config.model.path)
        model = sliced_config(stored, slices)
        manifest = cluster_manifest(config)
        places = cluster_plan(config, stored).residents(worker)
        with SlicedCheckpoint(config.model.path, slices) as checkpoint:
            weights = {
                place: _resident(load_expert(checkpoint, model, *place, keep_16_bit=True))
                for place in places
            }
            hashes = {place: hash_expert(checkpoint, *place) for place in places}
        return cls(
            model.hidden_size, manifest.model_hash, weights, hashes, dict.fromkeys(places, 0)
        )

    def __contains__(self, place: object) -> bool:
        return place in self.weights

    def ffn(
        self, layer: int, expert: int, rows: torch.Tensor, scales: torch.Tensor | None = None
    ) -> torch.Tensor:
        """SwiGLU network of one expert: fp32 [num_rows, width] -> fp32 [num_rows, width]."""
        assert scales is None, "rows are dequantised before they come here"
        self.rows[layer, expert] += len(rows)
        w = self.weights[layer, expert]
        return ffn(rows, w.gate_up, w.down)


def _resident(weights: FfnWeights) -> FfnWeights:
    dtype = torch.float32
    return FfnWeights(resident(weights.gate_up, dtype), resident(weights.down, dtype))
