"""What becomes of blocks in flight when a worker or a router is lost or comes back. Decisions only; pure.

`services.router.dataflow` carries them out: it takes the question back and asks others.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from services.router.block import NodeWork, SourceWork
from services.router.plan import NodeShare, WorkerShare, divide_share, split_share
from services.router.routes import Fleet, Int32s


def calls_to_move(
    work: NodeWork, fleet: Fleet
) -> Iterator[tuple[int, WorkerShare, list[WorkerShare]]]:
    """Questions to dead workers of this node that living ones can answer: (question, its share, the shares instead).

    What no living worker of the node holds stays with the dead one.
    """
    layer, alive = work.request.layer, fleet.alive
    for call, share in list(work.waiting.items()):
        if alive[share.worker]:
            continue
        experts, counts = share.segments.T
        workers = work.routes.workers(layer, experts.repeat(counts), fleet)[experts]
        if alive[workers].any():
            workers[~alive[workers]] = share.worker
            yield call, share, divide_share(share, workers)


def shares_to_move(
    source: SourceWork, fleet: Fleet
) -> Iterator[tuple[int, NodeShare, list[NodeShare], npt.NDArray[np.int32]]]:
    """Shares of nodes that lost an expert which somebody alive holds elsewhere.

    (question, its share, the shares instead, the choice of workers [num_experts] that led to them).
    """
    routes, layer, alive = source.routes, source.request.layer, fleet.alive
    for call, share in list(source.shares.items()):
        if call not in source.waiting:
            continue
        lost = ~routes.living(layer, share.node, alive)[share.experts]
        table: Int32s = routes.senders(layer, share.experts, fleet)
        workers = table[share.experts]
        if (lost & alive[workers]).any():
            yield call, share, split_share(share, routes.node_of_worker[workers]), table
