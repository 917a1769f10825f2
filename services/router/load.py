"""Which experts the gate has been choosing: rows per expert with decay, and a sample of recent rows. Pure.

A router counts the blocks of its node's attention workers; of several rails the first counts. Rows lose half their
weight every `half_life_s`. The sample (the experts of the last rows of each layer) keeps what counts cannot: which
experts are wanted together.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from common.placement.rebalance import Sample

Int32s = npt.NDArray[np.int32]
Ids = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float64]
_MAX_EXPONENT = 512.0  # of the growing weight, before everything is scaled back


@dataclass(slots=True)
class ExpertLoad:
    """Counters of one router. Times are nanoseconds of a monotonic clock."""

    num_experts: int
    half_life_s: float = 60.0
    max_sample: int = 1024  # rows per layer
    _start_ns: int = -1  # when a row weighed 1
    _counts: dict[int, Floats] = field(default_factory=dict)  # by layer
    _samples: dict[int, Ids] = field(default_factory=dict)  # by layer, a ring
    _seen: dict[int, int] = field(default_factory=dict)  # by layer: rows ever put into the ring

    def add(self, layer: int, experts: Int32s, now_ns: int) -> None:
        """The gate chose `experts` [num_rows, top_k] in a layer."""
        if layer not in self._counts:
            self._counts[layer] = np.zeros(self.num_experts)
            self._samples[layer] = np.zeros((self.max_sample, experts.shape[1]), np.int16)
            self._seen[layer] = 0
        # later rows weigh more instead of earlier ones less: nothing but these counts is touched
        self._counts[layer] += np.bincount(
            experts.ravel(), minlength=self.num_experts
        ) * self._weight(now_ns)
        ring, rows = self._samples[layer], experts[-self.max_sample :]
        start = self._seen[layer] % self.max_sample
        head = min(len(rows), self.max_sample - start)
        ring[start : start + head] = rows[:head]
        ring[: len(rows) - head] = rows[head:]
        self._seen[layer] += len(rows)

    def rates(self, now_ns: int) -> dict[int, Floats]:
        """By layer: rows per second of each expert, [num_experts], averaged over the last half-lives."""
        scale = np.log(2) / self.half_life_s / self._weight(now_ns)
        return {layer: counts * scale for layer, counts in sorted(self._counts.items())}

    def sample(self, now_ns: int) -> Sample:
        """The experts of the last rows of each layer, in no order, and how many rows a second a layer has."""
        layers = {layer: self._samples[layer][:seen] for layer, seen in sorted(self._seen.items())}
        rows = [
            float(rates.sum()) / self._samples[layer].shape[1]
            for layer, rates in self.rates(now_ns).items()
        ]
        return Sample(layers, max(rows, default=0.0))

    def to_json(self, now_ns: int) -> dict[str, list[float]]:
        """`rates` for a `status` frame."""
        return {str(layer): np.round(r, 2).tolist() for layer, r in self.rates(now_ns).items()}

    def _weight(self, now_ns: int) -> float:
        """What a row weighs now."""
        if self._start_ns < 0:
            self._start_ns = now_ns
        exponent = (now_ns - self._start_ns) / 1e9 / self.half_life_s
        if exponent > _MAX_EXPONENT:
            for counts in self._counts.values():
                counts *= 2.0**-exponent
            self._start_ns, exponent = now_ns, 0.0
        return float(2.0**exponent)
