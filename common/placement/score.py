"""What a plan costs on a trace: rows between nodes, seconds on the busiest link, rows of the busiest GPU. Pure.

Expectations over where a token starts (`Links.sources`) are exact. A token that wants an expert with replicas uses one
on its source's node if there is one; what is left goes where it levels the replicas' loads best, which is what "least
outstanding tokens" comes to in the mean.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.placement.links import Links
from common.placement.plan import Layer, Plan
from common.placement.routing_trace import RoutingTrace

Floats = npt.NDArray[np.float64]
_GOLDEN, _PLASTIC = 0.6180339887498949, 0.7548776662466927  # strides of a low-discrepancy sequence


@dataclass(frozen=True, slots=True)
class LayerScore:
    """Of one layer, per token. `gpu_load` is the busiest GPU's rows over the mean of all GPUs."""

    link_s: float  # busiest link
    rows: float  # rows between nodes, each once per destination
    unicast_rows: float  # the same with one copy per expert
    gpu_load: float


@dataclass(frozen=True, slots=True)
class Score:
    """Means over layers; `total_gpu_load` is the busiest GPU's rows over all layers against the mean."""

    link_s: float
    rows: float
    unicast_rows: float
    gpu_load: float
    total_gpu_load: float


def replica_shares(nodes: Sequence[int], sources: Floats) -> Floats:
    """[sources, replicas]: how a source's tokens divide over the replicas of an expert, which lie on `nodes`.

    The result is shared and cannot be written.
    """
    return _shares(tuple(nodes), tuple(sources.tolist()))


@functools.lru_cache(1 << 14)  # layers of a plan ask for the same
def _shares(nodes: tuple[int, ...], weights: tuple[float, ...]) -> Floats:
    sources = np.asarray(weights)
    local = np.asarray([[float(node == s) for node in nodes] for s in range(len(sources))])
    held = local.sum(axis=1, keepdims=True)
    shares = np.divide(local, held, out=np.zeros_like(local), where=held > 0)
    away = held[:, 0] == 0
    base = sources @ shares
    fill = _level(base, float(sources[away].sum()))
    total = fill.sum()
    shares[away] = fill / total if total > 0 else 1 / len(nodes)
    shares.flags.writeable = False
    return np.asarray(shares)


def _level(base: Floats, amount: float) -> Floats:
    """What to add to each of `base`, `amount` in all, so that the largest is as small as possible."""
    order = np.sort(base)
    level = 0.0
    for count in range(1, len(order) + 1):
        level = (amount + order[:count].sum()) / count
        if count == len(order) or level <= order[count]:
            break
    return np.maximum(level - base, 0.0)


def score_layer(
    holders: Layer, nodes: tuple[int, ...], ids: npt.NDArray[np.int16], links: Links
) -> LayerScore:
    """One layer of a plan on `ids` [tokens, top_k]."""
    num_nodes = len(links.sources)
    rows = node_rows(holders, nodes, ids, links.sources)
    load = np.bincount(ids.ravel(), minlength=len(holders)) / len(ids)
    pairs, total = worker_loads(holders, nodes, load, links.sources)
    mean = total.sum() / max(1, len(total))
    away = 1 - np.eye(num_nodes)
    return LayerScore(
        link_s=float(links.loads(rows).max(initial=0.0)),
        rows=float((rows * away).sum()),
        unicast_rows=float((pairs * away).sum()),
        gpu_load=float(total.max() / mean),
    )


def node_rows(
    holders: Layer, nodes: tuple[int, ...], ids: npt.NDArray[np.int16], sources: Floats
) -> Floats:
    """[source, destination] rows per token, each once per destination, weighted by where tokens start."""
    num_nodes, num_tokens = len(sources), len(ids)
    most = max(map(len, holders))
    places = np.asarray([[nodes[w[min(i, len(w) - 1)]] for i in range(most)] for w in holders])
    if most == 1:
        return np.outer(sources, _touched(places[:, 0][ids], num_nodes) / num_tokens)
    bounds = np.ones((num_nodes, len(holders), most))  # cumulated shares
    for expert, workers in enumerate(holders):
        if len(workers) > 1:
            shares = replica_shares([nodes[w] for w in workers], sources)
            bounds[:, expert, : len(workers)] = shares.cumsum(axis=1)
    tokens = np.arange(num_tokens)[:, None]
    point = (tokens * _GOLDEN + ids * _PLASTIC) % 1.0
    rows = np.zeros((num_nodes, num_nodes))
    for s in sources.nonzero()[0]:
        choice = (point[..., None] >= bounds[s][ids][..., :-1]).sum(axis=2)
        rows[s] = sources[s] * _touched(places[ids, choice], num_nodes) / num_tokens
    return rows


def _touched(wanted: npt.NDArray[np.int64], num_nodes: int) -> Floats:
    """Tokens that need each node, from the node of each of their experts [tokens, top_k]."""
    touched = np.zeros((len(wanted), num_nodes), bool)
    touched[np.arange(len(wanted))[:, None], wanted] = True
    return np.asarray(touched.sum(axis=0), np.float64)


def worker_loads(
    holders: Layer, nodes: tuple[int, ...], load: Floats, sources: Floats
) -> tuple[Floats, Floats]:
    """Pairs per token from node to node, and rows per token of each worker; `load[expert]` is rows per token."""
    pairs, total = np.zeros((len(sources), len(sources))), np.zeros(len(nodes))
    for expert, workers in enumerate(holders):
        if len(workers) == 1:
            pairs[:, nodes[workers[0]]] += sources * load[expert]
            total[workers[0]] += load[expert]
            continue
        shares = replica_shares([nodes[w] for w in workers], sources) * sources[:, None]
        for i, worker in enumerate(workers):
            pairs[:, nodes[worker]] += shares[:, i] * load[expert]
            total[worker] += shares[:, i].sum() * load[expert]
    return pairs, total


def score(plan: Plan, trace: RoutingTrace, links: Links) -> Score:
    """A plan on a trace of the same layers. Raises KeyError for a layer that the plan does not have."""
    layers = [
        score_layer(plan.holders[layer], plan.nodes, ids, links)
        for layer, ids in zip(trace.layers, trace.expert_ids, strict=True)
    ]
    total = np.zeros(len(plan.nodes))
    for layer, load in zip(trace.layers, trace.loads, strict=True):
        total += worker_loads(plan.holders[layer], plan.nodes, load, links.sources)[1]
    mean = {
        name: float(np.mean([getattr(one, name) for one in layers]))
        for name in ("link_s", "rows", "unicast_rows", "gpu_load")
    }
    return Score(**mean, total_gpu_load=float(total.max() / total.mean()))
