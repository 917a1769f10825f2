"""Which GPU of a node holds which of the node's experts of one layer. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.placement.plan import Layer
from common.placement.score import replica_shares

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_MAX_MOVES = 200


@dataclass(frozen=True, slots=True)
class Slots:
    """Workers that a layer may use, `per_gpu` experts on each.

    `nodes[worker]` and `speeds[worker]` (relative; GPUs of one node are alike) are of every worker of the cluster.
    """

    workers: tuple[int, ...]
    nodes: tuple[int, ...]
    per_gpu: int
    speeds: tuple[float, ...]

    def room(self, num_nodes: int) -> Ints:
        """Experts that each node can take."""
        return (
            np.bincount([self.nodes[w] for w in self.workers], minlength=num_nodes) * self.per_gpu
        )

    def node_speeds(self, num_nodes: int) -> Floats:
        """Speed of a GPU of each node; 1 where the layer may use none."""
        speeds = np.ones(num_nodes)
        speeds[[self.nodes[w] for w in self.workers]] = [self.speeds[w] for w in self.workers]
        return speeds


def pack_layer(
    placed: list[list[int]], load: Floats, slots: Slots, sources: Floats, total: Floats, *,
    keep: Layer | None = None,
) -> Layer:  # fmt: skip
    """`placed[expert]` are its replicas' nodes, `load[expert]` its rows; `total[worker]` is the load of other layers.

    GPUs of a node get loads as even as swaps make them. Packs go to the GPUs that hold most of them in `keep`, then the
    heaviest to the GPU with the least `total`.
    """
    workers: list[list[int]] = [[] for _ in placed]
    by_node: dict[int, list[tuple[int, float]]] = {}
    for expert, nodes in enumerate(placed):
        shares = sources @ replica_shares(nodes, sources) * load[expert]
        for node, share in zip(nodes, shares.tolist(), strict=True):
            by_node.setdefault(node, []).append((expert, share))
    for node, items in by_node.items():
        gpus = [w for w in slots.workers if slots.nodes[w] == node]
        weights = np.asarray([share for _, share in items])
        experts = [expert for expert, _ in items]
        packs = even_packs(weights, experts, len(gpus), slots.per_gpu)
        for worker, pack in _matched(packs, gpus, weights, experts, total, keep):
            for item in pack:
                workers[experts[item]].append(worker)
    return tuple(tuple(dict.fromkeys(w)) for w in workers)


def _matched(
    packs: list[list[int]], gpus: list[int], weights: Floats, experts: list[int], total: Floats,
    keep: Layer | None,
) -> Iterator[tuple[int, list[int]]]:  # fmt: skip
    """(GPU, pack) pairs."""
    heaviest = sorted(packs, key=lambda pack: -weights[pack].sum())
    free = sorted(gpus, key=total.__getitem__)
    if keep is not None:
        overlaps = [
            (-sum(worker in keep[experts[item]] for item in pack), p, worker)
            for p, pack in enumerate(heaviest)
            for worker in gpus
        ]
        taken: set[int] = set()
        for overlap, p, worker in sorted(overlaps):
            if overlap and p not in taken and worker in free:
                taken.add(p)
                free.remove(worker)
                yield worker, heaviest[p]
        heaviest = [pack for p, pack in enumerate(heaviest) if p not in taken]
    yield from zip(free, heaviest, strict=True)


def even_packs(weights: Floats, experts: list[int], num_packs: int, size: int) -> list[list[int]]:
    """Items in packs of at most `size`: heaviest first to the lightest pack, then swaps with the heaviest pack.

    Two replicas of one expert go to different packs while one is free of it.
    """
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    sums = np.zeros(num_packs)
    for item in np.argsort(-weights, kind="stable").tolist():
        pack = min(
            (p for p in range(num_packs) if len(packs[p]) < size),
            key=lambda p: (experts[item] in [experts[i] for i in packs[p]], sums[p]),
        )
        packs[pack].append(item)
        sums[pack] += weights[item]
    for _ in range(_MAX_MOVES if size > 1 else 0):
        if not _improve(packs, sums, weights, experts):
            break
    return packs


def _improve(packs: list[list[int]], sums: Floats, weights: Floats, experts: list[int]) -> bool:
    """One swap that makes the heaviest pack lighter, and the other not as heavy; False when there is none."""
    top = int(np.argmax(sums))
    best, choice = sums[top] * (1 - 1e-9), None
    for other, pack in enumerate(packs):
        if other == top or not pack:
            continue
        change = weights[packs[top]][:, None] - weights[pack][None, :]
        worse = np.maximum(sums[top] - change, sums[other] + change)
        i, j = divmod(int(np.argmin(worse)), len(pack))
        if worse[i, j] < best and _apart(packs[top], pack, i, j, experts):
            best, choice = worse[i, j], (other, i, j)
    if choice is None:
        return False
    other, i, j = choice
    a, b = packs[top][i], packs[other][j]
    packs[top][i], packs[other][j] = b, a
    sums[top] += weights[b] - weights[a]
    sums[other] += weights[a] - weights[b]
    return True


def _apart(mine: list[int], theirs: list[int], i: int, j: int, experts: list[int]) -> bool:
    """Whether swapping mine[i] and theirs[j] keeps replicas of one expert on different GPUs."""
    a, b = experts[mine[i]], experts[theirs[j]]
    return b not in [experts[m] for m in mine if m != mine[i]] and a not in [
        experts[t] for t in theirs if t != theirs[j]
    ]
