"""When a running cluster should go over to another plan, and of which kind that plan is. Pure."""

import base64
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import Retryable, WireError
from common.placement.optimise import Options
from common.placement.plan import Plan
from common.placement.routing_trace import Ids, RoutingTrace
from common.placement.score import Score

_WORSE = 1.02  # what a figure may lose while another gains: noise of the sample


@dataclass(frozen=True, slots=True)
class Sample:
    """Experts of recent rows at one router: by layer int16 [rows, top_k]; `rate` is rows per second of a layer."""

    layers: dict[int, Ids]
    rate: float

    def to_json(self) -> dict[str, Any]:
        """For a control frame: 58 layers of 1,024 rows and 8 experts are 1.3 MB."""
        packed = {
            str(layer): [ids.shape[1], base64.b64encode(ids.astype("<i2").tobytes()).decode()]
            for layer, ids in self.layers.items()
        }
        return {"rate": self.rate, "layers": packed}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Sample":
        """Raises WireError for what no router sends."""
        try:
            layers = {
                int(layer): np.frombuffer(base64.b64decode(data), "<i2").reshape(-1, top_k)
                for layer, (top_k, data) in document["layers"].items()
            }
            return cls(layers, float(document["rate"]))
        except (LookupError, TypeError, ValueError, AttributeError) as exc:
            raise WireError(f"malformed routing sample: {exc}") from exc


def join_samples(
    samples: Sequence[Sample], layers: Sequence[int], *, num_experts: int, num_groups: int,
    top_k_groups: int, least: int = 64,
) -> RoutingTrace:  # fmt: skip
    """One trace of all routers' samples, each with as large a part as its traffic.

    Layers are independent of one another in it. Raises Retryable when a layer has fewer than `least` rows.
    """
    fastest = max((sample.rate for sample in samples), default=0.0)
    rows: dict[int, npt.NDArray[np.int16]] = {}
    for layer in layers:
        parts = []
        for sample in samples:
            ids = sample.layers.get(layer)
            if ids is not None and len(ids) and fastest > 0:
                most = max(len(s.layers[layer]) for s in samples if layer in s.layers)
                parts.append(ids[: max(1, round(most * sample.rate / fastest))])
        count = sum(map(len, parts))
        if count < least:
            raise Retryable(
                f"layer {layer} has had {count} rows so far, a plan needs at least {least}"
            )
        rows[layer] = np.concatenate(parts).astype(np.int16)
    shortest = min(map(len, rows.values()))
    # evenly chosen, so that every router's part stays as large as its traffic
    chosen = [
        r[np.linspace(0, len(r) - 1, shortest).round().astype(np.int64)] for r in rows.values()
    ]
    return RoutingTrace(np.stack(chosen), tuple(layers), num_experts, num_groups, top_k_groups)


def options_like(
    plan: Plan, options: Options, *, experts_per_gpu: int, replicas: int | None = None
) -> dict[str, Any]:
    """What makes a new plan of the same kind: column, strict or packed, with as many replicas and spare workers.

    Returned as the fields of `Options` that `options` should have instead.
    """
    copies = [sum(map(len, layer)) - len(layer) for layer in plan.holders.values()]  # of each layer
    most = max(len(plan.residents(worker)) for worker in range(len(plan.nodes)))
    strict = len(plan.holders) > 1 and most <= experts_per_gpu
    fields = asdict(options) | {"row": options.row, "budget": options.budget}
    return fields | {
        "experts_per_gpu": experts_per_gpu,
        "strict": strict,
        "replicas": max(copies) if replicas is None else replicas,
        "spares": len(plan.spares) if replicas is None else 0,
    }


def gain(before: Score, after: Score) -> float:
    """How much better: the largest relative improvement of busiest link, busiest GPU of a layer, and of all layers.

    0 when any of the three gets worse.
    """
    figures = ("link_s", "gpu_load", "total_gpu_load")
    pairs = [(getattr(before, name), getattr(after, name)) for name in figures]
    ratios: list[float] = [new / old for old, new in pairs if old > 0]
    if not ratios or max(ratios) > _WORSE:
        return 0.0
    return max(0.0, 1.0 - min(ratios))


@dataclass(slots=True)
class Hysteresis:
    """Says yes when a better plan was there `patience` times in a row, each by at least `min_gain`.

    Traffic that swings from one favourite to another and back within that time moves nothing.
    """

    min_gain: float
    patience: int
    _row: int = field(default=0)

    def observe(self, before: Score, after: Score) -> bool:
        """One look at the plan in force and at the best found; after a yes, counting begins anew."""
        self._row = self._row + 1 if gain(before, after) >= self.min_gain else 0
        if self._row < self.patience:
            return False
        self._row = 0
        return True
