"""Counters with decay, the sample of recent rows, and what becomes of them: a trace, and a decision."""

import functools
import operator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, Retryable, WireError
from common.placement.optimise import Options
from common.placement.plan import Plan, column_plan
from common.placement.rebalance import Hysteresis, Sample, gain, join_samples, options_like
from common.placement.score import Score
from services.router.load import ExpertLoad

SECOND = 1_000_000_000
EVEN = Score(link_s=1.0, rows=1.0, unicast_rows=1.0, gpu_load=2.0, total_gpu_load=1.5)


def rows(*experts):
    return np.array(experts, np.int32)


def test_rows_lose_half_their_weight_every_half_life():
    load = ExpertLoad(4, half_life_s=10.0)
    load.add(1, rows([0, 3]), 0)
    before = load.rates(0)[1]
    assert before.tolist() == pytest.approx([np.log(2) / 10, 0, 0, np.log(2) / 10])
    assert load.rates(10 * SECOND)[1] == pytest.approx(before / 2)
    assert load.rates(40 * SECOND)[1] == pytest.approx(before / 16)


def test_a_steady_stream_is_its_own_rate():
    load = ExpertLoad(2, half_life_s=5.0)
    for tick in range(2000):
        load.add(3, rows([1], [1], [0]), tick * SECOND // 10)
    assert load.rates(200 * SECOND)[3] == pytest.approx([10, 20], rel=0.01)
    told = load.to_json(200 * SECOND)["3"]
    assert told == [round(float(rate), 2) for rate in load.rates(200 * SECOND)[3]]


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=30), max_size=12))
def test_every_row_counts_once_whatever_the_blocks(blocks):
    load = ExpertLoad(5, half_life_s=1.0, max_sample=7)
    for block in blocks:
        load.add(1, rows(*([expert] for expert in block)), 0)
    expected = np.bincount(
        np.array(functools.reduce(operator.iadd, blocks, []), np.int64), minlength=5
    ) * np.log(2)
    assert not blocks or load.rates(0)[1] == pytest.approx(expected)


@given(st.lists(st.integers(0, 400), min_size=2, max_size=20), st.integers(0, 3))
def test_no_weight_grows_without_bound(pauses, expert):
    """Pauses of hundreds of half-lives, one after the other: the same as weighing each row by itself."""
    load, now, weights = ExpertLoad(4, half_life_s=1.0), 0, []
    for pause in pauses:
        now += pause * SECOND
        load.add(0, rows([expert]), now)
        weights.append(now)
    expected = sum(2.0 ** -((now - then) / SECOND) for then in weights) * np.log(2)
    assert load.rates(now)[0][expert] == pytest.approx(expected)


@given(st.lists(st.integers(1, 9), max_size=12))
def test_the_sample_is_the_last_rows(sizes):
    load, seen = ExpertLoad(500, max_sample=7), []
    for number, size in enumerate(sizes):
        block = [[20 * number + i, 499] for i in range(size)]
        load.add(5, rows(*block), 0)
        seen += [first for first, _ in block]
    sample = load.sample(0)
    found = sample.layers[5][:, 0].tolist() if sizes else []
    assert sorted(found) == sorted(seen[-7:])


def test_a_sample_survives_its_frame():
    sample = Sample(
        {2: np.array([[1, 300], [5, 0]], np.int16), 9: np.zeros((0, 2), np.int16)}, 12.5
    )
    back = Sample.from_json(sample.to_json())
    assert back.rate == 12.5
    assert {layer: ids.tolist() for layer, ids in back.layers.items()} == {
        2: [[1, 300], [5, 0]],
        9: [],
    }


@pytest.mark.parametrize(
    "frame", [{}, {"rate": 1, "layers": {"a": [2, ""]}}, {"rate": 1, "layers": {"1": [3, "AAAA"]}},
              {"rate": None, "layers": {}}, {"rate": 1, "layers": []}],
)  # fmt: skip
def test_a_frame_that_is_no_sample(frame):
    with pytest.raises(WireError, match="malformed routing sample"):
        Sample.from_json(frame)


def sample_of(expert, count, rate):
    return Sample({1: np.full((count, 1), expert, np.int16)}, rate)


SHAPE = {"num_experts": 4, "num_groups": 2, "top_k_groups": 1}


def test_routers_have_a_part_as_large_as_their_traffic():
    trace = join_samples([sample_of(0, 400, 30.0), sample_of(3, 400, 10.0)], [1], **SHAPE)
    assert trace.num_groups == 2
    assert trace.loads[0] == pytest.approx([0.75, 0, 0, 0.25], abs=0.01)


