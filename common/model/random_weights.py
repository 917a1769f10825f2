"""A checkpoint without weights: config.json and random.json, whose tensors are made where they are read.

For measuring models at their real width on machines that hold neither the files nor all of the experts. random.json:

    {"seed": 0, "distinct_experts": 8, "given": {}}

Expert e of a layer has the weights of expert e % distinct_experts, held once. Biases of gates may be `given` by name;
else tensors follow from seed and name alone, on each kind of device with its own generator. Projections are e4m3 in
128x128 blocks, the rest bf16 (gates and their biases fp32), with the standard deviations of `common.model.writer`.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from common.errors import ModelError
from common.model import names
from common.model.hf_config import ModelConfig, load_config, read_json
from common.model.presets import RANDOM_FILE
from common.model.safetensors_file import Closing, TensorEntry
from common.model.tensor_shapes import tensor_shapes

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_BLOCK = 128
_SPREAD = 64.0  # standard deviation of e4m3 values: their largest is 448


@dataclass(frozen=True, slots=True)
class _Tensor:
    entry: TensorEntry
    std: float
    mean: float = 0.0


class RandomWeights(Closing):
    """The tensors of such a directory; what `common.model.checkpoint.Checkpoint` is for files."""

    def __init__(self, directory: Path) -> None:
        """Raises ModelError when random.json is not as above."""
        self.directory = directory
        settings = read_json(directory / RANDOM_FILE)
        try:
            self._seed = int(settings["seed"])
            self.distinct_experts = int(settings["distinct_experts"])
            self._given = {name: torch.tensor(v).float() for name, v in settings["given"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as exc:
            raise ModelError(f"{directory / RANDOM_FILE}: {exc!r}") from exc
        if self.distinct_experts < 1:
            raise ModelError(f"{directory / RANDOM_FILE}: distinct_experts must be at least 1")
        self._tensors = _tensors(load_config(directory))
        for name, values in self._given.items():
            if not name.endswith(names.GATE_BIAS) or self._tensor(name).entry.shape != values.shape:
                raise ModelError(f"{directory / RANDOM_FILE}: {name} is no such bias of a gate")

    def __repr__(self) -> str:
        return f"<RandomWeights {self.directory.name} [{len(self._tensors)} tensors]>"

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def names(self) -> list[str]:
        """Every tensor name, sorted."""
        return sorted(self._tensors)

    @property
    def files(self) -> list[Path]:
        """What the tensors follow from, besides config.json."""
        return [self.directory / RANDOM_FILE]

    def entry(self, name: str) -> TensorEntry:
        """What a tensor is. Raises ModelError naming it when the model has none of that name."""
        return self._tensor(name).entry

    def content(self, name: str) -> bytes:
        """What determines a tensor's values."""
        shared = _EXPERT.sub(lambda m: f".experts.{int(m[1]) % self.distinct_experts}.", name)
        return f"random {self._seed} {shared}".encode()

    def stands_for(self, layer: int, expert: int) -> tuple[int, int]:
        """The expert whose weights this one has."""
        return layer, expert % self.distinct_experts

    def read(self, name: str, device: str = "cpu") -> torch.Tensor:
        """Make a tensor on a device. Raises ModelError."""
        tensor = self._tensor(name)
        if name in self._given:
            return self._given[name].to(device)
        digest = hashlib.blake2b(self.content(name), digest_size=8).digest()
        generator = torch.Generator(device)
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        shape, dtype = tensor.entry.shape, tensor.entry.dtype
        if name.endswith(names.SCALE_SUFFIX):
            spread = torch.rand(shape, generator=generator, device=device) * 0.2 + 0.9
            return spread * (tensor.std / _SPREAD)
        values = torch.randn(shape, generator=generator, device=device)
        if dtype == "F8_E4M3":
            return (values * _SPREAD).clamp_(-448, 448).to(torch.float8_e4m3fn)
        values = values * tensor.std + tensor.mean
        return values if dtype == "F32" else values.to(torch.bfloat16)

    def _tensor(self, name: str) -> _Tensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelError(f"{self.directory}: tensor {name} is missing")
        return tensor


def _tensors(config: ModelConfig) -> dict[str, _Tensor]:
    found: dict[str, _Tensor] = {}
    for name, shape, std, mean in tensor_shapes(config):
        is_matrix = "_proj" in name and name.endswith(".weight")
        is_gate = name.endswith((names.GATE, names.GATE_BIAS))
        dtype = "F8_E4M3" if is_matrix else "F32" if is_gate else "BF16"
        nbytes = math.prod(shape) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
        found[name] = _Tensor(TensorEntry(dtype, shape, 0, nbytes), std, mean)
        if is_matrix:
            blocks = tuple(-(-n // _BLOCK) for n in shape)
            entry = TensorEntry("F32", blocks, 0, 4 * math.prod(blocks))
            found[name + names.SCALE_SUFFIX] = _Tensor(entry, std)
    return found
