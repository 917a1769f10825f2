"""Rails: every pair of a block is sent by exactly one router of the node, whatever the counts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.placement.plan import column_plan
from services.router.routes import NOT_OURS, Routes, rail_between, rail_of_worker


def plan_of(nodes):
    return column_plan(
        epoch=1, moe_layers=[1, 2], num_experts=len(nodes), experts_per_gpu=1, nodes=nodes
    )


@given(
    nodes=st.lists(st.integers(0, 5), min_size=1, max_size=40).map(tuple),
    num_rails=st.integers(1, 8),
    node=st.integers(0, 5),
)
def test_the_rails_of_a_node_divide_every_block(nodes, num_rails, node):
    plan = plan_of(nodes)
    experts = np.arange(len(nodes), dtype=np.int32)
    rails = [Routes(plan, node, rail=rail, num_rails=num_rails) for rail in range(num_rails)]
    sent = [routes.nodes(1, experts) for routes in rails]
    senders = sum((nodes_of != NOT_OURS).astype(int) for nodes_of in sent)
    assert (senders == 1).all(), "every pair has one sender"
    for rail, nodes_of in enumerate(sent):
        for expert, home in enumerate(nodes_of):
            if home == node:
                assert rail_of_worker(expert, nodes, num_rails) == rail
            elif home != NOT_OURS:
                assert home == nodes[expert]
                assert rail_between(node, home, num_rails) == rail
        assert (rails[rail].homes(1, experts) == nodes).all()


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
