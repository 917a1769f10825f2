"""The nodes of one layer's experts: starts, and what bounds the search from them (`common.placement.swap`). Pure."""

from dataclasses import dataclass

import numpy as np

from common.placement.baselines import eplb_layer, replica_counts
from common.placement.chance import share_of_chance, shuffled
from common.placement.links import Links
from common.placement.packing import Slots, pack_layer
from common.placement.plan import Layer
from common.placement.routing_trace import Ids
from common.placement.score import node_rows, replica_shares, worker_loads
from common.placement.swap import Assignment, Budget, Floats, Ints, Limits, Nodes, Rows, search

_GOLDEN = 0.6180339887498949
# of what a node's GPUs could carry at the bound on GPU load; smaller until packing succeeds
_CAPS = (1.0, 0.99, 0.97, 0.94, 0.9, 0.85)
_SLACK, _TINY = 1 + 1e-9, 1e-12
_MARGIN = (
    0.95  # of the largest load, for copies that EPLB has otherwise: tokens to come have other loads
)
_WORTH = 0.999  # above that a better link is luck of the trace
_MOVE = 0.99  # above that it is not worth moving what has been placed
_COPIES = 8  # by chance, of the tokens
_PARTS = 4  # runs of the tokens that must agree
_GROUPS = Budget(kicks=24, kick_swaps=2)
_GROUP_TOKENS = 2048  # tell which groups go together

LayerNodes = list[list[int]]  # by expert: the node of each replica


