"""Against overloaded experts, where outputs may change for it (`attention.gate_bias_max`): a bias for the gate. Pure.

Each worker counts, per MoE layer, the experts that its own gates chose, and lowers the scores by which overloaded ones
are chosen. As in DeepSeek's balancing without a loss (arXiv 2408.15664) the sign of the overload decides, and weights
are those of the unchanged scores. Unlike there the bias is bounded, never raises a score, and goes back to zero once an
expert is not overloaded any more: the model was not trained with it. Everything goes by rows, not by time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_OVERLOAD = 1.25  # of the mean: above what chance makes of the rows counted
_LOWER, _RAISE = 1 / 16, 1 / 64  # of the largest bias, each time
_ROWS = 16  # per expert in the mean, from one time to the next
_KEEP = 0.75  # of the load counted before


def next_bias(bias: Floats, load: Floats, most: float) -> Floats:
    """The bias [experts] after `load` [experts], each in [-most, 0]: lower where load is above 1.25 of the mean.

    Elsewhere it comes back towards zero, a quarter as fast.
    """
    overloaded = load > _OVERLOAD * load.mean()
    moved = bias + most * np.where(overloaded, -_LOWER, _RAISE)
    return np.asarray(np.clip(moved, -most, 0.0))


@dataclass(slots=True)
class _Layer:
    """`load` and `recent` (not yet part of it): rows of each expert."""

    bias: Floats
    load: Floats
    recent: Floats


@dataclass(slots=True)
class GateBalance:
    """The biases of one worker's gates. `apply(layer, bias)` puts one in force; no bias goes below -`most`."""

    num_experts: int
    most: float
    apply: Callable[[int, Floats], None]
    num_changes: int = 0
    _layers: dict[int, _Layer] = field(default_factory=dict)

    def count(self, layer: int, experts: npt.NDArray[np.int32]) -> None:
        """A gate chose `experts` [num_rows, top_k]; from time to time its bias changes."""
        one = self._layers.get(layer)
        if one is None:
            one = self._layers[layer] = _Layer(*np.zeros((3, self.num_experts)))
        one.recent += np.bincount(experts.ravel(), minlength=self.num_experts)
        if one.recent.sum() < _ROWS * self.num_experts:
            return
        one.load = _KEEP * one.load + one.recent
        one.recent = np.zeros(self.num_experts)
        bias = next_bias(one.bias, one.load, self.most)
        if (bias != one.bias).any():
            one.bias = bias
            self.num_changes += 1
            self.apply(layer, bias)

    def counters(self) -> dict[str, float]:
        """For a status: experts of all layers that are lowered now, the largest bias, changes so far."""
        biases = [one.bias for one in self._layers.values()]
        return {
            "gate_lowered": sum(int(np.count_nonzero(bias)) for bias in biases),
            "gate_largest_bias": max((float(abs(bias.min())) for bias in biases), default=0.0),
            "gate_bias_changes": self.num_changes,
        }
