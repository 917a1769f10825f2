"""Dispatch planning: every pair goes to exactly one place, in the order of the weighted sum."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import WireError
from common.wire.blocks import RowType, expert_pick_layout
from services.router import plan
from services.router.plan import (
    BlockPairs,
    NodeShare,
    WorkerShare,
    check_experts,
    check_pairs,
    divide_share,
    fan_out,
    side_by_side,
    split_by_node,
    split_share,
    split_unicast,
    sum_table,
)
from services.router.routes import NOT_OURS

_C = plan._compiled


@pytest.fixture(autouse=True, scope="module", params=["compiled", "numpy"])
def form(request):
    """Both forms of the arithmetic; here there is a compiler."""
    assert plan._compiled is not None
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(plan, "_compiled", None)
        yield


@st.composite
def blocks(draw):
    num_experts = draw(st.integers(1, 40))
    top_k = draw(st.integers(1, min(8, num_experts)))
    num_rows = draw(st.integers(1, 30))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    experts = np.argsort(rng.random((num_rows, num_experts)), axis=1)[:, :top_k].astype(np.int32)
    weights = rng.random((num_rows, top_k)).astype(np.float32)
    worker_of = rng.integers(0, draw(st.integers(1, num_experts)), num_experts).astype(np.int32)
    node_of_worker = rng.integers(0, draw(st.integers(1, 5)), num_experts).astype(np.int32)
    return experts, weights, worker_of, node_of_worker


@given(blocks())
def test_every_pair_goes_to_one_node_in_order(block):
    experts, weights, worker_of, node_of_worker = block
    node_of_expert = node_of_worker[worker_of]
    seen = {}
    for share in split_by_node(experts, weights, node_of_expert):
        assert (np.diff(share.rows) > 0).all()
        assert set(share.pair_rows.tolist()) == set(
            range(len(share.rows))
        )  # each row once, none unused
        check_pairs(
            share.pair_rows, share.experts, num_rows=len(share.rows), num_experts=len(worker_of)
        )
        for row, expert, weight in zip(
            share.rows[share.pair_rows], share.experts, share.weights, strict=True
        ):
            assert node_of_expert[expert] == share.node
            assert (row, expert) not in seen
            seen[row, expert] = weight
    expected = {
        (row, expert): weight
        for row in range(len(experts))
        for expert, weight in zip(experts[row], weights[row], strict=True)
    }
    assert seen == expected


@given(blocks(), st.sets(st.integers(0, 4)))
def test_both_forms_divide_alike_and_leave_out_what_is_not_ours(block, others):
    experts, weights, worker_of, node_of_worker = block
    nodes = np.where(np.isin(node_of_worker, list(others)), NOT_OURS, node_of_worker)[worker_of]
    mine = split_by_node(experts, weights, nodes.astype(np.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_compiled", None if plan._compiled else _C)
        theirs = split_by_node(experts, weights, nodes.astype(np.int32))
    assert [s.node for s in mine] == sorted(set(nodes[experts].ravel().tolist()) - {NOT_OURS})
    for a, b in zip(mine, theirs, strict=True):
        assert (a.node, a.rows.tolist(), a.num_pairs) == (b.node, b.rows.tolist(), b.num_pairs)
        assert a.tail == b.tail, "what travels"


@given(blocks(), st.sampled_from(RowType), st.integers(1, 300), st.randoms(use_true_random=False))
def test_both_forms_lay_partials_side_by_side_alike(block, row_type, width, rng):
    experts, weights, worker_of, node_of_worker = block
    shares = split_by_node(experts, weights, node_of_worker[worker_of])
    rows = [share.rows for share in shares]
    starts = [rng.randrange(1 << 20) for _ in rows]
    relays = [part for part in rows if rng.random() < 0.7]
    made = []
    for form in (plan._compiled, None if plan._compiled else _C):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "_compiled", form)
            slots = sum_table(rows, starts, len(experts))
            made.append((slots, side_by_side(relays, width, row_type, slots)))
    (slots, a), (same, b) = made
    assert slots.tolist() == same.tolist()
    for row, places in enumerate(slots.tolist()):
        held = [
            s + part.tolist().index(row)
            for part, s in zip(rows, starts, strict=True)
            if row in part
        ]
        assert places == held + [-1] * (len(places) - len(held))
    assert (a.pieces, a.shape, a.num_places, a.nbytes) == (
        b.pieces,
        b.shape,
        b.num_places,
        b.nbytes,
    )
    assert (a.index.tolist(), a.slots.tolist()) == (b.index.tolist(), b.slots.tolist())
    assert a.index.tolist() == [row for part in relays for row in part.tolist()]
    tables = [
        np.frombuffer(t.memory, np.int64, 4 * len(t.pieces), t.ats[1]).tolist() for t in (a, b)
    ]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("rows", "starts", "sentence"),
    [
        ([np.array([0, 3], np.int32)], [0], "row 3 of 3"),
        ([np.array([-1], np.int32)], [0], "row -1 of 3"),
        ([np.array([0, 1])], [0], "not of 32 bits"),
        ([np.array([0], np.int32)], [0, 1], "every share has a start"),
        ([np.array([0], np.int32)], [1 << 70], "too large"),
    ],
)
def test_tables_of_partials_outside_their_rows_are_refused(rows, starts, sentence):
    with pytest.raises((ValueError, OverflowError), match=sentence):
        _C.sum_table(rows, starts, 3)
    slots = np.zeros((3, 1), np.int32)
    with pytest.raises((ValueError, TypeError)):
        _C.side_by_side([np.array([0, 1])], slots, 16, 0)
    with pytest.raises(TypeError):
        _C.side_by_side([None], slots, 16, 0)


@given(blocks())
def test_every_pair_has_one_place_sorted_by_worker_and_expert(block):
    experts, weights, worker_of, _ = block
    (share,) = split_by_node(experts, weights, np.zeros(40, np.int32))
    plan = fan_out(share, worker_of, 40, RowType.FP8)
    stop = 0
    for work in plan.shares:
        assert work.start == stop
        stop = work.stop
        assert (worker_of[work.segments[:, 0]] == work.worker).all()
        assert (np.diff(work.segments[:, 0]) > 0).all()
        assert work.segments[:, 1].sum() == work.stop - work.start
    assert stop == len(share.pair_rows)
    assert len({work.worker for work in plan.shares}) == len(plan.shares)
    place_experts = np.concatenate([np.repeat(*work.segments.T) for work in plan.shares])
    pairs = set(zip(plan.tables.index.tolist(), place_experts.tolist(), strict=True))
    assert pairs == set(zip(share.pair_rows.tolist(), share.experts.tolist(), strict=True))


@given(blocks(), st.integers(1, 1 << 30))
def test_each_share_picks_the_rows_of_its_places(block, of_block):
    experts, weights, worker_of, _ = block
    (share,) = split_by_node(experts, weights, np.zeros(40, np.int32))
    plan = fan_out(share, worker_of, 40, RowType.FP8, of_block)
    plain = fan_out(share, worker_of, 40, RowType.FP8)
    for work, without in zip(plan.shares, plain.shares, strict=True):
        num_rows, end = work.stop - work.start, len(without.tail)
        layout = expert_pick_layout(0, num_rows, work.num_segments)
        assert (layout.picks, layout.nbytes) == (end, len(work.tail))
        assert work.tail[:end] == without.tail
        picks = np.frombuffer(work.tail, np.int32, 1 + num_rows, end)
        assert picks[0] == of_block
        assert (picks[1:] == plan.tables.index[work.start : work.stop]).all()


@given(blocks())
def test_slots_hold_each_rows_pairs_in_ascending_expert_order(block):
    experts, weights, worker_of, _ = block
    (share,) = split_by_node(experts, weights, np.zeros(40, np.int32))
    plan = fan_out(share, worker_of, 40, RowType.FP8)
    place_experts = np.concatenate([np.repeat(*work.segments.T) for work in plan.shares])
    for row in range(len(share.rows)):
        mine = share.pair_rows == row
        places = plan.tables.slots[row][plan.tables.slots[row] >= 0]
        assert (plan.tables.index[places] == row).all()
        assert place_experts[places].tolist() == share.experts[mine].tolist()
        assert plan.tables.weights[row][: len(places)].tolist() == share.weights[mine].tolist()
        assert (plan.tables.weights[row][len(places) :] == 0).all()


@pytest.mark.parametrize(
    ("pair_rows", "experts", "sentence"),
    [
        ([], [], "without pairs"),
        ([0, 2], [0, 0], "pair row outside"),
        ([0, -1], [0, 0], "pair row outside"),
        ([0, 1], [0, 4], "expert id outside"),
        ([1, 0], [0, 0], "not sorted"),
        ([0, 0], [3, 1], "not sorted"),
    ],
)
def test_bad_pairs_are_refused(pair_rows, experts, sentence):
    with pytest.raises(WireError, match=sentence):
        check_pairs(
            np.array(pair_rows, np.int32), np.array(experts, np.int32), num_rows=2, num_experts=4
        )


@pytest.mark.parametrize("expert", [4, -1, 1 << 30])
def test_an_unknown_expert_is_refused(expert):
    experts, weights = np.array([[0, expert]], np.int32), np.ones((1, 2), np.float32)
    with pytest.raises(WireError, match=r"expert id outside 0\.\.3"):
        check_experts(experts, 4)
    with pytest.raises(WireError, match=r"expert id outside 0\.\.3"):
        split_by_node(experts, weights, np.zeros(4, np.int32))
    with pytest.raises(WireError, match=r"expert id outside 0\.\.3"):
        fan_out(BlockPairs(experts, weights), np.zeros(4, np.int32), 40, RowType.BF16)


@given(blocks(), st.data())
def test_a_share_divided_anew_keeps_its_rows_and_pairs(block, data):
    experts, weights, _, _ = block
    (share,) = split_by_node(experts, weights, np.zeros(40, np.int32))
    num_pairs = len(share.experts)
    nodes = np.array(data.draw(st.lists(st.integers(0, 3), min_size=num_pairs, max_size=num_pairs)))
    parts = split_share(share, nodes)
    assert [part.node for part in parts] == sorted(set(nodes.tolist()))

    def pairs(part):
        rows = part.rows[part.pair_rows]
        return list(zip(rows.tolist(), part.experts.tolist(), part.weights.tolist(), strict=True))

    for part in parts:
        mine = (nodes == part.node).nonzero()[0]
        assert pairs(part) == [pairs(share)[i] for i in mine]
        assert set(part.pair_rows.tolist()) == set(range(len(part.rows))), "no row without a pair"


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=1, max_size=8))
def test_a_worker_share_divided_anew_covers_the_same_places(segments):
    table = np.array([(expert, count) for expert, (count, _) in enumerate(segments)], np.int32)
    workers = np.array([worker for _, worker in segments])
    old = WorkerShare.of(7, 100, 100 + int(table[:, 1].sum()), table)
    stop = old.start
    for part in divide_share(old, workers):
        assert part.start == stop
        stop = part.start + int(part.segments[:, 1].sum())
        assert part.stop == stop
        assert {workers[expert] for expert in part.segments[:, 0]} == {part.worker}
    assert stop == old.stop


@given(blocks(), st.integers(0, 5))
def test_unicast_sends_a_copy_per_expert_of_another_node(block, home):
    experts, weights, worker_of, node_of_worker = block
    nodes = node_of_worker[worker_of]
    by_node = {share.node: share for share in split_by_node(experts, weights, nodes)}
    copies = 0
    for share in split_unicast(home, experts, weights, nodes):
        if share.node == home:
            assert (share.pair_rows == by_node[home].pair_rows).all()
            continue
        assert len(set(share.experts.tolist())) == 1
        assert share.pair_rows.tolist() == list(range(len(share.rows)))
        chosen = experts[share.rows] == share.experts[0]
        assert (weights[share.rows][chosen] == share.weights).all()
        copies += len(share.rows)
    assert copies == sum(len(s.pair_rows) for s in by_node.values() if s.node != home)


def test_pairs_that_nobody_computes():
    rows, experts, workers = (
        np.array(v, np.int32) for v in ([0, 1], [3, 4], [0, 0, 0, 2, NOT_OURS])
    )
    share = NodeShare.of(0, np.arange(2), rows, experts, np.ones(2, np.float32))
    with pytest.raises(WireError, match="experts that this node does not hold"):
        fan_out(share, workers, 40, RowType.BF16)
    block = BlockPairs(experts[:, None], np.ones((2, 1), np.float32))
    with pytest.raises(WireError, match="experts that this node does not hold"):
        fan_out(block, workers, 40, RowType.BF16)


_LAYOUTS = st.sampled_from(RowType), st.integers(1, 300), st.sampled_from([0, 7, 1 << 20])


@given(blocks(), *_LAYOUTS, st.data())
def test_both_forms_make_the_same_tables(block, row_type, width, of_block, data):
    experts, weights, worker_of, node_of_worker = block
    nodes = node_of_worker[worker_of]
    shares = split_by_node(experts, weights, nodes)
    pairs = data.draw(st.sampled_from([*shares, BlockPairs(experts, weights)]))
    mine, theirs = fan_out(pairs, worker_of, width, row_type, of_block), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_compiled", None if plan._compiled else _C)
        theirs = fan_out(pairs, worker_of, width, row_type, of_block)
    _assert_alike(mine, theirs)


@given(blocks(), *_LAYOUTS)
def test_a_block_of_one_node_needs_no_split(block, row_type, width, of_block):
    experts, weights, worker_of, _ = block
    (share,) = split_by_node(experts, weights, np.zeros(len(worker_of), np.int32))
    at_once = fan_out(BlockPairs(experts, weights), worker_of, width, row_type, of_block)
    _assert_alike(at_once, fan_out(share, worker_of, width, row_type, of_block))


def _assert_alike(mine, theirs):
    assert mine.shares == theirs.shares
    a, b = mine.tables, theirs.tables
    assert a.pieces == b.pieces
    assert (a.shape, a.num_places, a.nbytes) == (b.shape, b.num_places, b.nbytes)
    for name in ("index", "slots", "weights"):
        assert (getattr(a, name) == getattr(b, name)).all(), name
    rows = [np.frombuffer(t.memory, np.int64, 4 * len(t.pieces), t.ats[1]).tolist() for t in (a, b)]
    assert rows[0] == rows[1]