@dataclass(frozen=True, slots=True, eq=False)
class LayerTask:
    """Everything that placing one layer on nodes needs; can be sent to another process.

    The search looks at every `step`th token; `previous[expert]` are nodes to start from.
    """

    ids: Ids  # [tokens, top_k]
    num_experts: int
    num_groups: int
    slots: Slots
    links: Links
    replicas: int
    step: int
    seed: int
    budget: Budget
    previous: tuple[Nodes, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """What EPLB's placement makes of a layer, and of runs of its tokens: ours shall be no worse in any.

    `parts` are all tokens, then the runs; `loads[part, expert]` rows per token; `most[part]` those of the busiest GPU
    over its speed; `nodes[expert]` its copies' and `peaks[expert]` the largest share of one, over its GPU's speed.
    """

    layer: Layer
    parts: list[Ids]
    loads: Floats
    most: Floats
    nodes: list[Nodes]
    peaks: Floats


def place_nodes(task: LayerTask) -> LayerNodes | None:
    """The nodes of each expert's replicas, for one layer; None where EPLB's placement is as good.

    What is better on all tokens alone would not be on others: a new placement's busiest GPU and link are no worse than
    EPLB's in any part of them. Where experts have been placed before, staying put is worth more than the links.
    """
    slots, sources = task.slots, task.links.sources
    bound = _bound(task)
    starts = _starts(task, bound)
    searched = _searched(task)
    for share in _CAPS:
        assignment = Assignment(*searched, sources, _limits(task, bound, share))
        rng, worth = np.random.default_rng(task.seed), _MOVE if task.previous else 1.0
        nodes = search(assignment, starts, task.budget, rng, worth)
        placed = list(map(list, nodes))
        layer = pack_layer(placed, bound.loads[0], slots, sources, np.zeros(len(slots.nodes)))
        most = [
            _largest(layer, load, slots, sources)
            for load in bound.loads[: 1 if task.previous else None]
        ]
        if (most <= bound.most[: len(most)] * _SLACK).all():
            return placed if task.previous or _better(layer, bound, task) else None
        if slots.per_gpu == 1:  # alone: nothing to tighten
            break
    return None


def _bound(task: LayerTask) -> Bound:
    slots, sources = task.slots, task.links.sources
    parts = list(filter(len, (task.ids, *np.array_split(task.ids, _PARTS))))
    loads = np.stack([np.bincount(p.ravel(), minlength=task.num_experts) / len(p) for p in parts])
    layer = eplb_layer(loads[0], slots, task.num_groups, task.replicas)
    peaks = [
        (
            sources
            @ replica_shares([slots.nodes[w] for w in held], sources)
            / np.asarray(slots.speeds)[list(held)]
        ).max()
        for held in layer
    ]
    nodes = [tuple(sorted(slots.nodes[w] for w in held)) for held in layer]
    most = [_largest(layer, load, slots, sources) for load in loads]
    return Bound(layer, parts, loads, np.asarray(most), nodes, np.asarray(peaks))


def _largest(layer: Layer, load: Floats, slots: Slots, sources: Floats) -> float:
    """The busiest GPU: rows per token over its relative speed."""
    return float((worker_loads(layer, slots.nodes, load, sources)[1] / slots.speeds).max())


def _better(layer: Layer, bound: Bound, task: LayerTask) -> bool:
    """Whether the busiest link carries less."""
    nodes, links = task.slots.nodes, task.links
    # all tokens by themselves: which replica a row takes goes by its place, so runs do not add up to them
    loads = np.asarray(
        [
            [links.loads(node_rows(one, nodes, part, links.sources)) for part in bound.parts]
            for one in (layer, bound.layer)
        ]
    )
    ours, theirs = loads.max(axis=2, initial=0.0)
    return bool(ours[0] <= theirs[0] * _WORTH and (ours <= theirs).all())


def _searched(task: LayerTask) -> tuple[Rows, Ints | None, Floats]:
    """Rows, lanes and links for `Assignment`.

    Every token from every source node while those are few, else from one; from the mean of all without replicas.
    Without replicas a token costs the same mean wherever it starts, so that is exact.
    """
    links, ids = task.links, np.sort(task.ids[:: task.step].astype(np.int64), axis=1)
    lanes = links.sources.nonzero()[0]
    kinds, weight = _kinds(task, ids)
    if not task.replicas:
        rows = Rows(kinds, np.zeros(len(kinds), np.int64), weight)
        return rows, None, links.per_touch[:, None]
    if len(kinds) * len(lanes) <= len(ids):
        lane = np.tile(np.arange(len(lanes)), len(kinds))
        rows = Rows(kinds.repeat(len(lanes), axis=0), lane, weight.repeat(len(lanes)))
    else:
        point = (np.arange(len(ids)) * _GOLDEN) % 1.0
        lane = np.searchsorted(links.sources[lanes].cumsum()[:-1], point, side="right")
        rows = Rows(ids, lane, np.ones(len(ids)))
    seconds = (links.seconds * links.sources[:, None])[:, lanes]
    return rows, lanes, seconds


def _kinds(task: LayerTask, ids: Ints) -> tuple[Ints, Ints | Floats]:
    """Tokens [kinds, top_k] with different experts, and how often each is to be counted.

    Where tokens repeat, what they want together by chance alone is averaged out: that costs nothing there.
    """
    kinds, counts = np.unique(ids, axis=0, return_counts=True)
    if len(kinds) * _COPIES > len(ids):
        return kinds, counts
    chance = share_of_chance(ids, task.num_experts, task.num_groups)
    rng, size = np.random.default_rng(task.seed), task.num_experts // task.num_groups
    copies = [np.sort(shuffled(ids, size, rng), axis=1) for _ in range(_COPIES)]
    kinds, where = np.unique(np.concatenate([ids, *copies]), axis=0, return_inverse=True)
    weight = np.repeat([1 - chance, chance / _COPIES], [len(ids), _COPIES * len(ids)])
    return kinds, np.bincount(where.ravel(), weight)


def _limits(task: LayerTask, bound: Bound, share: float) -> Limits:
    """What GPUs and nodes may bear: as much as EPLB's busiest; a copy that is not EPLB's somewhat less."""
    slots, load = task.slots, bound.loads[0]
    room = slots.room(len(task.links.sources))
    speed = slots.node_speeds(len(room))
    least = (bound.most[:, None] * _MARGIN / np.maximum(bound.loads, _TINY)).min(axis=0)
    heaviest = load * np.maximum(least, bound.peaks)
    cap = np.full(len(room), np.inf)
    if slots.per_gpu > 1:
        node_speed = speed * room / slots.per_gpu
        fair = load.sum() * node_speed / node_speed.sum()
        loads = worker_loads(bound.layer, slots.nodes, load, task.links.sources)[1]
        theirs = np.bincount(slots.nodes, loads, minlength=len(room)) / np.maximum(
            node_speed, _TINY
        )
        cap = np.maximum(fair * 1.0005, theirs.max() * node_speed * share)
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
    kinds, weight = np.unique(np.sort(groups), axis=0, return_counts=True)
    rows = Rows(kinds, np.zeros(len(kinds), np.int64), weight)
    seconds = task.links.per_touch[:, None]
    assignment = Assignment(rows, None, seconds, task.links.sources, limits)
    in_order = np.repeat(np.arange(len(places)), places)[: task.num_groups].tolist()
    starts: list[list[Nodes]] = [[(node,) for node in in_order]]
    nodes = search(assignment, starts, _GROUPS, np.random.default_rng(task.seed))
    return [np.asarray(nodes)[:, 0].repeat(size)]


def _starts(task: LayerTask, bound: Bound) -> list[list[Nodes]]:
    """Where to start: the previous nodes; else EPLB's, whole groups on nodes, dealt by load, the heaviest together."""
    load = bound.loads[0]
    counts = replica_counts(load, task.num_experts + task.replicas, most=len(task.slots.workers))
    if task.previous is not None:
        return [_dealt(task, bound, counts, list(task.previous))]
    homes = [
        _dealt(task, bound, counts, [(node,) * len(counts) for node in home.tolist()])
        for home in _group_homes(task)
    ]
    dealt = _dealt(task, bound, counts, [()] * len(counts))
    return [bound.nodes, *homes, dealt, _dealt(task, bound, counts, _by_heat(task, load, dealt))]


def _by_heat(task: LayerTask, load: Floats, dealt: list[Nodes]) -> list[Nodes]:
    """Experts of one copy anew: the heaviest together, on the node whose links mind a row least, and so on."""
    wished = list(dealt)
    cheapest = np.argsort(task.links.per_touch.max(axis=0, initial=0.0), kind="stable")
    single = [e for e in np.argsort(-load, kind="stable").tolist() if len(dealt[e]) == 1]
    held = sorted((dealt[e] for e in single), key=lambda nodes: cheapest.tolist().index(nodes[0]))
    for expert, nodes in zip(single, held, strict=True):
        wished[expert] = nodes
    return wished


def _dealt(task: LayerTask, bound: Bound, counts: Ints, wished: list[Nodes]) -> list[Nodes]:
    """`counts[expert]` copies where wished while that has room, else on different nodes, the emptiest first.

    Experts with replicas first, then the heaviest copies.
    """
    slots, weight = task.slots, task.links.sources
    room = slots.room(len(weight))
    speed = slots.node_speeds(len(room))
    used, carried = np.zeros(len(room)), np.zeros(len(room))
    found: list[Nodes] = [()] * len(counts)
    each = bound.loads[0] / counts
    for expert in np.lexsort((-each, counts == 1)).tolist():
        slow = each[expert] > bound.most[0] * _SLACK * speed
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
