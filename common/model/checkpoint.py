"""A checkpoint directory: which file holds which tensor. Reads nothing but what is asked for."""

from pathlib import Path

import torch

from common.errors import ModelError
from common.model.hf_config import read_json
from common.model.safetensors_file import Closing, SafetensorsFile, TensorEntry

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Checkpoint(Closing):
    """The tensors of a directory by name. Files are opened when first needed."""

    def __init__(self, directory: Path) -> None:
        """Raises ModelError when there is neither an index nor a single file, or the index is wrong."""
        self.directory = directory
        self._open: dict[str, SafetensorsFile] = {}
        if (directory / INDEX).exists():
            self._file_of = self._read_index()
        elif (directory / SINGLE).exists():
            self._file_of = dict.fromkeys(self._file(SINGLE).entries, SINGLE)
        else:
            raise ModelError(f"{directory}: there is neither {INDEX} nor {SINGLE}")

    def __repr__(self) -> str:
        return f"<Checkpoint {self.directory.name} [{len(self._file_of)} tensors in {len(self.files)} files]>"

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        """Every tensor name, sorted."""
        return sorted(self._file_of)

    @property
    def files(self) -> list[Path]:
        """Every file that holds tensors, sorted."""
        return [self.directory / name for name in sorted(set(self._file_of.values()))]

    @property
    def nbytes_read(self) -> int:
        """Tensor bytes read so far."""
        return sum(file.nbytes_read for file in self._open.values())

    def entry(self, name: str) -> TensorEntry:
        """Where and what a tensor is. Raises ModelError naming it when it is missing."""
        return self._holder(name).entries[name]

    def content(self, name: str) -> bytearray:
        """What a tensor's hash covers besides dtype and shape: its bytes. Raises ModelError naming file and tensor."""
        return self._holder(name).read_bytes(name)

    def stands_for(self, layer: int, expert: int) -> tuple[int, int]:
        """The expert whose weights these are: itself (see `common.model.random_weights`)."""
        return layer, expert

    def read(self, name: str, device: str = "cpu") -> torch.Tensor:
        """A tensor as stored, on a device. Raises ModelError naming file and tensor."""
        return self._holder(name).read(name).to(device)

    def close(self) -> None:
        """Close every open file; idempotent."""
        for file in self._open.values():
            file.close()

    def _holder(self, name: str) -> SafetensorsFile:
        file_name = self._file_of.get(name)
        if file_name is None:
            raise ModelError(f"{self.directory}: tensor {name} is missing")
        file = self._file(file_name)
        if name not in file.entries:
            raise ModelError(f"{file.path}: tensor {name} is missing, {INDEX} says it is there")
        return file

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._open:
            self._open[name] = SafetensorsFile(self.directory / name)
        return self._open[name]

    def _read_index(self) -> dict[str, str]:
        path = self.directory / INDEX
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{path}: weight_map is missing")
        for name, file in weight_map.items():
            if not isinstance(file, str) or "/" in file or file in ("", ".", ".."):
                raise ModelError(f"{path}: tensor {name} is said to be in {file!r}, no file name")
        return weight_map
