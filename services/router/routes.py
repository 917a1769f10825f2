"""Which pairs of a block are this router's, and which node computes them. Pure index arithmetic (numpy).

A node has R routers, its *rails*. Each is the only one of its node that talks to a fixed subset of the other nodes, and
takes a fixed share of the node's own experts for the blocks of the node's attention workers; so every rail of a node,
given the same block, finds its own pairs without asking the others.

The rail between two nodes is (a + b) mod R: both ends name the same rail, so that its traffic stays on one leaf switch
of a rail-optimised fabric, and each rail of a node gets its share of the other nodes to within one.
"""

import numpy as np
import numpy.typing as npt

from common.placement.plan import Plan

Int32s = npt.NDArray[np.int32]
NOT_OURS = -1


def rail_between(node: int, peer: int, num_rails: int) -> int:
    """Which of the `num_rails` routers of `node` talks to `peer`."""
    return (node + peer) % num_rails


def rail_of_worker(worker: int, nodes: tuple[int, ...], num_rails: int) -> int:
    """Which rail of its own node sends a worker that node's own pairs: its workers in turn."""
    return nodes[:worker].count(nodes[worker]) % num_rails


class Routes:
    """Tables of one placement for rail `rail` of `node`, by layer."""

    def __init__(self, plan: Plan, node: int, *, rail: int = 0, num_rails: int = 1) -> None:
        ours = np.array(
            [
                rail
                == (
                    rail_of_worker(worker, plan.nodes, num_rails)
                    if home == node
                    else rail_between(node, home, num_rails)
                )
                for worker, home in enumerate(plan.nodes)
            ]
        )
        node_of_worker = np.asarray(plan.nodes, np.int32)
        self._workers = {
            layer: np.asarray(plan.primaries(layer), np.int32) for layer in plan.holders
        }
        self._homes = {layer: node_of_worker[workers] for layer, workers in self._workers.items()}
        self._nodes = {
            layer: np.where(ours[workers], node_of_worker[workers], np.int32(NOT_OURS))
            for layer, workers in self._workers.items()
        }

    def __contains__(self, layer: int) -> bool:
        return layer in self._workers

    def nodes(self, layer: int, experts: Int32s) -> Int32s:
        """The node that computes each pair, NOT_OURS where another rail of this node sends it; same shape."""
        nodes: Int32s = self._nodes[layer][experts]
        return nodes

    def homes(self, layer: int, experts: Int32s) -> Int32s:
        """The node that holds each expert, whichever rail leads there."""
        homes: Int32s = self._homes[layer][experts]
        return homes

    def workers(self, layer: int, experts: Int32s) -> Int32s:
        """The worker of this node that computes each pair."""
        workers: Int32s = self._workers[layer][experts]
        return workers
