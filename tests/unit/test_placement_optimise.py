"""The placement optimiser: constraints under any input, budgets, determinism, heterogeneity, and its sentences."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.config import parse
from common.errors import ConfigError
from common.placement.baselines import eplb_layer
from common.placement.links import RowBytes, build_links
from common.placement.optimise import Options, layer_slots, moves, optimise
from common.placement.plan import Plan, check_plan
from common.placement.routing_trace import RoutingTrace
from common.placement.score import node_rows, score, worker_loads
from common.placement.swap import Budget
from common.placement.topology import GPUS, NodeSpec, Topology, cluster_topology, uniform
from tests.routing_traces import group_limited, zipf

QUICK = Budget(rounds=4, kicks=1, kick_swaps=2, kick_rounds=2)


@st.composite
def topologies(draw):
    count = draw(st.integers(1, 4))
    nodes = tuple(
        NodeSpec(
            attention=draw(st.integers(0, 2)),
            experts=draw(st.integers(0, 5)),
            gpu=GPUS[draw(st.sampled_from(["H100", "H200", "L40S"]))],
            rails=draw(st.integers(1, 3)),
            nic=draw(st.sampled_from([12.5e9, 50e9])),
            domain=draw(st.integers(0, 2)),
            leaf=draw(st.integers(0, 1)),
        )
        for _ in range(count)
    )
    assume(any(n.attention for n in nodes) and any(n.experts for n in nodes))
    return Topology(nodes, uplink=draw(st.sampled_from([0.0, 25e9])))


@st.composite
def traces(draw):
    groups = draw(st.sampled_from([1, 2]))
    num_experts = groups * draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(4, num_experts)))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    layers, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    noise = rng.gumbel(size=(layers, tokens, num_experts)) + rng.normal(size=num_experts)
    ids = np.argsort(-noise, axis=2)[:, :, :top_k].astype(np.int16)
    return RoutingTrace(ids, tuple(range(3, 3 + layers)), num_experts, groups)


@st.composite
def options(draw):
    return Options(
        experts_per_gpu=draw(st.integers(1, 4)),
        strict=draw(st.booleans()),
        replicas=draw(st.integers(0, 5)),
        spares=draw(st.integers(0, 2)),
        excluded=frozenset(draw(st.lists(st.integers(0, 9), max_size=2))),
        budget=QUICK,
    )


@settings(max_examples=120, deadline=None)
@given(traces(), topologies(), options())
def test_a_plan_keeps_every_constraint_or_one_sentence_says_why_not(trace, topology, options):
    nodes, per_gpu = topology.worker_nodes, options.experts_per_gpu
    spans = len(trace.layers) if options.strict else 1
    needed = -(-(trace.num_experts + options.replicas) // per_gpu) * spans + options.spares
    if needed > len(set(range(len(nodes))) - options.excluded):
        with pytest.raises(ConfigError, match=f"need {needed} expert workers, the cluster has"):
            optimise(trace, topology, options)
        return
    plan = optimise(trace, topology, options)
    model = {"moe_layers": trace.layers, "num_experts": trace.num_experts}
    check_plan(plan, **model, nodes=nodes, experts_per_gpu=per_gpu)
    assert len(plan.spares) >= options.spares
    assert all(not plan.residents(w) for w in options.excluded if w < len(nodes))
    if options.strict:
        assert max(len({layer for layer, _ in plan.residents(w)}) for w in range(len(nodes))) == 1
    links = build_links(topology, options.row)
    slots = layer_slots(topology, trace.num_experts + options.replicas, len(trace.layers), options)
    for i, (layer, holders) in enumerate(plan.holders.items()):
        assert all(len(set(workers)) == len(workers) for workers in holders)
        copies = sum(map(len, holders))
        assert copies <= trace.num_experts + options.replicas
        if per_gpu == 1:  # elsewhere two replicas may have to share a GPU, where one is enough
            most = trace.num_experts * len(slots[i].workers)
            assert copies == min(trace.num_experts + options.replicas, most)
        theirs = eplb_layer(trace.loads[i], slots[i], trace.num_groups, options.replicas)
        ours_most, most = (
            (worker_loads(one, nodes, trace.loads[i], links.sources)[1] / slots[i].speeds).max()
            for one in (holders, theirs)
        )
        assert ours_most <= most * (1 + 1e-9), layer
        link_s, their_link_s = (
            links.loads(node_rows(one, nodes, trace.expert_ids[i], links.sources)).max(initial=0.0)
            for one in (holders, theirs)
        )
        assert link_s <= their_link_s * (1 + 1e-9), layer


def test_more_replicas_than_there_are_gpus_for_are_no_worse_than_eplbs():
    """EPLB puts the seventh copy where it happens to level what six would not."""
    trace = RoutingTrace(np.array([[[1, 0]]], np.int16), (3,), 2, 1)
    spec = NodeSpec(1, 3, GPUS["H100"], 1, 12.5e9, 0, 0)
    plan = optimise(trace, Topology((spec,)), Options(experts_per_gpu=3, replicas=5, budget=QUICK))
    loads = worker_loads(plan.holders[3], (0, 0, 0), trace.loads[0], np.ones(1))[1]
    assert loads.tolist() == pytest.approx([2 / 3] * 3)


def test_a_plan_is_judged_by_the_tokens_as_a_whole():
    """Which replica a token takes goes by its place: runs of these tokens were better than EPLB's, all were not."""
    experts = "14103141141310410213313101133134144142313430103113411304131334143141"
    ids = np.array([*map(int, experts)], np.int16).reshape(1, -1, 2)
    trace = RoutingTrace(ids, (3,), 5, 1)
    nodes = (
        NodeSpec(0, 1, GPUS["H100"], 1, 12.5e9, 0, 0), NodeSpec(0, 5, GPUS["H200"], 1, 12.5e9, 0, 0),
        NodeSpec(0, 3, GPUS["H200"], 1, 12.5e9, 2, 0), NodeSpec(1, 0, GPUS["H100"], 1, 12.5e9, 2, 0),
    )  # fmt: skip
    topology = Topology(nodes)
    wanted = Options(experts_per_gpu=2, replicas=5, spares=2, excluded=frozenset({1}), budget=QUICK)
    (slots,) = layer_slots(topology, 10, 1, wanted)
    links = build_links(topology, wanted.row)
    most = [
        links.loads(node_rows(one, topology.worker_nodes, trace.expert_ids[0], links.sources)).max()
        for one in (
            optimise(trace, topology, wanted).holders[3],
            eplb_layer(trace.loads[0], slots, 1, wanted.replicas),
        )
    ]
    assert most[0] <= most[1]


