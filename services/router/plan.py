"""How a block is divided: by node at its source, by expert worker at its node. Pure index arithmetic (numpy).

A *pair* is (row, expert, gate weight). Pairs are always sorted by row, then by ascending expert id: that order is the
order of the weighted sum, so the result does not depend on who answers first.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.errors import WireError

Ints = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class NodeShare:
    """What one node does for a block. `rows` are ascending indices into the block's rows; `pair_rows` index `rows`."""

    node: int
    rows: Ints  # [num_rows]
    pair_rows: Int32s  # [num_pairs], ascending
    experts: Int32s  # [num_pairs], ascending within a row
    weights: Floats  # [num_pairs]


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """What one expert worker does for a block: its pairs sorted by expert, then row."""

    worker: int
    pairs: Ints  # [n] positions in the node's pairs
    rows: Ints  # [n] index of each pair's row in the node's rows
    segments: Int32s  # [num_experts_hit, 2]: expert id, number of rows


def split_by_node(experts: Int32s, weights: Floats, node_of_expert: Int32s) -> list[NodeShare]:
    """Divide a block by destination node, ascending; nodes that get nothing are absent.

    `experts`, `weights` are [num_rows, top_k]; `node_of_expert` is [num_experts]. Raises WireError for an expert id
    that the model does not have.
    """
    if experts.size and (int(experts.min()) < 0 or int(experts.max()) >= len(node_of_expert)):
        raise WireError(f"expert id outside 0..{len(node_of_expert) - 1}")
    num_rows, top_k = experts.shape
    order = np.argsort(experts, axis=1, kind="stable")
    sorted_experts = np.take_along_axis(experts, order, axis=1).ravel()
    sorted_weights = np.take_along_axis(weights, order, axis=1).ravel()
    pair_rows = np.repeat(np.arange(num_rows), top_k)
    nodes = node_of_expert[sorted_experts]
    shares = []
    for node in np.unique(nodes).tolist():
        chosen = np.flatnonzero(nodes == node)
        rows, compact = np.unique(pair_rows[chosen], return_inverse=True)
        shares.append(
            NodeShare(
                node,
                rows,
                compact.astype(np.int32),
                sorted_experts[chosen],
                sorted_weights[chosen],
            )
        )
    return shares


def check_pairs(pair_rows: Int32s, experts: Int32s, *, num_rows: int, num_experts: int) -> None:
    """Raise WireError unless pairs received from another router are in range and in order."""
    if pair_rows.size == 0:
        raise WireError("a RELAY without pairs")
    if int(pair_rows.min()) < 0 or int(pair_rows.max()) >= num_rows:
        raise WireError(f"pair row outside 0..{num_rows - 1}")
    if int(experts.min()) < 0 or int(experts.max()) >= num_experts:
        raise WireError(f"expert id outside 0..{num_experts - 1}")
    key = pair_rows.astype(np.int64) * num_experts + experts
    if (np.diff(key) < 0).any():
        raise WireError("pairs are not sorted by row and expert")


def split_by_worker(
    pair_rows: Int32s, experts: Int32s, worker_of_expert: Int32s
) -> list[WorkerShare]:
    """Divide a node's pairs by expert worker. `worker_of_expert` is [num_experts]."""
    workers = worker_of_expert[experts].astype(np.int64)
    order = np.lexsort((experts, workers))  # stable: rows stay ascending within an expert
    bounds = np.flatnonzero(np.diff(workers[order])) + 1
    shares = []
    for pairs in np.split(order, bounds):
        hit = experts[pairs]
        starts = np.flatnonzero(np.diff(hit, prepend=-1))
        counts = np.diff(starts, append=len(hit))
        segments = np.stack([hit[starts], counts], axis=1).astype(np.int32)
        rows = pair_rows[pairs].astype(np.int64)
        shares.append(WorkerShare(int(workers[pairs[0]]), pairs, rows, segments))
    return shares


def row_steps(pair_rows: Int32s) -> list[tuple[Ints, Ints]]:
    """The order of a weighted sum: step k holds (rows, pairs) of the k-th pair of every row that has one.

    Pairs are sorted by row, so within a step every row occurs once: a step is one vectorised addition, and the steps in
    sequence add each row's terms in ascending expert id whatever the other rows do.
    """
    starts = np.flatnonzero(np.diff(pair_rows, prepend=-1))
    rank = np.arange(len(pair_rows)) - np.repeat(starts, np.diff(starts, append=len(pair_rows)))
    rows = pair_rows.astype(np.int64)
    return [
        (rows[pairs], pairs)
        for k in range(int(rank.max()) + 1)
        if len(pairs := np.flatnonzero(rank == k))
    ]
