"""The placement plan: its JSON, what it refuses, and the sentence for each mistake."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import local_cluster
from common.errors import ConfigError
from common.placement.plan import FORMAT, Plan, check_plan, column_plan
from common.plan_file import read_plan, write_plan


@st.composite
def plans(draw):
    num_workers = draw(st.integers(1, 12))
    nodes = tuple(draw(st.lists(st.integers(0, 4), min_size=num_workers, max_size=num_workers)))
    num_experts = draw(st.integers(1, 6))
    workers = st.lists(st.integers(0, num_workers - 1), min_size=1, max_size=3, unique=True)
    layer = st.lists(workers.map(tuple), min_size=num_experts, max_size=num_experts).map(tuple)
    holders = draw(st.dictionaries(st.integers(0, 60), layer, min_size=1, max_size=4))
    return Plan(draw(st.integers(0, 2**31 - 1)), holders, nodes)


@given(plans())
def test_json_reads_back_equal(plan):
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@given(plans())
def test_residents_and_spares_cover_every_worker_once(plan):
    held = {w: plan.residents(w) for w in range(len(plan.nodes))}
    for layer, holders in plan.holders.items():
        for expert, workers in enumerate(holders):
            assert [w for w in held if (layer, expert) in held[w]] == sorted(workers)
        assert plan.has_replicas(layer) == any(len(w) > 1 for w in holders)
    assert set(plan.spares) == {w for w, residents in held.items() if not residents}


@given(plans(), st.integers(0, 2**31 - 1))
def test_the_digest_is_of_the_placement_not_of_the_epoch(plan, epoch):
    assert Plan(epoch, plan.holders, plan.nodes).digest == plan.digest
    moved = tuple(node + 1 for node in plan.nodes)
    assert Plan(plan.epoch, plan.holders, moved).digest != plan.digest


GOOD = {"format": FORMAT, "epoch": 1, "nodes": [0, 0, 1], "layers": {"1": [[0], [1, 2]]}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format": "atoll-plan-9"}, "not a plan of format"),
        ({"epoch": -1}, "epoch must be"),
        ({"epoch": True}, "epoch must be"),
        ({"nodes": [0, "1"]}, "nodes must list"),
        ({"nodes": None}, "nodes must list"),
        ({"layers": []}, "layers must be a table"),
        ({"layers": {"x": [[0]]}}, r"layers\.x must be"),
        ({"layers": {"1": 3}}, r"layers\.1 must be"),
        ({"layers": {"1": [[0], []]}}, "expert 1 of layer 1 must list"),
        ({"layers": {"1": [[0], [1.5]]}}, "expert 1 of layer 1 must list"),
        ({"layers": {"1": [[0], [3]]}}, "expert 1 of layer 1 is on expert-3, the plan has 3"),
        ({"layers": {"1": [[1, 1]]}}, "expert 0 of layer 1 lists a worker twice"),
    ],
)
def test_a_bad_document_is_refused(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Plan.from_json(GOOD | change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"nodes": (0, 0, 1, 1)}, "for 3 expert workers on 2 nodes, the cluster has 4 on 2"),
        ({"nodes": (0, 1, 1)}, "has 3 on 2, spread otherwise"),
        ({"moe_layers": range(1, 3)}, r"layers 1 to 1 \(1\), the model 1 to 2 \(2\)"),
        ({"num_experts": 3}, "2 experts in layer 1, the model 3"),
    ],
)
def test_a_plan_for_another_cluster_is_refused(change, sentence):
    fits = {"moe_layers": [1], "num_experts": 2, "nodes": (0, 0, 1), "experts_per_gpu": 1}
    plan = Plan.from_json(GOOD)
    check_plan(plan, **fits)
    with pytest.raises(ConfigError, match=sentence):
        check_plan(plan, **(fits | change))


def test_two_experts_of_a_layer_on_one_gpu_are_refused_unless_allowed():
    plan = Plan.from_json(GOOD | {"layers": {"1": [[0], [0, 2]]}})
    fits = {"moe_layers": [1], "num_experts": 2, "nodes": (0, 0, 1)}
    check_plan(plan, **fits, experts_per_gpu=2)
    with pytest.raises(ConfigError, match="2 experts of layer 1 on expert-0, experts_per_gpu"):
        check_plan(plan, **fits, experts_per_gpu=1)


def test_a_file_is_replaced_whole_and_a_bad_one_is_named(tmp_path):
    plan = column_plan(
        epoch=3, moe_layers=[1, 2], num_experts=4, experts_per_gpu=2, nodes=(0, 1, 1)
    )
    path = tmp_path / "plan.json"
    write_plan(path, plan)
    assert read_plan(path) == plan
    assert repr(plan) == (
        "<Plan epoch 3 [2 layers | 8 experts | 0 replicas | 3 workers on 2 nodes, 1 spare]>"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    for text, sentence in (("[", "not JSON"), ("[" * 10**5, "not JSON"), ("{}", "not a plan")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"plan {path}: {sentence}"):
            read_plan(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_plan(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="No such file"):
        write_plan(tmp_path / "none" / "plan.json", plan)


def test_the_toml_names_a_plan_and_keeps_it():
    config = local_cluster(
        Path("/model"), ep=4, nodes=2, attention=1, experts_per_gpu=1, microbatches=1, wire="fp32",
        port=0, run_dir=Path("/run/atoll"),
    )  # fmt: skip
    assert config.placement.plan is None
    assert "plan" not in config.to_toml()
