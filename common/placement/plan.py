"""A placement epoch: which expert worker holds which expert of each MoE layer. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Plan:
    """`workers[layer][expert]` is the index of the expert worker that holds it; `nodes[worker]` that worker's node.

    Layers are model layer indices; dense layers have no entry.
    """

    epoch: int
    workers: dict[int, tuple[int, ...]]
    nodes: tuple[int, ...]

    def residents(self, worker: int) -> list[tuple[int, int]]:
        """(layer, expert) pairs that a worker holds, ascending."""
        return [
            (layer, expert)
            for layer, holders in sorted(self.workers.items())
            for expert, holder in enumerate(holders)
            if holder == worker
        ]


def column_plan(
    *,
    epoch: int,
    moe_layers: Iterable[int],
    num_experts: int,
    experts_per_gpu: int,
    nodes: tuple[int, ...],
) -> Plan:
    """Expert e of every layer on worker e // experts_per_gpu: one column of experts per worker.

    `nodes[w]` is the node of worker w. Raises ConfigError when the workers cannot hold every expert.
    """
    needed = -(-num_experts // experts_per_gpu)
    if len(nodes) < needed:
        raise ConfigError(
            f"{num_experts} experts at {experts_per_gpu} per GPU need {needed} expert workers, "
            f"the cluster has {len(nodes)}"
        )
    holders = tuple(expert // experts_per_gpu for expert in range(num_experts))
    return Plan(epoch, dict.fromkeys(moe_layers, holders), nodes)
