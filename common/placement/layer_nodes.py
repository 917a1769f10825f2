"""The nodes of one layer's experts: starts, and what bounds the search from them (`common.placement.swap`). Pure."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.placement.baselines import replica_counts
from common.placement.links import Links
from common.placement.packing import Slots, pack_layer
from common.placement.plan import Layer
from common.placement.score import replica_shares, worker_loads
from common.placement.swap import Assignment, Budget, Floats, Ints, Limits, Nodes, search

_GOLDEN = 0.6180339887498949
# of what a node's GPUs could carry at the bound on GPU load; smaller until packing succeeds
_CAPS = (1.0, 0.99, 0.97, 0.94, 0.9, 0.85)
_SLACK, _TINY = 1 + 1e-9, 1e-12
_MARGIN = (
    0.95  # of the largest load, for copies that EPLB has otherwise: tokens to come have other loads
)
_GROUPS = Budget(kicks=24, kick_swaps=2)
_GROUP_TOKENS = 2048  # tell which groups go together
_MOST_LANES = 8  # above that a token is looked at from one source node only

LayerNodes = list[list[int]]  # by expert: the node of each replica


@dataclass(frozen=True, slots=True, eq=False)
class LayerTask:
    """Everything that placing one layer on nodes needs; can be sent to another process.

    `max_load` is what no GPU's rows per token over its speed should exceed, `node_load` the same for the mean of a
    node's GPUs; `previous[expert]` are nodes to start from; `eplb` is EPLB's placement, one of the starts.
    """

    ids: npt.NDArray[np.int16]  # [tokens, top_k]
    num_experts: int
    num_groups: int
    slots: Slots
    links: Links
    replicas: int
    max_load: float
    node_load: float
    seed: int
    budget: Budget
    eplb: Layer
    previous: tuple[Nodes, ...] | None = None


def place_nodes(task: LayerTask) -> LayerNodes:
    """The nodes of each expert's replicas, for one layer."""
    slots, sources = task.slots, task.links.sources
    load = np.bincount(task.ids.ravel(), minlength=task.num_experts) / len(task.ids)
    eplb = [tuple(sorted(slots.nodes[w] for w in workers)) for workers in task.eplb]
    starts = _starts(task, load, eplb)
    best: LayerNodes = []
    lightest = np.inf
    for share in _CAPS:
        assignment = _assignment(task, _limits(task, load, share))
        nodes = search(assignment, starts, task.budget, np.random.default_rng(task.seed))
        placed = list(map(list, nodes))
        layer = pack_layer(placed, load, slots, sources, np.zeros(len(slots.nodes)))
        loads = worker_loads(layer, slots.nodes, load, sources)[1] / slots.speeds
        if loads.max() < lightest:
            best, lightest = placed, loads.max()
        if lightest <= task.max_load * _SLACK or slots.per_gpu == 1:  # alone: nothing to tighten
            break
    return best


def _assignment(task: LayerTask, limits: Limits) -> Assignment:
    """Every token from every source node while those are few, else from one; from the mean of all without replicas.

    Without replicas a token costs the same mean wherever it starts, so that is exact.
    """
    links, ids = task.links, task.ids.astype(np.int64)
    lanes = links.sources.nonzero()[0]
    if not task.replicas:
        lane = np.zeros(len(ids), np.int64)
        return Assignment(ids, lane, None, links.per_touch[:, None], links.sources, limits)
    seconds = (links.seconds * links.sources[:, None])[:, lanes]
    if len(lanes) <= _MOST_LANES:
        lane = np.tile(np.arange(len(lanes)), len(ids))
        ids = ids.repeat(len(lanes), axis=0)
    else:
        point = (np.arange(len(ids)) * _GOLDEN) % 1.0
        lane = np.searchsorted(links.sources[lanes].cumsum()[:-1], point, side="right")
    return Assignment(ids, lane, lanes, seconds, links.sources, limits)


def _limits(task: LayerTask, load: Floats, share: float) -> Limits:
    """What GPUs and nodes may bear: as much as EPLB's busiest; a copy that is not EPLB's somewhat less."""
    sources, slots = task.links.sources, task.slots
    room = slots.room(len(sources))
    speed = slots.node_speeds(len(room))
    heaviest = np.full(task.num_experts, task.max_load * _MARGIN)
    for expert, workers in enumerate(task.eplb):
        nodes = [slots.nodes[w] for w in workers]
        peak = (sources @ replica_shares(nodes, sources) / speed[nodes]).max()
        heaviest[expert] = max(heaviest[expert], load[expert] * peak)
    cap = np.full(len(room), np.inf)
    if slots.per_gpu > 1:
        node_speed = speed * room / slots.per_gpu
        fair = load.sum() * node_speed / node_speed.sum()
        cap = np.maximum(fair * 1.0005, task.node_load * node_speed * share)
    return Limits(room, cap, load, heaviest, speed)


