"""Which node each item of one layer goes to: a seeded local search by swaps. Pure.

Items are experts or whole expert groups; tokens lie in *lanes* (by the node they start on, or all in one). A node must
be sent a token exactly when it holds one of the token's items, so that n[lane, d], the tokens of a lane that need node
d, decides every link: loads = seconds @ n. The search lowers

    F(n) = the p-norm of the links' loads  +  2 % of their mean,    p = 24, then 100, then 400

a smooth stand-in for "the busiest link, then all rows": a small p sees all busy links, a large one the busiest. What
a swap of items a (node A) and b (node B) changes is estimated for all pairs at once, ignoring tokens that want both;
the most promising are computed exactly, in order, and taken when they lower F. Kicks of a few random swaps leave local
minima. The result depends on the seed alone.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Float32s = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
_NORMS, _MEAN = (24.0, 100.0, 400.0), 0.02
_CANDIDATES, _STARTS = 32, 2


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to search: rounds of estimates for a start, kicks after it with as many swaps and rounds each."""

    rounds: int = 24
    kicks: int = 4
    kick_swaps: int = 3
    kick_rounds: int = 5


class Assignment:
    """Items on nodes, and which tokens need which node.

    `wanted[item, token]` is 0 or 1; `lane[token]`; `seconds[link, lane * nodes + node]` per token of a lane that
    needs the node. `load[item]` and `cap[node]` bound swaps: none may take a node above its cap, nor further above.
    `fixed[token, node]` counts items that stay where they are.
    """

    def __init__(
        self, wanted: Float32s, lane: Ints, seconds: Floats, load: Floats, cap: Floats, fixed: Ints,
        fits: npt.NDArray[np.bool_],
    ) -> None:  # fmt: skip
        self.wanted, self.lane, self.seconds, self.load, self.cap = wanted, lane, seconds, load, cap
        self.fixed, self.fits = fixed, fits
        self.num_nodes = len(cap)
        self.tokens = [row.nonzero()[0] for row in wanted]

    def place(self, node: Ints) -> None:
        """Start from `node[item]`."""
        self.node = node.copy()
        self.count = self.fixed.astype(np.int16)
        for item, tokens in enumerate(self.tokens):
            self.count[tokens, node[item]] += 1
        num_lanes = self.seconds.shape[1] // self.num_nodes
        needed = np.stack(
            [(self.count[self.lane == lane] > 0).sum(axis=0) for lane in range(num_lanes)]
        ).astype(np.float64)
        self.touches = needed.ravel()
        self.node_load = np.bincount(node, self.load, minlength=self.num_nodes)

    def objective(self, touches: Floats, norm: float) -> tuple[float, Floats]:
        """F for one p, and its gradient by lane and node."""
        loads = self.seconds @ touches
        peak = loads.max(initial=0.0)
        if peak <= 0:
            return 0.0, np.zeros(len(touches))
        ratio = (loads / peak) ** (norm - 1)
        value = (ratio * loads / peak).sum() ** (1 / norm)
        slope = ratio * value ** (1 - norm) + _MEAN / len(loads)
        return float(peak * value + _MEAN * loads.mean()), slope @ self.seconds

    def candidates(self, gradient: Floats) -> list[tuple[int, int]]:
        """The most promising swaps, best first."""
        node, nodes, items = self.node, self.num_nodes, len(self.node)
        value = gradient.reshape(-1, nodes)[self.lane].astype(np.float32)
        flags = np.concatenate([(self.count == 0) * value, (self.count == 1) * value], axis=1)
        sums = self.wanted @ flags
        arrives = sums[:, :nodes][
            :, node
        ]  # [item, whose place it takes]: what its tokens add there
        leaves = sums[
            np.arange(items), nodes + node
        ]  # tokens that need the item's node for it alone
        estimate = arrives + arrives.T - leaves[:, None] - leaves[None, :]
        moved = self.load[:, None] - self.load[None, :]
        bad = (self.node_load[node][None, :] + moved > self.cap[node][None, :]) & (moved > 0)
        bad |= ~self.fits[:, node]
        estimate[bad | bad.T | (node[:, None] == node[None, :])] = np.inf
        estimate[np.tril_indices(items)] = np.inf
        flat = estimate.ravel()
        best = np.argpartition(flat, min(_CANDIDATES, flat.size - 1))[:_CANDIDATES]
        best = best[np.argsort(flat[best], kind="stable")]
        return [divmod(int(i), items) for i in best if flat[i] < 0]

    def allowed(self, a: int, b: int) -> bool:
        """Whether the nodes' caps allow a swap."""
        for item, other in ((a, b), (b, a)):
            moved = self.load[item] - self.load[other]
            target = self.node[other]
            above = moved > 0 and self.node_load[target] + moved > self.cap[target]
            if above or not self.fits[item, target]:
                return False
        return bool(self.node[a] != self.node[b])

    def touches_after(self, a: int, b: int) -> Floats:
        """`touches` if a and b changed places."""
        touches = self.touches.copy()
        by_lane = touches.reshape(-1, self.num_nodes)
        for item, other in ((a, b), (b, a)):
            here, there = self.node[item], self.node[other]
            tokens = self.tokens[item]
            tokens = tokens[self.wanted[other, tokens] == 0]
            count, lane = self.count[tokens], self.lane[tokens]
            by_lane[:, here] -= np.bincount(lane[count[:, here] == 1], minlength=len(by_lane))
            by_lane[:, there] += np.bincount(lane[count[:, there] == 0], minlength=len(by_lane))
        return touches

    def swap(self, a: int, b: int, touches: Floats) -> None:
        """Change places; `touches` is what `touches_after` said."""
        for item, other in ((a, b), (b, a)):
            here, there = self.node[item], self.node[other]
            self.count[self.tokens[item], here] -= 1
            self.count[self.tokens[item], there] += 1
            self.node_load[here] -= self.load[item]
            self.node_load[there] += self.load[item]
        self.node[a], self.node[b] = self.node[b], self.node[a]
        self.touches = touches

    def descend(self, rounds: int, norms: tuple[float, ...] = _NORMS) -> float:
        """Take improving swaps, for each p until there are none or `rounds` are over. Returns F for the last p."""
        value = 0.0
        for norm in norms:
            value, gradient = self.objective(self.touches, norm)
            for _ in range(rounds):
                before = value
                for a, b in self.candidates(gradient):
                    if not self.allowed(a, b):
                        continue
                    touches = self.touches_after(a, b)
                    after, _ = self.objective(touches, norm)
                    if after < value:
                        self.swap(a, b, touches)
                        value = after
                if value >= before:
                    break
                gradient = self.objective(self.touches, norm)[1]
        return value


def search(
    assignment: Assignment, starts: list[Ints], budget: Budget, rng: np.random.Generator
) -> Ints:
    """The best `node[item]` found: the most promising starts descended, then the best kicked."""
    best, best_node = np.inf, starts[0]
    values = []
    for start in starts:
        assignment.place(start)
        values.append(assignment.objective(assignment.touches, _NORMS[0])[0])
    for i in np.argsort(values, kind="stable")[:_STARTS].tolist():
        assignment.place(starts[i])
        value = assignment.descend(budget.rounds)
        if value < best:
            best, best_node = value, assignment.node.copy()
    for _ in range(budget.kicks if len(best_node) > 1 else 0):
        assignment.place(best_node)
        for a, b in rng.integers(0, len(best_node), (budget.kick_swaps, 2)).tolist():
            if assignment.allowed(a, b):
                assignment.swap(a, b, assignment.touches_after(a, b))
        value = assignment.descend(budget.kick_rounds, _NORMS[-1:])
        if value < best:
            best, best_node = value, assignment.node.copy()
    return best_node
