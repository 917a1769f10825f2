"""The two plans of every block, compiled (`plan.c`): the numbers of `services.router.plan` in a tenth of the time.

Where there is no compiler these names are that module's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.compiled import compiled
from common.errors import WireError
from services.router import plan
from services.router.plan import (
    FanOut,
    Floats,
    Int32s,
    NodeShare,
    WorkerShare,
    rows_of_pairs,
    split_pairs,
)

_compiled = compiled(Path(__file__).with_name("plan.c"))


def split_by_node(experts: Int32s, weights: Floats, nodes: Int32s) -> list[NodeShare]:
    """See `services.router.plan.split_by_node`."""
    if _compiled is None or not experts.size:
        return plan.split_by_node(experts, weights, nodes)
    num_rows, top_k = experts.shape
    ids, homes = np.empty((2, experts.size), np.int32)
    sorted_weights = np.empty(experts.size, np.float32)
    least, greatest = _compiled.sort_pairs(
        _flat(experts), _flat(weights), _flat(nodes), top_k, ids, sorted_weights, homes
    )
    rows, pair_rows, _ = rows_of_pairs(num_rows, top_k)
    if least == greatest >= 0:  # all for one node, and every row has pairs
        return [NodeShare(least, rows, pair_rows, ids, sorted_weights)]
    return split_pairs(rows, pair_rows, ids, sorted_weights, homes)


def fan_out(
    pair_rows: Int32s, experts: Int32s, weights: Floats, num_rows: int, workers: Int32s
) -> FanOut:
    """See `services.router.plan.fan_out`."""
    if _compiled is None:
        return plan.fan_out(pair_rows, experts, weights, num_rows, workers)
    try:
        rows, segments, slots, slot_weights, most, runs = _compiled.fan_out(
            _flat(pair_rows), _flat(experts), _flat(weights), _flat(workers), num_rows
        )
    except ValueError as exc:  # a worker is NOT_OURS: everything else has been checked
        raise WireError(plan.NOBODY) from exc
    table = np.frombuffer(segments, np.int32).reshape(-1, 2)
    return FanOut(
        np.frombuffer(rows, np.int32),
        [WorkerShare(worker, start, stop, table[a:b]) for worker, start, stop, a, b in runs],
        np.frombuffer(slots, np.int32).reshape(num_rows, most),
        np.frombuffer(slot_weights, np.float32).reshape(num_rows, most),
    )


def _flat(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """One behind the other, without a copy where they are."""
    flat: npt.NDArray[Any] = array.reshape(-1)
    return flat
