"""The weights that an expert worker holds: its experts of each of its layers, with the content hash of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

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
from kernels.reference.stage import Picks, picked

if TYPE_CHECKING:
    from services.expert.desk import Desk

MAX_BATCH_ROWS = 4096


@dataclass(slots=True)
class Call:
    """An EXPERT_IN: rows [num_rows, width], e4m3 with scales fp32 or else without; segments are (expert, rows).

    Its outputs are wanted in `out`, if that is given. With `picks` it is about these of the `rows`, a whole block's.
    """

    rows: torch.Tensor
    scales: torch.Tensor | None
    segments: list[tuple[int, int]]
    out: torch.Tensor | None = None
    picks: Picks | None = None

    @property
    def num_rows(self) -> int:
        """Rows to compute."""
        return self.rows.shape[0] if self.picks is None else self.picks[2]

    def with_own_rows(self) -> "Call":
        """The same, copied to memory of its own."""
        if self.picks is None:
            rows = self.rows.view(torch.uint8).clone()
            scales = None if self.scales is None else self.scales.clone()
        else:
            index = picked(self.picks).to(self.rows.device, non_blocking=True)
            rows = self.rows.view(torch.uint8).index_select(0, index)
            scales = None if self.scales is None else self.scales.index_select(0, index)
        return replace(self, rows=rows.view(self.rows.dtype), scales=scales, picks=None)

    @property
    def quantised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and scales."""
        assert self.scales is not None, "rows without scales"
        return self.rows, self.scales


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

    @property
    def max_batch_rows(self) -> int:
        """Of calls that are computed together, unless it is one: more rows would not share what they cost."""
        return MAX_BATCH_ROWS

    def copies(self, call: Call) -> bool:
        """Whether its rows are read once, to copy them."""
        del call
        return False

    def ffn(
        self, layer: int, expert: int, rows: torch.Tensor, scales: torch.Tensor | None = None
    ) -> torch.Tensor:
        """SwiGLU network of one expert: fp32 [num_rows, width] -> fp32 [num_rows, width]."""
        assert scales is None, "rows are dequantised before they come here"
        place = layer, expert
        self.rows[place] += rows.shape[0]
        run = self._networks.get(place)
        if run is None:
            w = self.weights[place]
            run = self._networks[place] = network(w.gate_up, w.down)
        return run(rows)

    def together(self, layer: int, calls: Sequence[Call]) -> list[torch.Tensor] | None:
        """Calls at once, each output maybe where it is wanted; None: not in this way, as always on CPU."""
        del layer, calls
        return None

    def open_desk(self, answered: Callable[..., None]) -> "Desk | None":
        """What answers small questions without Python, and tells of them; None, as always on CPU: nothing."""
        del answered
        return None

    def written(self) -> Callable[[], bool] | None:
        """What asks whether the device has written the outputs of the last `together`; None: an event must tell."""
        return None


def own_rows(calls: Sequence[Call]) -> list[Call]:
    """Without picks."""
    return [call if call.picks is None else call.with_own_rows() for call in calls]


def joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pieces one behind the other; e4m3 as bytes, which is all that libraries can join."""
    dtype = pieces[0].dtype
    if len(pieces) == 1:
        return pieces[0]
    if dtype is torch.float8_e4m3fn:
        return torch.cat([piece.view(torch.uint8) for piece in pieces]).view(dtype)
    return torch.cat(list(pieces))


def read_expert(checkpoint: Source, model: ModelConfig, place: Place) -> FfnWeights:
    """One expert as it lies in memory. Raises ModelError."""
    weights = load_expert(checkpoint, model, *place, keep_16_bit=True)
    return _resident(weights)


def _resident(weights: FfnWeights) -> FfnWeights:
    dtype = torch.float32
    return FfnWeights(resident(weights.gate_up, dtype), resident(weights.down, dtype))
