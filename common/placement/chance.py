"""Which experts a trace has together by chance alone, so that a plan is not made for that. Pure.

How often two experts are wanted together is known from a few tokens only, and the search picks the pairs that look
best: what it gains by noise is lost on the next tokens. So tokens count in part (`share_of_chance`) as copies that keep
every expert's load and every token's groups, but have experts together as chance would (`shuffled`).
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_FITS = 20
_ROUNDS = 6  # per expert of a token


def share_of_chance(ids: Ints, num_experts: int, num_groups: int) -> float:
    """How much of what pairs of experts deviate by from chance is noise: 0 to 1, for ids [tokens, top_k].

    By chance a pair has a_i * a_j * b[group of i, group of j] tokens, fitted to the loads of experts and of pairs of
    groups; counts have as much variance as they are large.
    """
    wanted = np.zeros((len(ids), num_experts), np.float32)
    wanted[np.arange(len(ids))[:, None], ids] = 1
    counts = (wanted.T @ wanted).astype(np.float64)
    np.fill_diagonal(counts, 0)
    groups = np.eye(num_groups).repeat(num_experts // num_groups, axis=0)
    fit = 1 - np.eye(num_experts)
    for _ in range(_FITS):
        fit *= groups @ _ratio(groups.T @ counts @ groups, groups.T @ fit @ groups) @ groups.T
        scale = np.sqrt(_ratio(counts.sum(axis=1), fit.sum(axis=1)))
        fit *= scale[:, None] * scale
    deviation = ((counts - fit) ** 2).sum()
    return float(min(fit.sum() / deviation, 1.0)) if deviation else 1.0


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def shuffled(ids: Ints, group_size: int, rng: np.random.Generator) -> Ints:
    """Tokens have exchanged experts of one group with one another, none twice the same: [tokens, top_k], unsorted."""
    ids = ids.copy()
    half = len(ids) // 2
    for _ in range(_ROUNDS * ids.shape[1]):
        a, b = np.split(rng.permutation(len(ids))[: 2 * half], 2)
        at, there = rng.integers(0, ids.shape[1], (2, half))
        mine, theirs = ids[a, at], ids[b, there]
        known = (ids[a] == theirs[:, None]) | (ids[b] == mine[:, None])
        swap = (mine // group_size == theirs // group_size) & ~known.any(axis=1)
        ids[a[swap], at[swap]], ids[b[swap], there[swap]] = theirs[swap], mine[swap]
    return ids