def test_too_few_rows_are_no_basis():
    with pytest.raises(Retryable, match="layer 2 has had 0 rows so far, a plan needs at least 64"):
        join_samples([sample_of(0, 400, 1.0)], [1, 2], **SHAPE)
    with pytest.raises(Retryable, match="layer 1 has had 63 rows"):
        join_samples([sample_of(0, 63, 1.0)], [1], **SHAPE)


def test_layers_are_cut_to_the_shortest_evenly():
    long = np.arange(1000).reshape(-1, 1) % 4
    layers = {1: long.astype(np.int16), 2: long[:100].astype(np.int16)}
    trace = join_samples([Sample(layers, 1.0)], [1, 2], **SHAPE)
    assert trace.num_tokens == 100
    assert trace.loads[0] == pytest.approx([0.25] * 4, abs=0.05)


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (EVEN, 0.0),
        (replace(EVEN, link_s=0.8), 0.2),
        (replace(EVEN, gpu_load=1.0), 0.5),
        (replace(EVEN, gpu_load=1.8, total_gpu_load=1.2), 0.2),
        (replace(EVEN, link_s=0.5, total_gpu_load=1.6), 0.0),  # one gets worse
        (replace(EVEN, link_s=0.9, gpu_load=2.02), 0.1),  # within the noise
        (replace(EVEN, rows=0.1, unicast_rows=0.1), 0.0),  # neither link nor GPU gains
    ],
)
def test_what_counts_as_a_gain(after, expected):
    assert gain(EVEN, after) == pytest.approx(expected)


def test_one_node_has_no_links():
    alone = replace(EVEN, link_s=0.0)
    assert gain(alone, replace(alone, gpu_load=1.0)) == pytest.approx(0.5)


def test_only_what_lasts_moves_anything():
    better = replace(EVEN, link_s=0.8)
    hysteresis = Hysteresis(min_gain=0.1, patience=3)
    looks = [better, better, EVEN, better, better, better, better, better, better]
    answers = [hysteresis.observe(EVEN, look) for look in looks]
    assert answers == [False, False, False, False, False, True, False, False, True]


@given(st.lists(st.floats(0.5, 1.5), max_size=60), st.integers(1, 5), st.floats(0.01, 0.3))
def test_hysteresis_never_moves_more_often_than_its_patience(ratios, patience, min_gain):
    hysteresis, since = Hysteresis(min_gain, patience), 0
    for ratio in ratios:
        since += 1
        if hysteresis.observe(EVEN, replace(EVEN, link_s=ratio)):
            assert since >= patience
            since = 0
        elif 1 - ratio < min_gain:
            since = 0


def plan_like(plan, **options):
    fields = options_like(plan, Options(), **options)
    return {name: fields[name] for name in ("experts_per_gpu", "strict", "replicas", "spares")}


def test_the_kind_of_plan_stays():
    column = column_plan(
        epoch=1, moe_layers=[1, 2], num_experts=4, experts_per_gpu=1, nodes=(0,) * 6
    )
    assert plan_like(column, experts_per_gpu=1) == {
        "experts_per_gpu": 1, "strict": False, "replicas": 0, "spares": 2,
    }  # fmt: skip
    packed = column_plan(epoch=1, moe_layers=[1, 2], num_experts=4, experts_per_gpu=2, nodes=(0, 0))
    assert plan_like(packed, experts_per_gpu=2)["strict"] is False
    strict = Plan(1, {1: ((0,), (1,)), 2: ((2,), (3,))}, (0,) * 4)
    assert plan_like(strict, experts_per_gpu=1)["strict"] is True
    twice = Plan(1, {1: ((0, 2), (1,)), 2: ((2,), (1,))}, (0,) * 4)
    assert plan_like(twice, experts_per_gpu=1)["replicas"] == 1
    assert plan_like(twice, experts_per_gpu=1, replicas=2) == {
        "experts_per_gpu": 1, "strict": False, "replicas": 2, "spares": 0,
    }  # fmt: skip
    with pytest.raises(ConfigError):
        Options(replicas=-1)


def test_rows_of_another_depth_begin_a_new_sample_and_are_counted_with_the_rest():
    load = ExpertLoad(4, half_life_s=1e9)
    load.add(0, np.array([[0, 1]] * 5, np.int32), 0)
    load.add(0, np.array([[1, 2, 3]] * 2, np.int32), 1)
    assert load.sample(2).layers[0].tolist() == [[1, 2, 3]] * 2
    rates = load.rates(2)[0]
    assert (rates / rates[0] * 5).round(6).tolist() == [5, 7, 2, 2]
