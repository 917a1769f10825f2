"""Which nodes the copies of one layer's items go to: a seeded local search. Pure.

Items are experts or whole expert groups, each with one copy or more (replicas). A row is a token that starts in a
*lane*: on one source node, or, where no item has replicas, on all at once. It needs node d unless all its items are had
elsewhere, with probability 1 - prod(1 - share[item, lane, d]) (`score.replica_shares`): exact where items have one
copy, the mean over the router's choices otherwise. touches[lane, d], the share of a lane's rows that need node d,
decides every link: loads = seconds @ touches. The search lowers

    F = the p-norm of the links' loads  +  2 % of their mean,    p = 24, then 100, then 400 (of many nodes 4 first)

a smooth stand-in for "the busiest link, then all rows": a small p sees all busy links, a large one the busiest. A move
exchanges two copies between nodes, moves one to a free slot, or gives one item's copy up for another item's. F's
gradient says what each is worth, all at once, ignoring rows that want both items; the most promising are computed
exactly, in order, and taken when they lower F. Kicks of a few random exchanges leave local minima. The result depends
on the seed alone.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.placement.score import replica_shares

Floats = npt.NDArray[np.float64]
Float32s = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Nodes = tuple[int, ...]  # of an item's copies, ascending; a node twice where it has two
Change = list[tuple[int, Nodes]]  # items and the nodes that they are to have
_NORMS, _MEAN = (24.0, 100.0, 400.0), 0.02
_MANY_NODES, _WIDE_NORM = 9, 4.0  # so many have so many busy links
_CANDIDATES, _TINY = 32, 1e-6
_SLACK, _GAIN = 1 + 1e-9, 1 - 1e-6


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to search: rounds of estimates for a start, kicks after it with as many swaps and rounds each."""

    rounds: int = 24
    kicks: int = 4
    kick_swaps: int = 3
    kick_rounds: int = 5


@dataclass(frozen=True, slots=True)
class Limits:
    """What nodes can take: `room[node]` copies, `cap[node]` rows per token in all.

    A copy of an item may bear `heaviest[item]` rows per token, times `speed[node]` of its GPU. `load[item]` is the
    item's. What is above a limit may stay there, but may not grow.
    """

    room: Ints
    cap: Floats
    load: Floats
    heaviest: Floats
    speed: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """What follows from the nodes of an item's copies.

    `share[lane, node]`: of its rows; `log`: of 1 - share; `own[node]`: of all its rows; `peak`: the largest share of
    one copy, over its GPU's speed; `count[node]` of copies.
    """

    share: Floats
    log: Float32s
    own: Floats
    peak: float
    count: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """`ids` [rows, k] are the items that a row wants, each once, -1 for none; it counts `weight[row]` times."""

    ids: Ints
    lane: Ints
    weight: Ints | Floats


