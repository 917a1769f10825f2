"""Whose pairs are whose: every pair of a block is sent by one router of the node, to one living replica."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.placement.plan import Plan, column_plan
from services.router.routes import (
    NOT_OURS,
    Fleet,
    Routes,
    home_of,
    least_loaded,
    rail_between,
    rail_of_worker,
)

LAYER = 1


def plan_of(nodes):
    return column_plan(
        epoch=1, moe_layers=[LAYER, 2], num_experts=len(nodes), experts_per_gpu=1, nodes=nodes
    )


@st.composite
def replicated_plans(draw):
    nodes = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=12)))
    workers = st.lists(st.integers(0, len(nodes) - 1), min_size=1, max_size=4, unique=True)
    holders = draw(st.lists(workers.map(tuple), min_size=1, max_size=8))
    return Plan(1, {LAYER: tuple(holders)}, nodes)


def flags(plan):
    return st.lists(
        st.booleans(), min_size=len(plan.nodes), max_size=len(plan.nodes)
    ).map(np.array)  # fmt: skip


def fleet_of(alive, owed=None, asked=None):
    nothing = [0] * len(alive)
    counts = (nothing if each is None else [int(n) for n in each] for each in (owed, asked))
    return Fleet(np.array(alive), *counts)


@given(data=st.data(), plan=replicated_plans(), num_rails=st.integers(1, 8), node=st.integers(0, 5))
def test_the_rails_of_a_node_divide_every_block_whatever_each_has_seen(data, plan, num_rails, node):
    experts = np.arange(len(plan.holders[LAYER]), dtype=np.int32)
    sent = np.array(
        [
            Routes(plan, node, rail=rail, num_rails=num_rails).senders(
                LAYER, experts, fleet_of(data.draw(flags(plan)))
            )
            for rail in range(num_rails)
        ]
    )
    assert ((sent != NOT_OURS).sum(axis=0) == 1).all(), "every pair has one sender"
    for rail, workers in enumerate(sent):
        for expert, worker in enumerate(workers.tolist()):
            if worker != NOT_OURS:
                assert worker in plan.holders[LAYER][expert]
                home = plan.nodes[worker]
                assert home == node or rail_between(node, home, num_rails) == rail


@given(data=st.data(), plan=replicated_plans(), node=st.integers(0, 5))
def test_a_living_replica_nearby_with_the_fewest_rows(data, plan, node):
    experts = np.arange(len(plan.holders[LAYER]), dtype=np.int32)
    alive = data.draw(flags(plan))
    owed = np.array([data.draw(st.integers(0, 9)) for _ in plan.nodes])
    routes, fleet = Routes(plan, node), fleet_of(alive, owed)
    for expert, holders in enumerate(plan.holders[LAYER]):
        (chosen,) = routes.senders(LAYER, experts[expert : expert + 1], fleet)[[expert]]
        own = [w for w in holders if plan.nodes[w] == node and alive[w]]
        living = own or [w for w in holders if alive[w]]
        if living:
            assert chosen in living
            assert owed[chosen] == min(owed[w] for w in living)
        else:
            assert chosen == home_of(holders, node, plan.nodes), "waits where the plan alone says"
        (here,) = routes.workers(LAYER, experts[expert : expert + 1], fleet)[[expert]]
        assert here == (
            NOT_OURS if all(plan.nodes[w] != node for w in holders)
            else chosen if own else home_of(holders, node, plan.nodes)
        )  # fmt: skip
        for peer in range(5):
            holds = any(alive[w] and plan.nodes[w] == peer for w in holders)
            assert routes.living(LAYER, peer, alive)[expert] == holds


def test_one_block_fills_replicas_by_the_rows_it_gives_them():
    """Workers 0 and 1 hold experts 0 and 1: the second expert goes where the first one's rows did not."""
    plan = Plan(1, {LAYER: ((0, 1), (0, 1))}, (0, 0))
    experts = np.array([0, 0, 0, 1], np.int32)
    table = Routes(plan, 0).senders(LAYER, experts, fleet_of([True, True], [0, 2]))
    assert table.tolist() == [0, 1]


def test_without_replicas_nothing_is_chosen():
    routes = Routes(plan_of((0, 0, 1)), 0)
    assert not routes.has_replicas(LAYER)
    experts = np.arange(3, dtype=np.int32)
    assert routes.senders(LAYER, experts, Fleet.of(3)).tolist() == [0, 1, 2]


def test_least_loaded():
    fleet = fleet_of([True, True, False, True], owed=[5, 3, 0, 3], asked=[0, 9, 0, 8])
    assert least_loaded((0, 1, 2, 3), fleet) == 3, "among equals the one asked for less so far"
    assert least_loaded((1, 0), fleet) == 1
    assert least_loaded((2,), fleet) is None


def test_nodes_take_turns_at_the_replicas_elsewhere():
    plan = Plan(1, {LAYER: ((0, 1, 2),)}, (0, 1, 2))
    homes = [home_of((0, 1, 2), node, plan.nodes) for node in range(9)]
    assert homes[:3] == [0, 1, 2], "their own"
    assert Counter(homes[3:]) == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize(("num_nodes", "num_rails"), [(32, 8), (32, 3), (5, 8), (2, 2)])
def test_rails_share_the_other_nodes_and_meet_their_like(num_nodes, num_rails):
    for node in range(num_nodes):
        peers = [peer for peer in range(num_nodes) if peer != node]
        load = Counter(rail_between(node, peer, num_rails) for peer in peers)
        assert max(load.values()) <= -(-num_nodes // num_rails)
        for peer in peers:
            assert rail_between(node, peer, num_rails) == rail_between(peer, node, num_rails)


def test_rails_share_the_experts_of_their_node():
    nodes = (0,) * 8 + (1,) * 8
    load = Counter(rail_of_worker(worker, nodes, 4) for worker in range(8, 16))
    assert set(load.values()) == {2}
