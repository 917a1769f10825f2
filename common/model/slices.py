"""Experts cut along their hidden dimension: slice s of expert e is expert e * slices + s of a wider, thinner model.

A row goes to all slices of its experts with the same gate weight, and the weighted sum, being a sum, adds them; so
plans, hashes, workers and most of a router know nothing of slices. A slice has its rows of gate_proj and up_proj and
its columns of down_proj, with the scales of its FP8 blocks.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch

from common.errors import ModelError
from common.model.checkpoint import Checkpoint
from common.model.hf_config import ModelConfig
from common.model.names import SCALE_SUFFIX
from common.model.safetensors_file import TensorEntry

_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)(\.(?:gate|up|down)_proj\.weight.*)")


def sliced_config(config: ModelConfig, slices: int) -> ModelConfig:
    """The model that the expert side serves. Raises ModelError when its experts cannot be cut into `slices`."""
    inner, odd = divmod(config.moe_intermediate_size, slices)
    if odd:
        raise ModelError(
            f"experts of hidden width {config.moe_intermediate_size} do not divide into {slices} slices"
        )
    if slices > 1 and config.fp8_block is not None and any(inner % b for b in config.fp8_block):
        rows, columns = config.fp8_block
        raise ModelError(
            f"{slices} slices of {inner} cut through the FP8 blocks of {rows}x{columns} of the experts"
        )
    return replace(
        config, num_experts=config.num_experts * slices, top_k=config.top_k * slices,
        moe_intermediate_size=inner,
    )  # fmt: skip


class SlicedCheckpoint(Checkpoint):
    """A checkpoint whose experts are slices of the stored ones; every other tensor is as stored."""

    def __init__(self, directory: Path, slices: int) -> None:
        super().__init__(directory)
        self._slices = slices

    @property
    def names(self) -> list[str]:
        """Every tensor name, sorted; those of an expert once for each slice."""
        found = []
        for name in super().names:
            cut = _EXPERT.fullmatch(name)
            first = int(cut[2]) * self._slices if cut else 0
            found += (
                [f"{cut[1]}{first + s}{cut[3]}" for s in range(self._slices)] if cut else [name]
            )
        return sorted(found)

    def __contains__(self, name: str) -> bool:
        return super().__contains__(self._cut(name)[0])

    def entry(self, name: str) -> TensorEntry:
        """As stored, the shape the slice's. Raises ModelError naming what is missing or cannot be cut."""
        stored, dimension, part = self._cut(name)
        entry = super().entry(stored)
        if part is None:
            return entry
        shape = list(entry.shape)
        if dimension >= len(shape) or shape[dimension] % self._slices:
            raise ModelError(
                f"{self.directory}: tensor {stored} of shape {shape} does not divide into {self._slices} slices"
            )
        shape[dimension] //= self._slices
        return replace(entry, shape=tuple(shape))

    def read(self, name: str, device: str = "cpu") -> torch.Tensor:
        """A tensor or the slice of one, contiguous, on a device."""
        stored, dimension, part = self._cut(name)
        tensor = super().read(stored)
        if part is not None:
            length = self.entry(name).shape[dimension]
            tensor = tensor.narrow(dimension, part * length, length).contiguous()
        return tensor.to(device)

    def content(self, name: str) -> bytearray:
        """The bytes of what `read` returns."""
        if self._cut(name)[2] is None:
            return super().content(name)
        return bytearray(self.read(name).view(torch.uint8).numpy().tobytes())

    def _cut(self, name: str) -> tuple[str, int, int | None]:
        """(name of the stored tensor, dimension that is cut, which slice; None: it is not cut)."""
        found = _EXPERT.fullmatch(name)
        if found is None or self._slices == 1:
            return name, 0, None
        expert, part = divmod(int(found[2]), self._slices)
        dimension = int(found[3].removesuffix(SCALE_SUFFIX) == ".down_proj.weight")
        return f"{found[1]}{expert}{found[3]}", dimension, part