@settings(max_examples=25, deadline=None)
@given(traces(), topologies(), options())
def test_the_same_input_gives_the_same_plan(trace, topology, options):
    try:
        first = optimise(trace, topology, options)
    except ConfigError:
        assume(False)
    assert optimise(trace, topology, options) == first


def fine(name="zipf"):
    if name == "zipf":
        return zipf(layers=range(2), tokens=4096, num_experts=16, top_k=4, exponent=0.8, seed=1)
    return group_limited(
        layers=range(2), tokens=4096, num_experts=32, top_k=4, num_groups=8, top_k_groups=4
    )


@pytest.mark.parametrize("replicas", [0, 4])
@pytest.mark.parametrize("name", ["zipf", "groups"])
def test_better_than_eplb_where_it_fits(name, replicas):
    trace = fine(name)
    slots = trace.num_experts + replicas
    topology = uniform(4, slots // 4)
    found = optimise(trace, topology, Options(replicas=replicas))
    links = build_links(topology, Options().row)
    (slot, *_) = layer_slots(topology, slots, 1, Options())
    theirs = {
        layer: eplb_layer(load, slot, trace.num_groups, replicas)
        for layer, load in zip(trace.layers, trace.loads, strict=True)
    }
    ours, eplb = (score(p, trace, links) for p in (found, Plan(1, theirs, topology.worker_nodes)))
    assert ours.link_s < eplb.link_s * 0.99
    assert ours.gpu_load <= eplb.gpu_load * (1 + 1e-9)


def test_groups_that_are_chosen_together_share_a_node():
    """Groups 0 and 5, 1 and 4, 2 and 7, 3 and 6: found group by group, which single swaps cannot. One expert of each is
    always wanted and gets the replica."""
    partner = np.array([5, 4, 7, 6, 1, 0, 3, 2])
    rng = np.random.default_rng(3)
    first = rng.integers(0, 8, 4096)
    groups = np.stack([first, partner[first]], axis=1).repeat(4, axis=1)
    liking = rng.random((4096, 2, 8)) - (np.arange(8) == 0)
    within = np.argsort(liking, axis=2)[:, :, :4].reshape(4096, 8)
    trace = RoutingTrace((groups * 8 + within).astype(np.int16)[None], (0,), 64, 8, 2)
    for replicas in (0, 8):
        topology = uniform(4, (64 + replicas) // 4)
        plan = optimise(trace, topology, Options(replicas=replicas))
        home = [
            {plan.nodes[w] for e in plan.holders[0][8 * g : 8 * g + 8] for w in e} for g in range(8)
        ]
        assert all(len(nodes) == 1 for nodes in home)
        assert all(home[g] == home[partner[g]] for g in range(8))


def test_a_slow_gpu_gets_light_experts():
    trace = zipf(layers=(0,), tokens=4096, num_experts=8, top_k=1, exponent=1.2, seed=0)
    h100, l40s = uniform(1, 4).nodes[0], replace(uniform(1, 4).nodes[0], gpu=GPUS["L40S"], domain=1)
    plan = optimise(trace, Topology((l40s, h100)), Options())
    slow = [e for e, (worker,) in enumerate(plan.holders[0]) if worker < 4]
    limit = trace.loads[0].max() / 1.0
    assert trace.loads[0][slow].max() * GPUS["H100"].flops / GPUS["L40S"].flops <= limit * 1.5
    assert int(np.argmax(trace.loads[0])) not in slow


def test_a_slow_nic_gets_fewer_rows():
    trace = fine()
    nodes = list(uniform(4, 4).nodes)
    nodes[2] = replace(nodes[2], nic=nodes[2].nic / 4)
    topology = Topology(tuple(nodes))
    plan = optimise(trace, topology, Options())
    loads = np.zeros(4)
    for i, layer in enumerate(trace.layers):
        for expert, (worker,) in enumerate(plan.holders[layer]):
            loads[plan.nodes[worker]] += trace.loads[i][expert]
    assert int(np.argmin(loads)) == 2


def test_replicas_lie_where_rows_start():
    """Nodes 2 and 3 have no attention workers. EPLB does not look at that, nor at what is wanted together."""
    trace = zipf(layers=(0,), tokens=4096, num_experts=16, top_k=2, exponent=0.8, seed=1)
    nodes = [replace(n, attention=1 - i // 2) for i, n in enumerate(uniform(4, 6).nodes)]
    topology = Topology(tuple(nodes))
    plan = optimise(trace, topology, Options(replicas=8))
    links = build_links(topology, Options().row)
    (slots,) = layer_slots(topology, 24, 1, Options())
    theirs = Plan(1, {0: eplb_layer(trace.loads[0], slots, 1, 8)}, plan.nodes)
    ours, eplb = score(plan, trace, links), score(theirs, trace, links)
    assert ours.link_s < 0.65 * eplb.link_s
    assert ours.gpu_load <= eplb.gpu_load * (1 + 1e-9)


def test_a_free_slot_is_filled_once():
    """More copies than fit on the node that all want: the only free slot there is not given away twice."""
    trace = zipf(layers=(0,), tokens=1024, num_experts=6, top_k=2, exponent=0.5, seed=0)
    near, far = uniform(2, 4).nodes
    topology = Topology((near, replace(far, attention=0, nic=far.nic / 100)))
    plan = optimise(trace, topology, Options(spares=1))
    counts = np.bincount([plan.nodes[w] for (w,) in plan.holders[0]], minlength=2)
    assert counts.max() <= 4
    assert len({w for (w,) in plan.holders[0]}) == 6
    assert counts[0] == 4 - (plan.nodes[plan.spares[0]] == 0)


def test_one_node_and_one_expert():
    ids = np.zeros((1, 3, 1), np.int16)
    plan = optimise(RoutingTrace(ids, (5,), 1), uniform(1, 1))
    assert plan == Plan(1, {5: ((0,),)}, (0,))


def test_a_plan_from_before_moves_little_and_still_improves():
    trace = fine()
    topology = uniform(4, 5)
    first = optimise(trace, topology, Options(spares=4))
    assert optimise(trace, topology, Options(spares=4), previous=first).digest == first.digest
    dead = first.holders[0][3][0]
    second = optimise(
        trace, topology, Options(spares=3, excluded=frozenset({dead})), previous=first
    )
    assert not second.residents(dead)
    loaded = moves(first, second)
    assert {(layer, 3) for layer in trace.layers} & {(layer, e) for _, layer, e in loaded}
    assert len(loaded) < len(moves(first, optimise(trace, topology, Options(spares=3, seed=9))))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"replicas": 1}, "17 experts and replicas at 1 of a layer per GPU and 0 spares need 17 expert workers"),
        ({"spares": 1}, "and 1 spares need 17 expert workers, the cluster has 16"),
        ({"strict": True}, "16 experts and replicas at 1 of the model per GPU and 0 spares need 32"),
        ({"excluded": frozenset({3})}, "the cluster has 15 \\(1 excluded\\)"),
        ({"experts_per_gpu": 0}, "experts_per_gpu must be at least 1, not 0"),
        ({"replicas": -1}, "replicas must be at least 0, not -1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        optimise(fine(), uniform(4, 4), Options(**options))


def test_a_previous_plan_for_other_workers_is_refused():
    other = optimise(fine(), uniform(2, 8))
    with pytest.raises(ConfigError, match="the topology has 16, spread otherwise"):
        optimise(fine(), uniform(4, 4), previous=other)


@pytest.mark.parametrize(
    ("nodes", "sentence"),
    [
        ((replace(uniform(1, 1).nodes[0], experts=0),), "no expert GPU"),
        ((replace(uniform(1, 1).nodes[0], attention=0),), "no attention GPU"),
        ((replace(uniform(1, 1).nodes[0], nic=0.0),), "NIC speed above 0"),
    ],
)
def test_a_topology_that_cannot_serve_is_refused(nodes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Topology(nodes)


def test_a_node_without_gpus_gets_nothing_and_still_sends():
    pair = uniform(2, 16).nodes
    nodes = (replace(pair[0], experts=0), replace(pair[1], attention=0))
    topology = Topology(nodes)
    plan = optimise(fine(), topology)
    found = score(plan, fine(), build_links(topology, RowBytes(1, 1)))
    assert set(plan.nodes) == {1}
    assert found.rows == 1.0


BAD_TRACES = [
    (
        np.zeros((1, 0, 2), np.int16),
        {},
        "needs \\[layers, tokens, top_k\\] expert ids, not \\(1, 0, 2\\)",
    ),
    (np.zeros((2, 3, 1), np.int16), {}, "2 layers of expert ids, layer_index names"),
    (np.full((1, 3, 1), 4, np.int16), {}, "expert ids outside 0..3"),
    (np.full((1, 3, 1), -1, np.int16), {}, "expert ids outside 0..3"),
    (np.zeros((1, 3, 2), np.int16), {}, "the same expert twice"),
    (np.zeros((1, 3, 1), np.int16), {"num_groups": 3}, "4 experts do not divide into 3 groups"),
]


@pytest.mark.parametrize(("ids", "more", "sentence"), BAD_TRACES)
def test_what_is_no_trace_is_one_sentence(ids, more, sentence):
    with pytest.raises(ConfigError, match=sentence):
        RoutingTrace(ids, (0,), 4, **more)


def test_the_topology_of_a_cluster_file():
    document = {
        "model": {"path": "/model"},
        "topology": {"gpu": "H200", "nic_gbit_s": 200.0, "uplink_gbit_s": 800.0},
        "nodes": [
            {"attention": 2, "experts": 4, "leaf": 1, "nvlink_domain": 0},
            {"attention": 0, "experts": 2, "gpu": "L40S", "nic_gbit_s": 100.0},
        ],
    }  # fmt: skip
    topology = cluster_topology(parse(document, source="test"))
    first, second = topology.nodes
    assert (first.gpu.name, first.nic, first.leaf) == ("H200", 25e9, 1)
    assert (second.gpu.name, second.nic, second.attention) == ("L40S", 12.5e9, 0)
    assert first.domain != second.domain
    assert topology.uplink == 1e11
    assert topology.worker_nodes == (0, 0, 0, 0, 1, 1)
    document["nodes"][1]["gpu"] = "A1000"
    with pytest.raises(ConfigError, match=r"nodes\[1\].gpu 'A1000' is not one of H100, H200"):
        cluster_topology(parse(document, source="test"))


def test_of_many_nodes_all_busy_links_are_looked_at():
    """From the busiest link alone the search of 16 nodes ended 5 % above EPLB's."""
    trace = group_limited(layers=[0], tokens=4096, num_experts=64, num_groups=8, top_k=8)
    fit, held_out = trace.halves()
    topology, options = uniform(16, 4), Options()
    links = build_links(topology, options.row)
    (slots,) = layer_slots(topology, 64, 1, options)
    theirs = Plan(1, {0: eplb_layer(fit.loads[0], slots, 8, 0)}, topology.worker_nodes)
    ours = optimise(fit, topology, options)
    assert score(ours, held_out, links).link_s < 0.97 * score(theirs, held_out, links).link_s