class Assignment:
    """Copies on nodes, and which rows need which node.

    `lanes` are source nodes (None: one lane, the mean of all). `seconds[link, lane, node]`: what a link takes when all
    rows of a lane need a node.
    """

    def __init__(
        self, rows: Rows, lanes: Ints | None, seconds: Floats, sources: Floats, limits: Limits
    ) -> None:
        self.limits, self.sources, self.lanes = limits, sources, lanes
        self.num_items, self.num_nodes = len(limits.load), len(limits.room)
        self.num_lanes = seconds.shape[1]
        self.norms = _NORMS if self.num_nodes < _MANY_NODES else (_WIDE_NORM, *_NORMS)
        self.seconds = seconds.reshape(len(seconds), self.num_lanes * self.num_nodes)
        self.ids, self.lane = np.where(rows.ids < 0, self.num_items, rows.ids), rows.lane
        in_lane = (rows.lane == np.arange(self.num_lanes)[:, None]) * rows.weight
        total = np.maximum(in_lane.sum(axis=1, keepdims=True), 1)
        self.weight = (in_lane / total).astype(np.float32)  # [lanes, rows]
        self._held: dict[Nodes, Held] = {}
        self._near: dict[tuple[Nodes, int], tuple[Floats, Floats]] = {}
        self._index()

    def _index(self) -> None:
        """Rows by item, and by item and lane."""
        rows, width = self.ids.shape
        key = (self.ids * self.num_lanes + self.lane[:, None]).ravel()
        order = np.argsort(key, kind="stable")
        order = order[: np.searchsorted(key[order], self.num_items * self.num_lanes)]
        self.pair_row, self.pair_key = order // width, key[order]
        self.keys, self.starts = np.unique(self.pair_key, return_index=True)
        bounds = np.searchsorted(self.pair_key, np.arange(self.num_items + 1) * self.num_lanes)
        self.rows = [self.pair_row[a:b] for a, b in itertools.pairwise(bounds)]
        self.wants = np.zeros((self.num_items + 1, rows), np.bool_)
        self.wants[self.ids, np.arange(rows)[:, None]] = True
        self.pair_weight = self.weight.sum(axis=0)[self.pair_row, None]

    def held(self, nodes: Nodes) -> Held:
        """What these nodes mean for an item."""
        found = self._held.get(nodes)
        if found is None:
            shares = replica_shares(nodes, self.sources)
            per_copy = self.sources @ shares
            by_node = np.eye(self.num_nodes)[list(nodes)]
            share = (
                (per_copy @ by_node)[None] if self.lanes is None else (shares @ by_node)[self.lanes]
            )
            log = np.log(np.maximum(1 - share, _TINY)).astype(np.float32)
            peak = float((per_copy / self.limits.speed[list(nodes)]).max())
            count = np.bincount(nodes, minlength=self.num_nodes)
            found = self._held[nodes] = Held(share, log, per_copy @ by_node, peak, count)
        return found

    def near(self, nodes: Nodes, less: int) -> tuple[Floats, Floats]:
        """(shares [nodes, lanes, nodes], peaks [nodes]) after one copy more on each node, and one less on `less`.

        `less` is -1 for none.
        """
        found = self._near.get((nodes, less))
        if found is None:
            after = [self.held(replaced(nodes, less, node)) for node in range(self.num_nodes)]
            found = np.stack([a.share for a in after]), np.asarray([a.peak for a in after])
            self._near[nodes, less] = found
        return found

    def place(self, nodes: list[Nodes]) -> None:
        """Start from `nodes[item]`."""
        self.nodes = list(nodes)
        logs = np.zeros((self.num_items + 1, self.num_lanes, self.num_nodes), np.float32)
        own = np.empty((self.num_items, self.num_nodes))
        for item, where in enumerate(nodes):
            logs[item], own[item] = self.held(where).log, self.held(where).own
        self.log = np.zeros((len(self.lane), self.num_nodes), np.float32)
        for column in self.ids.T:
            self.log += logs[column, self.lane]
        self.touches = (self.weight @ (1 - np.exp(self.log))).astype(np.float64)
        self.node_load = self.limits.load @ own
        counts = np.bincount([n for where in nodes for n in where], minlength=self.num_nodes)
        self.free = self.limits.room - counts

    def fits(self) -> bool:
        """Whether nothing is above its limit."""
        peaks = np.asarray([self.held(where).peak for where in self.nodes])
        light = (self.limits.load * peaks <= self.limits.heaviest * _SLACK).all()
        return bool(light and (self.node_load <= self.limits.cap * _SLACK).all())

    def objective(self, touches: Floats, norm: float) -> tuple[float, Floats]:
        """F for one p, and its gradient [lanes, nodes]."""
        loads = self.seconds @ touches.ravel()
        peak = loads.max(initial=0.0)
        if peak <= 0:
            return 0.0, np.zeros_like(touches)
        ratio = (loads / peak) ** (norm - 1)
        value = (ratio * loads / peak).sum() ** (1 / norm)
        slope = ratio * value ** (1 - norm) + _MEAN / len(loads)
        gradient = (slope @ self.seconds).reshape(touches.shape)
        return float(peak * value + _MEAN * loads.mean()), gradient

    def worth(self, gradient: Floats) -> Floats:
        """[items, lanes, nodes]: dF per share of an item that is had from a node."""
        logs = np.stack([self.held(where).log for where in self.nodes]).reshape(-1, self.num_nodes)
        rest = np.exp(self.log[self.pair_row] - logs[self.pair_key]) * self.pair_weight
        sums = np.zeros((self.num_items * self.num_lanes, self.num_nodes))
        if len(self.keys):
            sums[self.keys] = np.add.reduceat(rest, self.starts, axis=0)
        return np.asarray(sums.reshape(self.num_items, self.num_lanes, self.num_nodes) * gradient)

    def candidates(self, gradient: Floats) -> list[Change]:
        """The most promising moves, best first."""
        worth = self.worth(gradient).reshape(self.num_items, -1)
        peaks = np.asarray([self.held(where).peak for where in self.nodes])
        # what is above the limit may bear as much as now
        most = np.maximum(self.limits.heaviest, self.limits.load * peaks) * _SLACK
        alike: dict[Nodes, list[int]] = {}
        for i, where in enumerate(self.nodes):
            alike.setdefault(where, []).append(i)
        replicas = sum(map(len, self.nodes)) > self.num_items
        copies: list[tuple[int, int]] = []  # (item, node)
        moved, lost = [], []
        gained = np.full((self.num_items, self.num_nodes), np.inf)

        def gain(items: list[int], now: Held, shares: Floats, peaks: Floats) -> Floats:
            """[items, choices]"""
            found = worth[items] @ (shares - now.share).reshape(len(shares), -1).T
            found[self.limits.load[items, None] * peaks > most[items, None]] = np.inf
            return np.asarray(found)

        for where, items in alike.items():
            now = self.held(where)
            if replicas:
                gained[items] = gain(items, now, *self.near(where, -1))
            for node in dict.fromkeys(where):
                copies += [(i, node) for i in items]
                moved.append(gain(items, now, *self.near(where, node)))
                if len(where) > 1:
                    rest = self.held(minus(where, node))
                    lost.append(gain(items, now, rest.share[None], np.asarray([rest.peak]))[:, 0])
                else:
                    lost.append(np.full(len(items), np.inf))
        item, node = np.asarray(copies).T
        found = [
            *self._exchanges(item, node, np.concatenate(moved)),
            *self._transfers(item, node, np.concatenate(lost), gained),
        ]
        found.sort(key=lambda one: one[0])
        return [change for _, change in found[:_CANDIDATES]]

    def _exchanges(self, item: Ints, node: Ints, moved: Floats) -> Iterator[tuple[float, Change]]:
        """Two copies change places, or one goes to a free slot."""
        estimate = moved[:, node]
        estimate = estimate + estimate.T
        weight = self.limits.load[item] / np.asarray([len(self.nodes[i]) for i in item])
        more = weight[:, None] - weight[None, :]
        over = (self.node_load[node][None, :] + more > self.limits.cap[node][None, :]) & (more > 0)
        same = (node[:, None] == node) | (item[:, None] == item)
        estimate[over | over.T | same | np.tri(len(item), dtype=np.bool_)] = np.inf
        for value, a, b in _smallest(estimate):
            yield value, self._exchange(int(item[a]), int(node[a]), int(item[b]), int(node[b]))
        alone = np.where(
            (self.free > 0) & (np.arange(self.num_nodes) != node[:, None]), moved, np.inf
        )
        for value, a, there in _smallest(alone):
            yield value, [(int(item[a]), replaced(self.nodes[item[a]], int(node[a]), there))]

    def _exchange(self, a: int, here: int, b: int, there: int) -> Change:
        return [
            (a, replaced(self.nodes[a], here, there)),
            (b, replaced(self.nodes[b], there, here)),
        ]

    def _transfers(
        self, item: Ints, node: Ints, lost: Floats, gained: Floats
    ) -> Iterator[tuple[float, Change]]:
        """A copy of one item makes room for a copy of another."""
        estimate = lost[:, None] + gained[:, node].T
        estimate[np.arange(len(item)), item] = np.inf
        for value, c, other in _smallest(estimate):
            i, n = int(item[c]), int(node[c])
            yield value, [(i, minus(self.nodes[i], n)), (other, plus(self.nodes[other], n))]

    def allowed(self, change: Change) -> bool:
        """Whether there are slots for it, and GPUs and nodes bear it."""
        load, node_load, free = self.limits.load, self.node_load.copy(), self.free.copy()
        for item, where in change:
            before, after = self.held(self.nodes[item]), self.held(where)
            free += before.count - after.count
            most = max(self.limits.heaviest[item], load[item] * before.peak)
            if load[item] * after.peak > most * _SLACK:
                return False
            node_load += load[item] * (after.own - before.own)
        light = node_load <= np.maximum(self.limits.cap, self.node_load) * _SLACK
        return bool(light.all() and (free >= 0).all())

    def after(self, change: Change) -> tuple[Ints, Float32s, Floats]:
        """(rows that it concerns, their `log` and `touches` then)."""
        rows = self.rows[change[0][0]]
        for item, _ in change[1:]:
            rows = np.concatenate(
                [rows, self.rows[item][~self.wants[change[0][0], self.rows[item]]]]
            )
        lane = self.lane[rows]
        before = self.log[rows]
        log = before.copy()
        for item, where in change:
            step = self.held(where).log - self.held(self.nodes[item]).log
            log += step[lane] * self.wants[item, rows][:, None]
        touches = self.touches + self.weight[:, rows] @ (np.exp(before) - np.exp(log))
        return rows, log, touches

    def take(self, change: Change, after: tuple[Ints, Float32s, Floats]) -> None:
        """Make a change; `after` is what `after` said."""
        rows, log, self.touches = after
        self.log[rows] = log
        for item, where in change:
            before, held = self.held(self.nodes[item]), self.held(where)
            self.node_load += self.limits.load[item] * (held.own - before.own)
            self.free += before.count - held.count
            self.nodes[item] = where

    def descend(self, rounds: int, norms: tuple[float, ...]) -> float:
        """Take improving moves, for each p until there are none or `rounds` are over. Returns F for the last p."""
        value = 0.0
        for norm in norms:
            value, gradient = self.objective(self.touches, norm)
            for _ in range(rounds):
                before, changed = value, set[int]()
                for change in self.candidates(gradient):
                    if changed & {item for item, _ in change} or not self.allowed(change):
                        continue
                    after = self.after(change)
                    found, _ = self.objective(after[2], norm)
                    if found < value * _GAIN:
                        self.take(change, after)
                        changed |= {item for item, _ in change}
                        value = found
                if value >= before:
                    break
                gradient = self.objective(self.touches, norm)[1]
        return value

    def kick(self, swaps: int, rng: np.random.Generator) -> None:
        """Some random exchanges."""
        for a, b in rng.integers(0, self.num_items, (swaps, 2)).tolist():
            here, there = (self.nodes[i][int(rng.integers(len(self.nodes[i])))] for i in (a, b))
            change = self._exchange(a, here, b, there)
            if a != b and here != there and self.allowed(change):
                self.take(change, self.after(change))


