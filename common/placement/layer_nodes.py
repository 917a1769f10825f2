"""The nodes of one layer's experts: replicas spread, the rest found by search. Pure."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.placement.baselines import replica_counts
from common.placement.links import Links
from common.placement.packing import Slots, pack_layer
from common.placement.score import replica_shares, worker_loads
from common.placement.swap import Assignment, Budget, Floats, Ints, search

_GOLDEN, _PLASTIC = 0.6180339887498949, 0.7548776662466927
# of what a node's GPUs could carry at the bound on GPU load; smaller until packing succeeds
_CAPS = (1.0, 0.99, 0.97, 0.94, 0.9, 0.85)
_SLACK = 1 + 1e-9

LayerNodes = list[list[int]]  # by expert: the node of each replica


@dataclass(frozen=True, slots=True, eq=False)
class LayerTask:
    """Everything that placing one layer on nodes needs; can be sent to another process.

    `max_load` is what no GPU's rows per token over its speed should exceed; `previous[expert]` are nodes to start from.
    """

    ids: npt.NDArray[np.int16]  # [tokens, top_k]
    num_experts: int
    num_groups: int
    slots: Slots
    links: Links
    replicas: int
    max_load: float
    seed: int
    budget: Budget
    previous: tuple[tuple[int, ...], ...] | None = None


def place_nodes(task: LayerTask) -> LayerNodes:
    """The nodes of each expert's replicas, for one layer."""
    load = np.bincount(task.ids.ravel(), minlength=task.num_experts) / len(task.ids)
    slots, sources = task.slots, task.links.sources
    counts = replica_counts(load, task.num_experts + task.replicas, most=len(slots.workers))
    spread = _spread_replicas(load, counts, task)
    best: LayerNodes = []
    lightest = np.inf
    for share in _CAPS:
        placed = _place_rest(task, load, spread, share)
        layer = pack_layer(placed, load, slots, sources, np.zeros(len(slots.nodes)))
        loads = worker_loads(layer, slots.nodes, load, sources)[1] / slots.speeds
        if loads.max() < lightest:
            best, lightest = placed, loads.max()
        if lightest <= task.max_load * _SLACK or slots.per_gpu == 1:  # alone: nothing to tighten
            break
    return best


def _spread_replicas(load: Floats, counts: Ints, task: LayerTask) -> dict[int, list[int]]:
    """Nodes of experts with replicas, the heaviest first: all different while nodes have room, the emptiest first."""
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
        slow = np.asarray(load[expert] / counts[expert] > task.max_load * _SLACK * speed, float)
        for _ in range(counts[expert]):

            def key(
                node: int, chosen: list[int] = chosen, before: tuple[int, ...] = before, slow: Floats = slow
            ) -> tuple[float, ...]:  # fmt: skip
                full = carried[node] / (room[node] * speed[node])
                return (
                    slow[node],
                    chosen.count(node),
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
    task: LayerTask, load: Floats, spread: dict[int, list[int]], share: float
) -> LayerNodes:
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
    starts = _starts(task, single, weights, left, cap, fits)
    nodes_of_items = search(assignment, starts, task.budget, np.random.default_rng(task.seed))
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
    return np.maximum(fair * 1.0005, task.max_load * node_speed * share) - carried, fits


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
    fits: npt.NDArray[np.bool_],
) -> list[Ints]:  # fmt: skip
    """Where to start: the previous nodes; else experts in order, co-activated groups together, and dealt by load."""
    if task.previous is not None:
        return [_as_before(task.previous, single, weights, left, fits)]
    orders = [single]
    if task.num_groups > 1:
        size = task.num_experts // task.num_groups
        rank = np.argsort(_group_order(task), kind="stable")
        orders.append(single[np.argsort(rank[single // size], kind="stable")])
    starts = [_fill(np.searchsorted(single, order), left) for order in orders]
    dealt = _deal(weights, left, fits)
    starts.append(dealt)
    items = np.arange(len(weights))
    within = [
        s
        for s in starts
        if fits[items, s].all() and (np.bincount(s, weights, minlength=len(cap)) <= cap).all()
    ]
    return within or [dealt]


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
