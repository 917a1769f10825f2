"""The nodes of one layer's experts: replicas spread, the rest found by search. Pure."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from common.placement.baselines import replica_counts
from common.placement.links import Links
from common.placement.packing import Slots, pack_layer
from common.placement.plan import Layer
from common.placement.score import node_rows, replica_shares, worker_loads
from common.placement.swap import Assignment, Budget, Floats, Ints, search

_GOLDEN, _PLASTIC = 0.6180339887498949, 0.7548776662466927
# of what a node's GPUs could carry at the bound on GPU load; smaller until packing succeeds
_CAPS = (1.0, 0.99, 0.97, 0.94, 0.9, 0.85)
_SLACK = 1 + 1e-9
_GROUPS = Budget(kicks=24, kick_swaps=2)
_GROUP_TOKENS = 2048  # tell which groups go together
_GLANCE = Budget(rounds=3, kicks=0)  # enough to compare ways

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
    previous: tuple[tuple[int, ...], ...] | None = None


def place_nodes(task: LayerTask) -> LayerNodes:
    """The nodes of each expert's replicas, for one layer: the best of several ways to treat replicas.

    Apart, so that rows stay on the node where their token starts; at home, beside the experts that are chosen with
    them, so that a row goes to few nodes; or where EPLB has them. Which pays depends on the gate.
    """
    load = np.bincount(task.ids.ravel(), minlength=task.num_experts) / len(task.ids)
    counts = replica_counts(load, task.num_experts + task.replicas, most=len(task.slots.workers))
    homes = [] if task.previous else [_nodes_of(task.eplb, task), *_group_homes(task)]
    ways = [(_spread_replicas(load, counts, task), homes)]
    if counts.max() > 1:
        ways += [(_spread_replicas(load, counts, task, home), [home]) for home in homes[1:]]
        nodes = task.slots.nodes
        theirs = {e: [nodes[w] for w in held] for e, held in enumerate(task.eplb) if len(held) > 1}
        ways += [(theirs, [home]) for home in homes[:1]]
    if len(ways) > 1:
        ways = [min(ways, key=lambda way: _place(task, load, way[0], way[1], _GLANCE)[0])]
    spread, starts = ways[0]
    return _place(task, load, spread, starts, task.budget)[1]


def _place(
    task: LayerTask, load: Floats, spread: dict[int, list[int]], homes: list[Ints], budget: Budget
) -> tuple[tuple[bool, float], LayerNodes]:
    """(whether a GPU bears more than it may, seconds of the busiest link), and the nodes found."""
    slots, links = task.slots, task.links
    best: LayerNodes = []
    packed: Layer = ()
    lightest = np.inf
    for share in _CAPS:
        placed = _place_rest(task, load, spread, share, homes, budget)
        layer = pack_layer(placed, load, slots, links.sources, np.zeros(len(slots.nodes)))
        loads = worker_loads(layer, slots.nodes, load, links.sources)[1] / slots.speeds
        if loads.max() < lightest:
            best, packed, lightest = placed, layer, loads.max()
        if lightest <= task.max_load * _SLACK or slots.per_gpu == 1:  # alone: nothing to tighten
            break
    rows = node_rows(packed, slots.nodes, task.ids, links.sources)
    return (lightest > task.max_load * _SLACK, float(links.loads(rows).max(initial=0.0))), best


def _nodes_of(layer: Layer, task: LayerTask) -> Ints:
    """Node of each expert's primary."""
    return np.asarray([task.slots.nodes[workers[0]] for workers in layer])


