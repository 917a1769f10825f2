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
_FOLD_NS = 1_000_000_000  # rows of at most so long are counted together: a block costs a copy of its ids only


@dataclass(slots=True)
class _Layer:
    """`counts` [num_experts] without the rows from `folded` to `end`; `ring` holds the last rows."""

    counts: Floats
    ring: Ids
    end: int = 0  # rows ever
    folded: int = 0
    since_ns: int = 0  # of the first row not counted
    last_ns: int = 0


@dataclass(slots=True)
class ExpertLoad:
    """Counters of one router. Times are nanoseconds of a monotonic clock."""

    num_experts: int
    half_life_s: float = 60.0
    max_sample: int = 1024  # rows per layer
    _start_ns: int = -1  # when a row weighed 1
    _layers: dict[int, _Layer] = field(default_factory=dict)

    def add(self, layer: int, experts: Int32s, now_ns: int) -> None:
        """The gate chose `experts` [num_rows, top_k] in a layer."""
        one = self._layers.get(layer)
        if one is None or one.ring.shape[1] != experts.shape[1]:  # a sample is of rows alike
            counts = np.zeros(self.num_experts)
            if one is not None:
                self._fold(one)
                counts = one.counts
            ring = np.zeros((self.max_sample, experts.shape[1]), np.int16)
            one = self._layers[layer] = _Layer(counts, ring, since_ns=now_ns)
        num_rows, size = len(experts), self.max_sample
        if one.end - one.folded + num_rows > size or now_ns - one.since_ns >= _FOLD_NS:
            self._fold(one)
            one.since_ns = now_ns
        if num_rows > size:  # the ring keeps the last
            self._count(one, experts[:-size], now_ns)
            experts, num_rows = experts[-size:], size
        start = one.end % size
        head = min(num_rows, size - start)
        one.ring[start : start + head] = experts[:head]
        if head < num_rows:
            one.ring[: num_rows - head] = experts[head:]
        one.end += num_rows
        one.last_ns = now_ns

    def rates(self, now_ns: int) -> dict[int, Floats]:
        """By layer: rows per second of each expert, [num_experts], averaged over the last half-lives."""
        for one in self._layers.values():
            self._fold(one)
        scale = np.log(2) / self.half_life_s / self._weight(now_ns)
        return {layer: one.counts * scale for layer, one in sorted(self._layers.items())}

    def sample(self, now_ns: int) -> Sample:
        """The experts of the last rows of each layer, in no order, and how many rows a second a layer has."""
        layers = {layer: one.ring[: one.end] for layer, one in sorted(self._layers.items())}
        rows = [
            float(rates.sum()) / self._layers[layer].ring.shape[1]
            for layer, rates in self.rates(now_ns).items()
        ]
        return Sample(layers, max(rows, default=0.0))

    def _fold(self, one: _Layer) -> None:
        if one.end > one.folded:
            places = np.arange(one.folded, one.end) % self.max_sample
            self._count(one, one.ring[places], (one.since_ns + one.last_ns) // 2)
            one.folded = one.end
            one.since_ns = one.last_ns

    def _count(self, one: _Layer, experts: Ids | Int32s, when_ns: int) -> None:
        # later rows weigh more instead of earlier ones less: nothing but these counts is touched
        one.counts += np.bincount(experts.ravel(), minlength=self.num_experts) * self._weight(
            when_ns
        )

    def to_json(self, now_ns: int) -> dict[str, list[float]]:
        """`rates` for a `status` frame."""
        return {str(layer): np.round(r, 2).tolist() for layer, r in self.rates(now_ns).items()}

    def _weight(self, when_ns: int) -> float:
        """What a row of that time weighs."""
        if self._start_ns < 0:
            self._start_ns = when_ns
        exponent = (when_ns - self._start_ns) / 1e9 / self.half_life_s
        if exponent > _MAX_EXPONENT:
            for one in self._layers.values():
                one.counts *= 2.0**-exponent
            self._start_ns, exponent = when_ns, 0.0
        return float(2.0**exponent)
