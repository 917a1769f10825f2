"""What experts a trace has together by chance: told from what is more, and not what a plan is made for."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.placement.baselines import eplb_layer
from common.placement.chance import share_of_chance, shuffled
from common.placement.links import build_links
from common.placement.optimise import Options, layer_slots, optimise
from common.placement.plan import Plan
from common.placement.score import score
from common.placement.topology import uniform
from tests.routing_traces import group_limited, zipf


@given(
    st.integers(1, 4), st.sampled_from([4, 8]), st.integers(1, 6), st.integers(1, 80),
    st.integers(0, 2**32),
)  # fmt: skip
def test_shuffled_tokens_keep_loads_and_groups(groups, size, top_k, tokens, seed):
    top_k, experts = min(top_k, size), groups * size
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, experts)) * np.arange(1, experts + 1))[:, :top_k]
    found = shuffled(ids, size, rng)
    assert (np.bincount(found.ravel()) == np.bincount(ids.ravel())).all()
    assert (np.sort(found // size, axis=1) == np.sort(ids // size, axis=1)).all()
    assert (np.diff(np.sort(found, axis=1)) > 0).all()


def test_what_is_chance_is_told_from_what_is_not():
    for top_k in (2, 4):
        trace = zipf(layers=[0], tokens=4096, num_experts=16, top_k=top_k, exponent=0.8, seed=3)
        alone = trace.expert_ids[0].astype(np.int64)
        assert share_of_chance(alone, 16, 1) > 0.8
        neighbours = (alone[:, :1] + np.arange(top_k)) % 16
        together = np.concatenate([alone, neighbours])
        assert share_of_chance(together, 16, 1) < 0.1
        mixed = shuffled(together, 16, np.random.default_rng(0))
        assert share_of_chance(mixed, 16, 1) > 0.7
    limited = group_limited(
        layers=[0], tokens=8192, num_experts=64, num_groups=4, top_k=4, top_k_groups=2
    )
    assert share_of_chance(limited.expert_ids[0].astype(np.int64), 64, 4) < 0.6
    assert share_of_chance(np.zeros((5, 1), np.int64), 1, 1) == 1.0


def test_a_plan_promises_what_it_keeps():
    """Experts independent of one another: rows are no fewer on the tokens searched than chance makes them elsewhere."""
    topology, options = uniform(4, 4), Options()
    links = build_links(topology, options.row)
    gaps = []
    for seed in range(4):
        trace = zipf(layers=[0], tokens=4096, num_experts=16, top_k=2, exponent=0.8, seed=seed)
        fit, held_out = trace.halves()
        (slots,) = layer_slots(topology, 16, 1, options)
        theirs = Plan(1, {0: eplb_layer(fit.loads[0], slots, 1, 0)}, topology.worker_nodes)
        ours = optimise(fit, topology, options)
        assert ours.holders != theirs.holders
        fitted, kept = (
            score(ours, half, links).rows / score(theirs, half, links).rows
            for half in (fit, held_out)
        )
        gaps.append(kept / fitted - 1)
    assert np.mean(gaps) < 0.003, gaps