def _group_homes(task: LayerTask) -> list[Ints]:
    """Node of each expert with whole expert groups on nodes, searched group by group; none where they do not fit."""
    size = task.num_experts // task.num_groups
    places = task.slots.room(len(task.links.sources)) // size
    if task.num_groups == 1 or places.sum() < task.num_groups:
        return []
    groups = np.sort(task.ids[:: -(-len(task.ids) // _GROUP_TOKENS)].astype(np.int64) // size)
    groups[:, 1:][groups[:, 1:] == groups[:, :-1]] = -1  # once each
    weights = np.bincount(groups[groups >= 0], minlength=task.num_groups) / len(groups)
    free = np.full(len(places), np.inf)
    limits = Limits(places, free, weights, np.full(len(weights), np.inf), np.ones(len(places)))
    seconds, lane = task.links.per_touch[:, None], np.zeros(len(groups), np.int64)
    assignment = Assignment(groups, lane, None, seconds, task.links.sources, limits)
    in_order = np.repeat(np.arange(len(places)), places)[: task.num_groups]
    starts = [[(node,) for node in start.tolist()] for start in (_deal(weights, places), in_order)]
    nodes = search(assignment, starts, _GROUPS, np.random.default_rng(task.seed))
    return [np.asarray(nodes)[:, 0].repeat(size)]


def _starts(task: LayerTask, load: Floats, eplb: list[Nodes]) -> list[list[Nodes]]:
    """Where to start: the previous nodes; else EPLB's, whole groups on nodes, dealt by load, the heaviest together."""
    counts = replica_counts(load, task.num_experts + task.replicas, most=len(task.slots.workers))
    if task.previous is not None:
        return [_dealt(task, load, counts, list(task.previous))]
    homes = [
        _dealt(task, load, counts, [(node,) * len(counts) for node in home.tolist()])
        for home in _group_homes(task)
    ]
    dealt = _dealt(task, load, counts, [()] * len(counts))
    return [eplb, *homes, dealt, _dealt(task, load, counts, _by_heat(task, load, dealt))]


def _by_heat(task: LayerTask, load: Floats, dealt: list[Nodes]) -> list[Nodes]:
    """Experts of one copy anew: the heaviest together, on the node whose links mind a row least, and so on."""
    wished = list(dealt)
    cheapest = np.argsort(task.links.per_touch.max(axis=0, initial=0.0), kind="stable")
    single = [e for e in np.argsort(-load, kind="stable").tolist() if len(dealt[e]) == 1]
    held = sorted((dealt[e] for e in single), key=lambda nodes: cheapest.tolist().index(nodes[0]))
    for expert, nodes in zip(single, held, strict=True):
        wished[expert] = nodes
    return wished


def _dealt(task: LayerTask, load: Floats, counts: Ints, wished: list[Nodes]) -> list[Nodes]:
    """`counts[expert]` copies where wished while that has room, else on different nodes, the emptiest first.

    Experts with replicas first, then the heaviest copies.
    """
    slots, weight = task.slots, task.links.sources
    room = slots.room(len(weight))
    speed = slots.node_speeds(len(room))
    used, carried = np.zeros(len(room)), np.zeros(len(room))
    found: list[Nodes] = [()] * len(counts)
    each = load / counts
    for expert in np.lexsort((-each, counts == 1)).tolist():
        slow = each[expert] > task.max_load * _SLACK * speed
        wish = list(wished[expert])
        chosen: list[int] = []
        for _ in range(counts[expert]):
            far = np.asarray([node not in wish for node in range(len(room))])
            again = np.bincount(np.asarray(chosen, np.int64), minlength=len(room))
            full = carried / np.maximum(room * speed, _TINY)
            order = np.lexsort((-weight, full, again, far, slow, used >= room))
            node = int(order[0])
            chosen.append(node)
            if node in wish:
                wish.remove(node)
            used[node] += 1
            carried[node] += each[expert]
        found[expert] = tuple(sorted(chosen))
    return found


def _deal(weights: Floats, places: Ints) -> Ints:
    """Heaviest first, to the node with the least weight for its places among those with a free one."""
    node, free = np.empty(len(weights), np.int64), places.copy()
    sums = np.zeros(len(places))
    for item in np.argsort(-weights, kind="stable").tolist():
        node[item] = int(np.argmin(np.where(free > 0, sums / np.maximum(places, 1), np.inf)))
        sums[node[item]] += weights[item]
        free[node[item]] -= 1
    return node
