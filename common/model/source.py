"""Where weights come from: a checkpoint's files, slices of its experts, or random.json."""

from pathlib import Path

from common.errors import ModelError
from common.model.checkpoint import Checkpoint
from common.model.presets import RANDOM_FILE
from common.model.random_weights import RandomWeights
from common.model.slices import SlicedCheckpoint

Source = Checkpoint | RandomWeights


def open_checkpoint(directory: Path, slices: int = 1) -> Source:
    """The tensors of a directory, its experts cut into `slices`. Raises ModelError."""
    if (directory / RANDOM_FILE).exists():
        if slices > 1:
            raise ModelError(f"{directory}: random weights are not cut into slices")
        return RandomWeights(directory)
    return Checkpoint(directory) if slices == 1 else SlicedCheckpoint(directory, slices)
