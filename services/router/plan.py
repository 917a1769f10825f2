"""How a block is divided: by node at its source, by expert worker at its node. Pure index arithmetic, in numpy; what
every pair passes is in C as well (`plan.c`).

A *pair* is (row, expert, gate weight). Pairs are always sorted by row, then by ascending expert id: that order is the
order of the weighted sum, so the result does not depend on who answers first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from common.compiled import compiled
from common.errors import WireError
from common.wire.blocks import SECTION, RowType, num_scales
from services.router.tables import Tables, tables_of

_compiled = compiled(Path(__file__).with_name("plan.c"))  # None: numpy alone
_NOT_HELD = "a RELAY for experts that this node does not hold"

Ints = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(slots=True)
class BlockPairs:
    """All of a block, as they came: `experts` of its rows, in any order, and `weights`, [num_rows, top_k] each."""

    experts: Int32s
    weights: Floats


@dataclass(slots=True)
class NodeShare:
    """What one node does for a block. `rows` [num_rows] are ascending indices into the block's rows."""

    node: int
    rows: Int32s
    num_pairs: int
    tail: bytes  # what follows the rows in the RELAY: its pairs

    @classmethod
    def of(
        cls, node: int, rows: Ints | Int32s, pair_rows: Int32s, experts: Int32s, weights: Floats
    ) -> Self:
        """Pairs [num_pairs] of `pair_rows`, which index `rows`; see the properties."""
        sections = (part.tobytes() for part in (pair_rows, experts, weights))
        tail = b"".join(part + bytes(-len(part) % SECTION) for part in sections)
        return cls(node, rows.astype(np.int32), len(pair_rows), tail)

    @property
    def pair_rows(self) -> Int32s:
        """Which of `rows` each pair has, ascending, a view."""
        return np.frombuffer(self.tail, np.int32, self.num_pairs)

    @property
    def experts(self) -> Int32s:
        """Ascending within a row, a view."""
        return np.frombuffer(self.tail, np.int32, self.num_pairs, len(self.tail) // 3)

    @property
    def weights(self) -> Floats:
        """A view."""
        return np.frombuffer(self.tail, np.float32, self.num_pairs, len(self.tail) // 3 * 2)


@dataclass(slots=True)
class WorkerShare:
    """What one expert worker does for a block: places `start` to `stop` of the fan-out."""

    worker: int
    start: int
    stop: int
    num_segments: int
    tail: bytes  # what follows the rows in the EXPERT_IN: its segments; in an EXPERT_PICK: and its picks

    @classmethod
    def of(cls, worker: int, start: int, stop: int, segments: Int32s) -> Self:
        """`segments` [num_experts_hit, 2]: expert id, number of rows; ascending."""
        tail = segments.tobytes()
        return cls(worker, start, stop, len(segments), tail + bytes(-len(tail) % SECTION))

    def pick(self, index: Int32s, of_block: int) -> None:
        """Make it an EXPERT_PICK: place i is row index[i] of a block of so many rows."""
        picks = np.array([of_block, *index[self.start : self.stop]], np.int32).tobytes()
        self.tail += picks + bytes(-len(picks) % SECTION)

    @property
    def segments(self) -> Int32s:
        """A view."""
        return np.frombuffer(self.tail, np.int32, 2 * self.num_segments).reshape(-1, 2)


@dataclass(slots=True)
class FanOut:
    """A node's pairs in the order in which they are sent: by worker, expert, row.

    In `tables` the index is of the block's rows, and a piece is the rows of a share; slots have each row's pairs in
    ascending expert id, which is the order of the weighted sum.
    """

    shares: list[WorkerShare]
    tables: Tables


def check_experts(experts: Int32s, num_experts: int) -> None:
    """Raise WireError for an expert id that the model does not have."""
    if experts.size and int(experts.view(np.uint32).max()) >= num_experts:  # negative ids are huge
        raise WireError(f"expert id outside 0..{num_experts - 1}")


def split_by_node(experts: Int32s, weights: Floats, nodes: Int32s) -> list[NodeShare]:
    """Divide a block by destination node, ascending; nodes that get nothing are absent.

    `experts` and `weights` are [num_rows, top_k]; `nodes` [num_experts] says who computes an expert's pairs (negative:
    not ours to send). Raises WireError for an expert id that the model does not have.
    """
    if _compiled is not None:
        try:
            found = _compiled.split(experts, weights, nodes, experts.shape[1])
        except ValueError as exc:
            raise WireError(str(exc)) from exc
        return [
            NodeShare(node, np.frombuffer(rows, np.int32), num_pairs, tail)
            for node, rows, num_pairs, tail in found
        ]
    rows, pair_rows, firsts = _rows_of_pairs(*experts.shape)
    check_experts(experts, len(nodes))
    order = (experts.argsort(axis=1, kind="stable") + firsts).ravel()
    ids = experts.take(order)
    return split_pairs(rows, pair_rows, ids, weights.take(order), nodes.take(ids))


@lru_cache(maxsize=256)
def _rows_of_pairs(num_rows: int, top_k: int) -> tuple[Ints, Int32s, Ints]:
    """Every row, the row of every pair, and each row's first pair as a column: the same for all blocks of a size.

    Nobody writes to them.
    """
    rows = np.arange(num_rows)
    return rows, rows.astype(np.int32).repeat(top_k), rows[:, None] * top_k


def split_unicast(home: int, experts: Int32s, weights: Floats, nodes: Int32s) -> list[NodeShare]:
    """`split_by_node`, but what leaves node `home` goes in shares of one expert each, a copy of each row per expert.

    So nothing that crosses nodes is de-duplicated or summed: the baseline.
    """
    shares = []
    for s in split_by_node(experts, weights, nodes):
        if s.node == home:
            shares.append(s)
            continue
        parts = split_pairs(s.rows, s.pair_rows, s.experts, s.weights, s.experts)
        shares += [replace(part, node=s.node) for part in parts]
    return shares


def split_share(share: NodeShare, nodes: Int32s) -> list[NodeShare]:
    """Divide one node's share anew; `nodes` [num_pairs] says who computes each of its pairs now."""
    return split_pairs(share.rows, share.pair_rows, share.experts, share.weights, nodes)


def split_pairs(
    rows: Ints | Int32s, pair_rows: Int32s, experts: Int32s, weights: Floats, nodes: Int32s
) -> list[NodeShare]:
    """Divide sorted pairs by node, ascending; `pair_rows` index `rows`, each of which has a pair.

    Pairs of node NOT_OURS (-1) are left out.
    """
    first = int(nodes.min())
    if first >= 0 and first == int(nodes.max()):  # all for one node, and every row has pairs
        return [NodeShare.of(first, rows, pair_rows, experts, weights)]
    order = (nodes + 1).astype(np.uint16).argsort(kind="stable")[np.count_nonzero(nodes < 0) :]
    of_pairs, homes = pair_rows.take(order), nodes.take(order)
    cut = homes[1:] != homes[:-1]
    is_first = np.ones(len(order), np.bool_)  # of its row in a share
    np.logical_or(cut, of_pairs[1:] != of_pairs[:-1], out=is_first[1:])
    nth = is_first.cumsum(dtype=np.int32)  # row of all shares, from 1
    chosen, ids, factors = rows.take(of_pairs[is_first]), experts.take(order), weights.take(order)
    bounds = [*is_first[:1].nonzero()[0], *(cut.nonzero()[0] + 1), len(order)]
    shares = []
    for a, b in pairwise(bounds):
        part, first = nth[a:b], nth[a]
        of_share = chosen[first - 1 : part[-1]]
        shares.append(NodeShare.of(int(homes[a]), of_share, part - first, ids[a:b], factors[a:b]))
    return shares


def check_pairs(pair_rows: Int32s, experts: Int32s, *, num_rows: int, num_experts: int) -> None:
    """Raise WireError unless pairs received from another router are in range and in order."""
    if pair_rows.size == 0:
        raise WireError("a RELAY without pairs")
    if int(pair_rows.min()) < 0 or int(pair_rows.max()) >= num_rows:
        raise WireError(f"pair row outside 0..{num_rows - 1}")
    check_experts(experts, num_experts)
    key = pair_rows.astype(np.int64) * num_experts + experts
    if (np.diff(key) < 0).any():
        raise WireError("pairs are not sorted by row and expert")


def fan_out(
    pairs: NodeShare | BlockPairs, workers: Int32s, width: int, row_type: RowType, of_block: int = 0
) -> FanOut:
    """Divide a node's pairs by expert worker; every row has at least one pair.

    `workers` [num_experts] says who computes an expert's pairs. Raises WireError where it says nobody, or the model has
    no such expert. With `of_block`, the number of rows of the block, each share picks from them.
    """
    if _compiled is not None:
        return _fan_out_compiled(pairs, workers, width, row_type, of_block)
    if isinstance(pairs, BlockPairs):
        (share,) = split_by_node(pairs.experts, pairs.weights, np.zeros(len(workers), np.int32))
    else:
        share = pairs
    experts = share.experts
    of_pairs = workers.take(experts)
    if int(of_pairs.min()) < 0:
        raise WireError(_NOT_HELD)
    order = _radix_order(of_pairs, experts)  # rows stay ascending within an expert
    hit, ids = of_pairs.take(order), experts.take(order)
    is_first = np.empty(len(order), np.bool_)
    is_first[0] = True
    np.not_equal(ids[1:], ids[:-1], out=is_first[1:])
    starts = is_first.nonzero()[0]
    table = np.empty((len(starts), 2), np.int32)
    table[:, 0] = ids.take(starts)
    table[:-1, 1] = starts[1:] - starts[:-1]
    table[-1, 1] = len(order) - starts[-1]
    slots, weights = _slot_table(share.pair_rows, share.weights, order, len(share.rows))
    shares = _worker_shares(hit.take(starts), starts, len(order), table)
    index, spans = share.rows.take(share.pair_rows.take(order)), [(s.start, s.stop) for s in shares]
    if of_block:
        for part in shares:
            part.pick(index, of_block)
    return FanOut(shares, tables_of(index, spans, width, row_type, slots, weights))


def _fan_out_compiled(
    pairs: NodeShare | BlockPairs, workers: Int32s, width: int, row_type: RowType, of_block: int
) -> FanOut:
    assert _compiled is not None, "no compiler"
    sizes = *row_sizes(width, row_type), of_block
    try:
        if isinstance(pairs, BlockPairs):
            num_rows, top_k = pairs.experts.shape
            num_pairs = num_rows * top_k
            divided = _compiled.fan_out_block(pairs.experts, pairs.weights, top_k, workers, *sizes)
        else:
            num_rows, num_pairs = len(pairs.rows), pairs.num_pairs
            divided = _compiled.fan_out(pairs.tail, num_pairs, workers, pairs.rows, *sizes)
    except ValueError as exc:
        check_experts(pairs.experts, len(workers))
        raise WireError(f"{_NOT_HELD}: {exc}") from exc
    return as_plan(divided, num_pairs, num_rows)


def as_plan(divided: tuple[Any, ...], num_pairs: int, num_rows: int) -> FanOut:
    """What `divide` in C gives for so many pairs of so many rows."""
    memory, ats, most, cuts, nbytes = divided
    shares, pieces = [WorkerShare(*share) for share, _ in cuts], [piece for _, piece in cuts]
    return FanOut(shares, Tables(memory, ats, num_pairs, (num_rows, most), True, pieces, nbytes))


def row_sizes(width: int, row_type: RowType) -> tuple[int, int]:
    """Bytes of a row and of its scales."""
    return width * int(row_type), num_scales(width) * 4 if row_type is RowType.FP8 else 0


def _radix_order(major: Int32s, minor: Int32s) -> Ints:
    """Stable order by `major`, then `minor`: two passes of numpy's radix sort, which 16-bit numbers get.

    6 us each for 1,024 pairs, where a comparison sort of 64-bit keys takes 65 (AMD EPYC).
    """
    order = minor.astype(np.uint16).argsort(kind="stable")
    return order.take(major.astype(np.uint16).take(order).argsort(kind="stable"))


def _worker_shares(workers: Int32s, starts: Ints, end: int, table: Int32s) -> list[WorkerShare]:
    """One share per run of equal `workers`, [num_segments]; segment i has the places from starts[i] on."""
    cuts = [0, *((workers[1:] != workers[:-1]).nonzero()[0] + 1).tolist()]
    bounds = [*starts.take(cuts).tolist(), end]
    ends = [*cuts[1:], len(workers)]
    return [
        WorkerShare.of(worker, bounds[i], bounds[i + 1], table[cuts[i] : ends[i]])
        for i, worker in enumerate(workers.take(cuts).tolist())
    ]


def side_by_side(parts: Sequence[Int32s], width: int, row_type: RowType, slots: Int32s) -> Tables:
    """A message for each of `parts`, indices of its rows, in places one behind the other; plain sums by `slots`."""
    if _compiled is not None:
        memory, ats, pieces, nbytes = _compiled.side_by_side(
            parts, slots, *row_sizes(width, row_type)
        )
        num_places, shape = sum(map(len, parts)), (slots.shape[0], slots.shape[1])
        return Tables(memory, ats, num_places, shape, False, pieces, nbytes)
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    index = np.concatenate([np.empty(0, np.int32), *parts])
    return tables_of(index, pairwise(ends), width, row_type, slots)


def sum_table(rows: Sequence[Int32s], starts: list[int], num_rows: int) -> Int32s:
    """Where each row's partials lie, in the order of the sum: int32 [num_rows, k], -1 beyond a row's last.

    Share j has the partials of rows[j], from place starts[j] on; shares are in the order of the sum. k is a power of
    two, so that few kernels are compiled.
    """
    if _compiled is not None:
        memory, most = _compiled.sum_table(rows, starts, num_rows)
        return np.frombuffer(memory, np.int32).reshape(num_rows, most)
    counts = [len(part) for part in rows]
    every = np.concatenate(rows)
    ends = np.cumsum(counts)
    places = np.repeat(np.array(starts) - ends + counts, counts) + np.arange(len(every))
    order = every.astype(np.uint16 if num_rows < 1 << 16 else np.int64).argsort(kind="stable")
    per_row = np.bincount(every, minlength=num_rows)
    rank = np.arange(len(every)) - np.repeat(per_row.cumsum() - per_row, per_row)
    slots = np.full((num_rows, 1 << (int(per_row.max()) - 1).bit_length()), -1, np.int32)
    slots[every.take(order), rank] = places.take(order)
    return slots


def divide_share(share: WorkerShare, workers: Int32s) -> list[WorkerShare]:
    """Divide one worker's share anew, segment by segment; `workers` [num_segments] says who computes each now."""
    counts = share.segments[:, 1].astype(np.int64)
    starts = share.start + counts.cumsum() - counts
    return _worker_shares(workers, starts, share.stop, share.segments)


def _slot_table(
    pair_rows: Int32s, weights: Floats, order: Ints, num_rows: int
) -> tuple[Int32s, Floats]:
    places = np.empty(len(order), np.int32)
    places[order] = np.arange(len(order), dtype=np.int32)
    counts = np.bincount(pair_rows, minlength=num_rows)
    most = int(counts.max())
    if most * num_rows == len(order):  # as many for every row, as where a node has all experts
        # a copy: a RELAY's weights lie in its payload, which is given back before the sum
        return places.reshape(num_rows, most), weights.reshape(num_rows, most).copy()
    rank = np.arange(len(pair_rows)) - (counts.cumsum() - counts)[pair_rows]
    slots = np.full((num_rows, most), -1, np.int32)
    slots[pair_rows, rank] = places
    slot_weights = np.zeros(slots.shape, np.float32)
    slot_weights[pair_rows, rank] = weights
    return slots, slot_weights