def replaced(nodes: Nodes, less: int, more: int) -> Nodes:
    """Without a copy on `less` (-1: none), with one on `more`."""
    return plus(nodes if less < 0 else minus(nodes, less), more)


def plus(nodes: Nodes, node: int) -> Nodes:
    return tuple(sorted((*nodes, node)))


def minus(nodes: Nodes, node: int) -> Nodes:
    at = nodes.index(node)
    return nodes[:at] + nodes[at + 1 :]


def _smallest(estimate: Floats) -> Iterator[tuple[float, int, int]]:
    """The most negative entries, with row and column."""
    flat = estimate.ravel()
    if not flat.size:
        return
    best = np.argpartition(flat, min(_CANDIDATES, flat.size - 1))[:_CANDIDATES]
    for i in best[np.argsort(flat[best], kind="stable")].tolist():
        if flat[i] < 0:
            row, column = divmod(i, estimate.shape[1])
            yield float(flat[i]), row, column


def search(
    assignment: Assignment, starts: list[list[Nodes]], budget: Budget, rng: np.random.Generator, worth: float = 1.0,
) -> list[Nodes]:  # fmt: skip
    """The best nodes by item that were found: the most promising start descended, then kicked.

    A start that fits is kept unless F falls below `worth` of what it has.
    """

    def judged(value: float) -> tuple[bool, float]:
        return not assignment.fits(), value

    norms, values = assignment.norms, []
    for start in starts:
        assignment.place(start)
        values.append(judged(assignment.objective(assignment.touches, norms[0])[0]))
    first = starts[values.index(min(values))]
    assignment.place(first)
    kept = judged(assignment.objective(assignment.touches, norms[-1])[0] * worth)
    best, best_nodes = judged(assignment.descend(budget.rounds, norms)), list(assignment.nodes)
    for _ in range(budget.kicks if assignment.num_items > 1 else 0):
        assignment.place(best_nodes)
        assignment.kick(budget.kick_swaps, rng)
        found = judged(assignment.descend(budget.kick_rounds, norms[-1:]))
        if found < best:
            best, best_nodes = found, list(assignment.nodes)
    return best_nodes if best < kept else first
