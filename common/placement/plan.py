"""A placement epoch: which expert workers hold which expert of each MoE layer. Pure.

As JSON (one file, written by `atoll plan`, read by every service):

    {"format": "atoll-plan-1", "epoch": 1, "nodes": [0, 0, 1], "layers": {"1": [[0], [1, 2]]}}

`layers[layer][expert]` lists the workers that hold a replica, the primary first; `nodes[worker]` is a worker's node.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import ConfigError

FORMAT = "atoll-plan-1"
Layer = tuple[tuple[int, ...], ...]  # by expert: its workers, the primary first
Place = tuple[int, int]  # (layer, expert)


@dataclass(frozen=True, slots=True)
class Plan:
    """`holders[layer][expert]` are the expert workers that hold it, the primary first; `nodes[worker]` is its node.

    Layers are model layer indices; dense layers have no entry. Workers that hold nothing are spares.
    """

    epoch: int
    holders: dict[int, Layer]
    nodes: tuple[int, ...]

    def __repr__(self) -> str:
        copies = sum(len(workers) for layer in self.holders.values() for workers in layer)
        experts = sum(map(len, self.holders.values()))
        return (
            f"<Plan epoch {self.epoch} [{len(self.holders)} layers | {experts} experts | {copies - experts} replicas"
            f" | {len(self.nodes)} workers on {len(set(self.nodes))} nodes, {len(self.spares)} spare]>"
        )

    def has_replicas(self, layer: int) -> bool:
        """Whether any expert of a layer has more than one worker."""
        return any(len(workers) > 1 for workers in self.holders[layer])

    def residents(self, worker: int) -> list[Place]:
        """(layer, expert) pairs that a worker holds, ascending."""
        return [
            (layer, expert)
            for layer, holders in sorted(self.holders.items())
            for expert, workers in enumerate(holders)
            if worker in workers
        ]

    def covered(self, worker: int, alive: Sequence[bool]) -> bool:
        """Whether somebody alive holds each expert that `worker` holds; `alive` is by worker."""
        return all(
            any(alive[w] for w in self.holders[layer][expert])
            for layer, expert in self.residents(worker)
        )

    @property
    def spares(self) -> tuple[int, ...]:
        """Workers that hold nothing."""
        used = {w for layer in self.holders.values() for workers in layer for w in workers}
        return tuple(w for w in range(len(self.nodes)) if w not in used)

    @property
    def digest(self) -> str:
        """Equal for equal placements, whatever their epochs: routers compare it when they meet."""
        canonical = json.dumps([self.nodes, sorted(self.holders.items())])
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The document that `from_json` reads back as an equal plan."""
        layers = {str(layer): holders for layer, holders in sorted(self.holders.items())}
        return {"format": FORMAT, "epoch": self.epoch, "nodes": self.nodes, "layers": layers}

    @classmethod
    def from_json(cls, document: object) -> "Plan":
        """Raises ConfigError when the document is no plan: wrong format, types, workers or a repeated worker."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ConfigError(f"not a plan of format {FORMAT!r}")
        epoch, nodes, layers = (document.get(key) for key in ("epoch", "nodes", "layers"))
        if not _is_index(epoch):
            raise ConfigError(f"epoch must be a whole number of at least 0, not {epoch!r}")
        if not isinstance(nodes, list) or not all(map(_is_index, nodes)):
            raise ConfigError("nodes must list one node id per worker")
        if not isinstance(layers, dict):
            raise ConfigError("layers must be a table of lists")
        holders = {}
        for key, experts in layers.items():
            if not key.isascii() or not key.isdigit() or not isinstance(experts, list):
                raise ConfigError(f"layers.{key} must be a layer index with a list of experts")
            holders[int(key)] = tuple(
                (workers[0],)
                if _is_one(workers, len(nodes))  # nearly all are: 15,000 in a large plan
                else _workers(workers, len(nodes), f"expert {expert} of layer {key}")
                for expert, workers in enumerate(experts)
            )
        return cls(int(epoch or 0), holders, tuple(nodes))


def check_plan(
    plan: Plan, *, moe_layers: Iterable[int], num_experts: int, nodes: tuple[int, ...],
    experts_per_gpu: int,
) -> None:  # fmt: skip
    """Raise ConfigError unless the plan is for this model and cluster.

    `nodes[worker]` is the cluster's; at most `experts_per_gpu` experts of a layer may lie on one worker.
    """
    if plan.nodes != nodes:
        raise ConfigError(
            f"the plan is for {len(plan.nodes)} expert workers on {len(set(plan.nodes))} nodes, the cluster has "
            f"{len(nodes)} on {len(set(nodes))}"
            + (", spread otherwise" if len(plan.nodes) == len(nodes) else "")
        )
    if (planned := sorted(plan.holders)) != (needed := sorted(moe_layers)):
        raise ConfigError(f"the plan has layers {_span(planned)}, the model {_span(needed)}")
    for layer, holders in plan.holders.items():
        if len(holders) != num_experts:
            raise ConfigError(
                f"the plan has {len(holders)} experts in layer {layer}, the model {num_experts}"
            )
        counts: dict[int, int] = {}
        for workers in holders:
            for worker in workers:
                counts[worker] = counts.get(worker, 0) + 1
        worst = max(counts, key=counts.__getitem__)
        if counts[worst] > experts_per_gpu:
            raise ConfigError(
                f"the plan has {counts[worst]} experts of layer {layer} on expert-{worst}, "
                f"experts_per_gpu allows {experts_per_gpu}"
            )


def column_plan(
    *, epoch: int, moe_layers: Iterable[int], num_experts: int, experts_per_gpu: int,
    nodes: tuple[int, ...],
) -> Plan:  # fmt: skip
    """Expert e of every layer on worker e // experts_per_gpu: one column of experts per worker.

    `nodes[w]` is the node of worker w. Raises ConfigError when the workers cannot hold every expert.
    """
    needed = -(-num_experts // experts_per_gpu)
    if len(nodes) < needed:
        raise ConfigError(
            f"{num_experts} experts at {experts_per_gpu} per GPU need {needed} expert workers, "
            f"the cluster has {len(nodes)}"
        )
    holders = tuple((expert // experts_per_gpu,) for expert in range(num_experts))
    return Plan(epoch, dict.fromkeys(moe_layers, holders), nodes)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_one(value: object, num_workers: int) -> bool:
    return (
        type(value) is list
        and len(value) == 1
        and type(value[0]) is int
        and 0 <= value[0] < num_workers
    )


def _workers(value: object, num_workers: int, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(map(_is_index, value)):
        raise ConfigError(f"{where} must list the workers that hold it")
    if max(value) >= num_workers:
        raise ConfigError(f"{where} is on expert-{max(value)}, the plan has {num_workers} workers")
    if len(set(value)) < len(value):
        raise ConfigError(f"{where} lists a worker twice")
    return tuple(value)


def _span(layers: list[int]) -> str:
    return f"{layers[0]} to {layers[-1]} ({len(layers)})" if layers else "none"