def _group_homes(task: LayerTask) -> list[Ints]:
    """Node of each expert with whole expert groups on nodes, searched group by group; none where they do not fit."""
    size = task.num_experts // task.num_groups
    places = task.slots.room(len(task.links.sources)) // size
    if task.num_groups == 1 or places.sum() < task.num_groups:
        return []
    ids = task.ids[:: -(-len(task.ids) // _GROUP_TOKENS)]
    wanted = np.zeros((int(places.sum()), len(ids)), np.float32)
    wanted[ids // size, np.arange(len(ids))[:, None]] = 1
    weights = wanted.mean(axis=1, dtype=np.float64)
    lane, seconds, fixed = _lanes(replace(task, ids=ids), {})
    free = np.full(len(places), np.inf)
    fits = np.ones((len(weights), len(places)), np.bool_)
    groups = Assignment(wanted, lane, seconds, weights, free, fixed, fits)
    starts = [_deal(weights, places, fits), np.repeat(np.arange(len(places)), places)]
    node = search(groups, starts, _GROUPS, np.random.default_rng(task.seed))
    return [node[: task.num_groups].repeat(size)]


def _spread_replicas(
    load: Floats, counts: Ints, task: LayerTask, home: Ints | None = None
) -> dict[int, list[int]]:
    """Nodes of experts with replicas, the heaviest first: all different while nodes have room, the emptiest first.

    With `home` [experts] all at home while that has room.
    """
    room = task.slots.room(len(task.links.sources))
    speed = task.slots.node_speeds(len(room))
    used, carried = np.zeros(len(room)), np.zeros(len(room))
    weight = np.maximum(task.links.sources, 1e-6)
    spread: dict[int, list[int]] = {}
    for expert in np.argsort(-load / counts, kind="stable").tolist():
        if counts[expert] == 1:
            continue
        chosen: list[int] = []
        before = task.previous[expert] if task.previous else ()
        at_home = None if home is None else home[expert]
        slow = np.asarray(load[expert] / counts[expert] > task.max_load * _SLACK * speed, float)
        for _ in range(counts[expert]):

            def key(
                node: int, chosen: list[int] = chosen, before: tuple[int, ...] = before, slow: Floats = slow,
                at_home: int | None = at_home,
            ) -> tuple[float, ...]:  # fmt: skip
                full = carried[node] / (room[node] * speed[node])
                return (
                    slow[node],
                    chosen.count(node) if at_home is None else node != at_home,
                    node not in before,
                    full,
                    -weight[node],
                    node,
                )

            node = min((n for n in range(len(room)) if used[n] < room[n]), key=key)
            chosen.append(node)
            used[node] += 1
            carried[node] += load[expert] / counts[expert]
        spread[expert] = chosen
    return spread


def _place_rest(
    task: LayerTask, load: Floats, spread: dict[int, list[int]], share: float, homes: list[Ints],
    budget: Budget,
) -> LayerNodes:  # fmt: skip
    """Search the nodes of experts without replicas; empty slots are items that no token wants."""
    room = task.slots.room(len(task.links.sources))
    carried, left = np.zeros(len(room)), room.copy()
    for expert, nodes in spread.items():
        for node in nodes:
            left[node] -= 1
            carried[node] += load[expert] / len(nodes)
    single = np.asarray([e for e in range(task.num_experts) if e not in spread], np.int64)
    if not len(single):
        return [spread[e] for e in range(task.num_experts)]
    lane, seconds, fixed = _lanes(task, spread)
    wanted = np.zeros((task.num_experts, len(task.ids)), np.float32)
    wanted[task.ids, np.arange(len(task.ids))[:, None]] = 1
    num_items = int(left.sum())
    items = np.zeros((num_items, len(task.ids)), np.float32)
    items[: len(single)] = wanted[single]
    weights = np.zeros(num_items)
    weights[: len(single)] = load[single]
    cap, fits = _limits(task, weights, carried, share)
    assignment = Assignment(items, lane, seconds, weights, cap, fixed, fits)
    starts = _starts(task, single, weights, left, cap, fits, homes)
    nodes_of_items = search(assignment, starts, budget, np.random.default_rng(task.seed))
    found = dict(zip(single.tolist(), nodes_of_items.tolist(), strict=False))
    return [spread.get(e) or [found[e]] for e in range(task.num_experts)]


def _limits(
    task: LayerTask, weights: Floats, carried: Floats, share: float
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """(load each node may take besides `carried`, [items, nodes] which item fits a GPU of which node)."""
    speed = task.slots.node_speeds(len(carried))
    fits = weights[:, None] <= task.max_load * _SLACK * speed
    fits[~fits.any(axis=1)] = speed == speed.max()  # too heavy for all: the fastest
    if task.slots.per_gpu == 1:
        return np.full(len(carried), np.inf), fits
    node_speed = speed * task.slots.room(len(carried)) / task.slots.per_gpu
    fair = (weights.sum() + carried.sum()) * node_speed / node_speed.sum()
    return np.maximum(fair * 1.0005, task.node_load * node_speed * share) - carried, fits


def _lanes(task: LayerTask, spread: dict[int, list[int]]) -> tuple[Ints, Floats, Ints]:
    """(lane of each token, seconds per token and node, items that stay); with replicas, one lane per source node.

    Without replicas a token costs the same mean wherever it starts, so one lane is exact.
    """
    links, num_tokens = task.links, len(task.ids)
    num_nodes = len(links.sources)
    fixed = np.zeros((num_tokens, num_nodes), np.int64)
    if not spread:
        return np.zeros(num_tokens, np.int64), links.per_touch / num_tokens, fixed
    point = (np.arange(num_tokens) * _GOLDEN) % 1.0
    lane = np.searchsorted(links.sources.cumsum()[:-1], point, side="right")
    for expert, held in spread.items():
        tokens = (task.ids == expert).any(axis=1).nonzero()[0]
        bounds = replica_shares(held, links.sources).cumsum(axis=1)[lane[tokens], :-1]
        draw = (tokens * _PLASTIC + expert * _GOLDEN) % 1.0
        np.add.at(fixed, (tokens, np.asarray(held)[(draw[:, None] >= bounds).sum(axis=1)]), 1)
    seconds = links.seconds.reshape(len(links.names), num_nodes * num_nodes) / num_tokens
    return lane, seconds, fixed


def _starts(
    task: LayerTask, single: Ints, weights: Floats, left: Ints, cap: Floats,
    fits: npt.NDArray[np.bool_], homes: list[Ints],
) -> list[Ints]:  # fmt: skip
    """Where to start: the previous nodes; else homes [experts], experts in order, co-activated groups together, and
    dealt by load."""
    if task.previous is not None:
        return [_as_before(task.previous, single, weights, left, fits)]
    starts = [
        _as_before(tuple((int(node),) for node in home), single, weights, left, fits)
        for home in homes
    ]
    orders = [single]
    if task.num_groups > 1:
        size = task.num_experts // task.num_groups
        rank = np.argsort(_group_order(task), kind="stable")
        orders.append(single[np.argsort(rank[single // size], kind="stable")])
    starts += [_fill(np.searchsorted(single, order), left) for order in orders]
    starts.append(_by_heat(weights, left, task.links))
    dealt = _deal(weights, left, fits)
    starts.append(dealt)
    items = np.arange(len(weights))
    within = [
        s
        for s in starts
        if fits[items, s].all() and (np.bincount(s, weights, minlength=len(cap)) <= cap).all()
    ]
    return within or [dealt]


def _by_heat(weights: Floats, left: Ints, links: Links) -> Ints:
    """The heaviest together, on the node whose links mind a row least, and so on: few rows, where links allow it."""
    cheapest = np.argsort(links.per_touch.max(axis=0, initial=0.0), kind="stable")
    node = np.empty(len(weights), np.int64)
    node[np.argsort(-weights, kind="stable")] = cheapest.repeat(left[cheapest])
    return node


def _deal(weights: Floats, left: Ints, fits: npt.NDArray[np.bool_]) -> Ints:
    """Heaviest first, to the node with the least load for its size among those it fits."""
    node = np.empty(len(weights), np.int64)
    sums, free = np.zeros(len(left)), left.copy()
    for item in np.argsort(-weights, kind="stable").tolist():
        open_nodes = (free > 0) & fits[item] if ((free > 0) & fits[item]).any() else free > 0
        chosen = int(np.argmin(np.where(open_nodes, sums / np.maximum(left, 1), np.inf)))
        node[item] = chosen
        sums[chosen] += weights[item]
        free[chosen] -= 1
    return node


def _as_before(
    previous: tuple[tuple[int, ...], ...], single: Ints, weights: Floats, left: Ints,
    fits: npt.NDArray[np.bool_],
) -> Ints:  # fmt: skip
    """Each expert on its previous node while that has room, the heaviest first; the rest dealt out."""
    node, free = np.full(len(weights), -1, np.int64), left.copy()
    for item in np.argsort(-weights[: len(single)], kind="stable").tolist():
        for old in previous[single[item]]:
            if free[old] > 0 and fits[item, old]:
                node[item] = old
                free[old] -= 1
                break
    rest = (node < 0).nonzero()[0]
    node[rest] = _deal(weights[rest], free, fits[rest])
    return node


def _fill(order: Ints, left: Ints) -> Ints:
    """Items in `order`, node after node; the rest of the items fill what is left, evenly among the nodes."""
    places = np.repeat(np.arange(len(left)), left)
    node = np.full(len(places), -1, np.int64)
    taken = np.linspace(0, len(places) - 1, len(order)).round().astype(np.int64)
    node[order] = places[taken]
    node[node < 0] = places[np.setdiff1d(np.arange(len(places)), taken)]
    return node


def _group_order(task: LayerTask) -> Ints:
    """Groups one after the other, each beside the one it is most often chosen with."""
    size = task.num_experts // task.num_groups
    chosen = np.zeros((len(task.ids), task.num_groups), np.float32)
    chosen[np.arange(len(task.ids))[:, None], task.ids // size] = 1
    together = chosen.T @ chosen
    order = [int(np.argmax(together.diagonal()))]
    while len(order) < task.num_groups:
        rest = [g for g in range(task.num_groups) if g not in order]
        order.append(max(rest, key=lambda g: (together[order[-1], g], -g)))
    return np.asarray(order)
