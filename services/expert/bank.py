"""The weights that an expert worker holds: its experts of each of its layers, with the content hash of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch

from common.config import ClusterConfig
from common.model.hf_config import ModelConfig, load_config
from common.model.loader import FfnWeights, load_expert
from common.model.manifest import cluster_manifest, hash_expert
from common.model.slices import sliced_config
from common.model.source import Source, open_checkpoint
from common.placement.plan import Place
from common.plan_file import first_residents
from kernels.reference.ffn import Network, network
from kernels.reference.linear import resident


@dataclass(slots=True)
class Bank:
    """Resident experts by (layer, expert). `rows` counts the rows that each has computed."""

    width: int
    model_hash: str
    weights: dict[Place, FfnWeights]
    hashes: dict[Place, str]
    rows: dict[Place, int] = field(default_factory=dict)
    _networks: dict[Place, Network] = field(default_factory=dict, init=False)

    @classmethod
    def load(cls, config: ClusterConfig, worker: int) -> Self:
        """Read what the plan gives this worker, and nothing else of the checkpoint. Raises ModelError."""
        slices, stored = config.placement.expert_slices, load_config(config.model.path)
        model, manifest = sliced_config(stored, slices), cluster_manifest(config)
        places = first_residents(config, stored, worker)
        with open_checkpoint(config.model.path, slices) as checkpoint:
            weights = {place: read_expert(checkpoint, model, place) for place in places}
            hashes = {place: hash_expert(checkpoint, *place) for place in places}
        return cls(
            model.hidden_size, manifest.model_hash, weights, hashes, dict.fromkeys(places, 0)
        )

    def __contains__(self, place: object) -> bool:
        return place in self.weights

    def add(self, place: Place, weights: FfnWeights, digest: str) -> None:
        """Hold one expert more."""
        self.weights[place] = weights
        self.hashes[place] = digest
        self.rows.setdefault(place, 0)

    def drop(self, place: Place) -> None:
        """Hold an expert no longer."""
        for table in (self.weights, self.hashes, self.rows, self._networks):
            table.pop(place, None)

    def copies(self, rows: torch.Tensor, scales: torch.Tensor | None) -> bool:
        """Whether `ffn` reads these rows once, to copy them."""
        del rows, scales
        return False

    def ffn(
        self, layer: int, expert: int, rows: torch.Tensor, scales: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """SwiGLU network of one expert: fp32 [num_rows, width] -> fp32 [num_rows, width], maybe in `out`."""
        assert scales is None, "rows are dequantised before they come here"
        del out
        place = layer, expert
        self.rows[place] += rows.shape[0]
        run = self._networks.get(place)
        if run is None:
            w = self.weights[place]
            run = self._networks[place] = network(w.gate_up, w.down)
        return run(rows)

    def ffn_together(
        self,
        layer: int,
        segments: Sequence[tuple[int, int]],
        rows: torch.Tensor,
        scales: torch.Tensor,
    ) -> torch.Tensor | None:
        """Several experts at once: not on CPU, where nothing is gained."""
        del layer, segments, rows, scales
        return None


def read_expert(checkpoint: Source, model: ModelConfig, place: Place) -> FfnWeights:
    """One expert as it lies in memory. Raises ModelError."""
    weights = load_expert(checkpoint, model, *place, keep_16_bit=True)
    return _resident(weights)


def _resident(weights: FfnWeights) -> FfnWeights:
    dtype = torch.float32
    return FfnWeights(resident(weights.gate_up, dtype), resident(weights.down, dtype))
