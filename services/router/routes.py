"""Which pairs of a block are this router's, and which worker computes them. Pure index arithmetic (numpy).

A node has R routers, its *rails*. Each is the only one of its node that talks to a fixed subset of the other nodes, and
takes a fixed share of the node's own experts for the blocks of the node's attention workers; so every rail of a node,
given the same block, finds its own pairs without asking the others.

The rail between two nodes is (a + b) mod R: both ends name the same rail, so that its traffic stays on one leaf switch
of a rail-optimised fabric, and each rail of a node gets its share of the other nodes to within one.

An expert with replicas is asked for at one that is alive: on this node if there is one, else on another; among these at
the worker that owes this router the fewest rows (then: was asked for the fewest so far, or an idle cluster would use
the first replica only). One block sends all its rows for an expert to the same replica: fewer messages, and weights
that are read once. Where none is alive the block waits for the `home`: the replica that the plan alone names, which
also decides the rail, so that the rails of a node agree whatever each of them has seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from common.placement.plan import Layer, Plan

Int32s = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
NOT_OURS = -1


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a router knows of all workers, by worker.

    `alive`: can be asked now. `outstanding`: rows that it owes this router; of another node's workers only where
    replicas leave a choice. `asked`: rows that it was ever asked for, likewise.
    """

    alive: Bools
    outstanding: list[int]
    asked: list[int]

    @classmethod
    def of(cls, num_workers: int) -> Self:
        """Nobody is there yet."""
        return cls(np.zeros(num_workers, np.bool_), [0] * num_workers, [0] * num_workers)

    def ask(self, worker: int, num_rows: int) -> None:
        """A worker was asked for so many rows."""
        self.outstanding[worker] += num_rows
        self.asked[worker] += num_rows


_Choice = tuple[int, tuple[int, ...], tuple[int, ...]]  # expert, its workers of this node, others


def rail_between(node: int, peer: int, num_rails: int) -> int:
    """Which of the `num_rails` routers of `node` talks to `peer`."""
    return (node + peer) % num_rails


def rail_of_worker(worker: int, nodes: tuple[int, ...], num_rails: int) -> int:
    """Which rail of its own node sends a worker that node's own pairs: its workers in turn."""
    return nodes[:worker].count(nodes[worker]) % num_rails


def least_loaded(workers: Sequence[int], fleet: Fleet) -> int | None:
    """The worker alive that owes the fewest rows, among equals was asked for the fewest; None when none is alive."""
    live = [worker for worker in workers if fleet.alive[worker]]
    return min(live, key=lambda w: (fleet.outstanding[w], fleet.asked[w]), default=None)


def home_of(workers: tuple[int, ...], node: int, nodes: tuple[int, ...]) -> int:
    """The replica that `node` uses by the plan alone: its own first, else one of the others, nodes taking turns."""
    if len(workers) == 1:
        return workers[0]
    own = [worker for worker in workers if nodes[worker] == node]
    return own[0] if own else workers[node % len(workers)]


class Routes:
    """Tables of one placement for rail `rail` of `node`, by layer. `epoch` is the plan's."""

    def __init__(self, plan: Plan, node: int, *, rail: int = 0, num_rails: int = 1) -> None:
        self.epoch = plan.epoch
        self._node, self._nodes, self._holders = node, plan.nodes, plan.holders
        self._reached = [
            home == node or rail == rail_between(node, home, num_rails) for home in plan.nodes
        ]
        ours = np.array(
            [
                rail == rail_of_worker(worker, plan.nodes, num_rails) if home == node else reached
                for worker, (home, reached) in enumerate(
                    zip(plan.nodes, self._reached, strict=True)
                )
            ]
        )
        # the last entry is that of worker NOT_OURS
        self.node_of_worker = np.array([*plan.nodes, NOT_OURS], np.int32)
        self._sent: dict[int, Int32s] = {}  # by layer: the home of our experts, else NOT_OURS
        self._computed: dict[int, Int32s] = {}  # the first worker of this node, else NOT_OURS
        self._choices: dict[int, list[_Choice]] = {}  # experts with replicas
        self._whole: set[int] = set()  # layers
        for layer, holders in plan.holders.items():
            homes = np.array([home_of(workers, node, plan.nodes) for workers in holders], np.int32)
            self._sent[layer] = np.where(ours[homes], homes, np.int32(NOT_OURS))
            own = self.node_of_worker[homes] == node
            self._computed[layer] = np.where(own, homes, np.int32(NOT_OURS))
            self._choices[layer] = self._replicated(holders)
            if all(plan.nodes[worker] == node for workers in holders for worker in workers):
                self._whole.add(layer)

    def __contains__(self, layer: int) -> bool:
        return layer in self._sent

    def _replicated(self, holders: Layer) -> list[_Choice]:
        found = []
        for expert, workers in enumerate(holders):
            if len(workers) > 1:
                own = tuple(w for w in workers if self._nodes[w] == self._node)
                others = tuple(w for w in workers if w not in own and self._reached[w])
                found.append((expert, own, others))
        return found

    def is_whole(self, layer: int) -> bool:
        """Whether this node has all workers of a layer."""
        return layer in self._whole

    def has_replicas(self, layer: int) -> bool:
        """Whether this router may have to choose, now or when a worker dies."""
        return bool(self._choices[layer])

    def senders(self, layer: int, experts: Int32s, fleet: Fleet) -> Int32s:
        """Source side: the worker of each expert, [num_experts]; NOT_OURS where another rail sends the pairs.

        `experts` are those of the block, any shape.
        """
        return self._chosen(self._sent[layer], layer, experts, fleet, own_only=False)

    def workers(self, layer: int, experts: Int32s, fleet: Fleet) -> Int32s:
        """Node side: this node's worker of each expert, [num_experts]; NOT_OURS where the node has none."""
        return self._chosen(self._computed[layer], layer, experts, fleet, own_only=True)

    def living(self, layer: int, node: int, alive: Bools) -> Bools:
        """Which experts a living worker of `node` holds, [num_experts]."""
        return np.array(
            [
                any(alive[w] and self._nodes[w] == node for w in workers)
                for workers in self._holders[layer]
            ]
        )

    def _chosen(
        self, table: Int32s, layer: int, experts: Int32s, fleet: Fleet, *, own_only: bool,
    ) -> Int32s:  # fmt: skip
        if not self._choices[layer]:
            return table
        table = table.copy()
        fleet = Fleet(fleet.alive, fleet.outstanding.copy(), fleet.asked)
        rows = np.bincount(experts.ravel(), minlength=len(table))
        for expert, own, others in self._choices[layer]:
            if rows[expert] == 0 or table[expert] == NOT_OURS:
                continue
            worker = least_loaded(own, fleet)
            if worker is None and not own_only:
                worker = least_loaded(others, fleet)
            if worker is not None:
                table[expert] = worker
                fleet.outstanding[worker] += int(rows[expert])
        return table
