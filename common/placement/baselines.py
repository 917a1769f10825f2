"""The placement that others use, to compare with and to start from. Pure.

`eplb` follows the published description of DeepSeek's Expert Parallelism Load Balancer (deepseek-ai/EPLB, README):

    hierarchical, when the nodes divide the expert groups: pack groups onto nodes so that the nodes' loads are even,
    then within each node replicate the heaviest experts, then pack replicas onto its GPUs so that their loads are even;
    global otherwise: replicate the heaviest experts whatever their group, pack replicas onto all GPUs.

"Replicate" gives each further replica to the expert with the most load per replica; "pack" gives items, heaviest
first, to the least loaded pack with room. Where a pack holds one item, every order is as even, and ours keeps it.
"""

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError
from common.placement.packing import Slots
from common.placement.plan import Layer

Floats = npt.NDArray[np.float64]


def balanced_packing(weights: Floats, num_packs: int) -> list[list[int]]:
    """Items by pack, equally many in each. `weights` must divide into the packs."""
    size = len(weights) // num_packs
    if size * num_packs != len(weights):
        raise ConfigError(f"{len(weights)} items do not fill {num_packs} packs evenly")
    if size == 1:
        return [[i] for i in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    sums = np.zeros(num_packs)
    for item in np.argsort(-weights, kind="stable").tolist():
        open_packs = [p for p in range(num_packs) if len(packs[p]) < size]
        pack = min(open_packs, key=sums.__getitem__)
        packs[pack].append(item)
        sums[pack] += weights[item]
    return packs


def replica_counts(
    load: Floats, num_replicas: int, *, most: int | None = None
) -> npt.NDArray[np.int64]:
    """How many replicas each expert gets, `num_replicas` in all: the next to whichever bears most load per replica.

    No other counts have a smaller largest load per replica. None gets more than `most`, which must leave room.
    """
    counts = np.ones(len(load), np.int64)
    for _ in range(num_replicas - len(load)):
        share = load / counts
        counts[np.argmax(share if most is None else np.where(counts < most, share, -1.0))] += 1
    return counts


def eplb(
    load: Floats, *, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Layer:
    """One layer: `load` [experts], GPUs numbered over equal nodes. Raises ConfigError where sizes do not divide."""
    if num_gpus % num_nodes or num_replicas % num_gpus:
        raise ConfigError(
            f"{num_replicas} replicas do not divide over {num_gpus} GPUs of {num_nodes} nodes"
        )
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    group_size = len(load) // num_groups
    groups = balanced_packing(load.reshape(num_groups, -1).sum(axis=1), num_nodes)
    per_node, gpus = num_replicas // num_nodes, num_gpus // num_nodes
    workers: list[list[int]] = [[] for _ in load]
    for node, members in enumerate(groups):
        experts = np.concatenate([np.arange(group_size) + g * group_size for g in members])
        counts = replica_counts(load[experts], per_node)
        extra = np.repeat(experts, counts - 1)
        replicas = np.concatenate([experts, extra])
        per_replica = dict(zip(experts.tolist(), (load[experts] / counts).tolist(), strict=True))
        weights = np.asarray([per_replica[e] for e in replicas.tolist()])
        for gpu, items in enumerate(balanced_packing(weights, gpus)):
            for item in items:
                workers[replicas[item]].append(node * gpus + gpu)
    return tuple(tuple(dict.fromkeys(w)) for w in workers)


def eplb_layer(load: Floats, slots: Slots, num_groups: int, replicas: int) -> Layer:
    """`eplb` on the workers that a layer may use, hierarchical where they lie on equal nodes.

    Where the experts do not fill the GPUs evenly (EPLB has no answer), empty slots are filled up with experts nobody
    wants, which changes nothing else.
    """
    size = len(slots.workers) * slots.per_gpu
    per_node = np.bincount([slots.nodes[w] for w in slots.workers])
    equal = len(set(per_node[per_node > 0].tolist())) == 1
    num_nodes = int((per_node > 0).sum()) if equal else 1
    wanted = len(load) + replicas
    if wanted == size:
        layer = eplb(
            load,
            num_replicas=size,
            num_groups=num_groups,
            num_nodes=num_nodes,
            num_gpus=len(slots.workers),
        )
    else:
        counts = replica_counts(load, wanted)
        padded = np.concatenate([load, np.zeros(size - wanted)])
        counts = np.concatenate([counts, np.ones(size - wanted, np.int64)])
        layer = packed(padded, counts, len(slots.workers))[: len(load)]
    return tuple(tuple(slots.workers[w] for w in workers) for workers in layer)


def packed(load: Floats, counts: npt.NDArray[np.int64], num_gpus: int) -> Layer:
    """Replicas of every expert on GPUs, whatever their node: the packing of EPLB's global policy."""
    experts = np.arange(len(load))
    replicas = np.concatenate([experts, np.repeat(experts, counts - 1)])
    workers: list[list[int]] = [[] for _ in load]
    for gpu, items in enumerate(balanced_packing((load / counts)[replicas], num_gpus)):
        for item in items:
            workers[replicas[item]].append(gpu)
    return tuple(tuple(dict.fromkeys(w)) for w in workers)
