"""Balancing gates: the policy alone, then with gates that obey it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.model.small import small_config
from common.model.writer import write_random
from kernels.reference.gate import gate_v2, gate_v3
from services.attention.batch import Span
from services.attention.gate_balance import GateBalance, next_bias
from services.attention.gate_bias import GateBias
from tests.device_model import LocalDeviceModel
from tests.oracle.local_model import LocalModel

V2 = {
    "model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
    "norm_topk_prob": False, "routed_scaling_factor": 1.0,
}  # fmt: skip
MOST = st.floats(1e-3, 1.0)
LOADS = st.lists(st.integers(0, 10_000), min_size=2, max_size=64).filter(any).map(np.asarray)


@given(LOADS, MOST, st.integers(0, 100), st.randoms(use_true_random=False))
def test_a_bias_is_bounded_and_lowers_the_busiest_alone(load, most, rounds, random):
    bias = np.asarray([-most * random.random() for _ in load])
    for _ in range(rounds):
        bias = next_bias(bias, load, most)
        assert (bias >= -most).all()
        assert (bias <= 0).all()
    after = next_bias(bias, load, most)
    over = load > 1.25 * load.mean()
    assert (after[over] <= bias[over]).all()
    assert (after[~over] >= bias[~over]).all()
    if over.any():
        assert after[np.argmax(load)] < bias[np.argmax(load)] or bias[np.argmax(load)] == -most


@given(st.lists(st.integers(90, 110), min_size=2, max_size=64).map(np.asarray), MOST)
def test_without_overload_a_bias_goes_back_to_zero(load, most):
    bias = np.full(len(load), -most)
    for _ in range(64):
        before, bias = bias, next_bias(bias, load, most)
        assert (bias > before).all()
    assert next_bias(bias, load, most).tolist() == [0.0] * len(load)
    assert next_bias(np.zeros(len(load)), load, most).tolist() == [0.0] * len(load)


def choices(balance, scores, bias, top_k):
    """Rows of each expert in one batch, told to the policy."""
    ids = np.argsort(-(scores + bias), axis=1)[:, :top_k].astype(np.int32)
    balance.count(7, ids)
    return np.bincount(ids.ravel(), minlength=scores.shape[1])


def test_the_busiest_gets_less_and_is_left_alone_when_that_is_over():
    rng = np.random.default_rng(4)
    biases = {7: np.zeros(16)}
    balance = GateBalance(16, 0.3, biases.__setitem__)
    skew = np.zeros(16)
    skew[5] = 0.25
    first = choices(balance, rng.random((64, 16)) + skew, biases[7], 4)
    assert first[5] > 2 * first.mean()
    loads = [
        choices(balance, rng.random((64, 16)) + skew, biases[7], 4)[5] / 16 for _ in range(100)
    ]
    assert np.mean(loads[-40:]) < 1.5
    assert biases[7][5] < -0.1
    assert balance.counters()["gate_lowered"] >= 1
    assert balance.counters()["gate_largest_bias"] == -biases[7].min() <= 0.3
    changes = balance.counters()["gate_bias_changes"]
    assert 0 < changes <= 101
    even = np.arange(16, dtype=np.int32).reshape(4, 4)
    for _ in range(64 * 16 + 64):
        balance.count(7, even)
    assert biases[7].tolist() == [0.0] * 16
    assert balance.counters()["gate_lowered"] == balance.counters()["gate_largest_bias"] == 0


def test_few_rows_change_nothing():
    balance = GateBalance(16, 0.3, lambda layer, bias: pytest.fail("too soon"))
    for _ in range(15):
        balance.count(0, np.zeros((16, 1), np.int32))
    assert balance.counters()["gate_bias_changes"] == 0


def gate(kind, x, weight, bias, groups=4):
    options = {
        "top_k": 3,
        "num_groups": groups,
        "top_k_groups": 2 if groups > 1 else 1,
        "routed_scaling_factor": 1.5,
    }
    if kind == "v3":
        return gate_v3(x, weight, bias, norm_topk_prob=False, **options)
    return gate_v2(x, weight, bias, num_experts=16, **options)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_a_bias_decides_the_choice_and_not_the_weights(kind, groups):
    torch.manual_seed(1)
    x, weight = torch.randn(200, 48), torch.randn(16, 48)
    ids, _ = gate(kind, x, weight, torch.zeros(16), groups)
    busiest = int(ids.flatten().bincount(minlength=16).argmax())
    # with groups: below what stands for the ones left out of an unbiased softmax gate
    bias = torch.full((16,), -0.5 if groups > 1 else 0.0)
    bias[busiest] = -2.0
    other, weights = gate(kind, x, weight, bias, groups)
    assert (ids == busiest).any()
    assert not (other == busiest).any()
    logits = x @ weight.T
    scores = logits.sigmoid() if kind == "v3" else logits.softmax(-1)
    torch.testing.assert_close(weights, scores.gather(1, other.long()) * 1.5)
    assert all(len({e // 4 for e in row}) <= 2 for row in other.tolist()) or groups == 1
    kept = (ids != busiest).all(1)
    if groups == 1:  # nobody else's choice changes
        assert torch.equal(other[kept].sort(1).values, ids[kept].sort(1).values)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_bias_of_zero_leaves_the_softmax_gate_as_it_is(groups):
    torch.manual_seed(2)
    x, weight = torch.randn(200, 48), torch.randn(16, 48)
    for a, b in zip(
        gate("v2", x, weight, None, groups),
        gate("v2", x, weight, torch.zeros(16), groups),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("own", [None, torch.arange(16.0)])
def test_a_bias_is_adjusted_where_it_lies(own):
    held = GateBias(own)
    assert held.tensor is own, "not balanced: what the checkpoint has"
    held.open(16, "cpu")
    place = held.tensor.data_ptr()
    before = torch.zeros(16) if own is None else own.clone()
    assert torch.equal(held.tensor, before)
    for by in (-0.5, -0.25, 0.0):
        held.adjust(np.full(16, by))
        assert torch.equal(held.tensor, before + by)
    assert held.tensor.data_ptr() == place
    assert own is None or torch.equal(own, before), "the checkpoint's own is left alone"


@pytest.mark.parametrize("device", [False, True], ids=["cpu", "device"])
@pytest.mark.parametrize("overrides", [{}, V2], ids=["v3", "v2"])
def test_models_obey_from_the_next_step_on(overrides, device, tmp_path):
    write_random(tmp_path, small_config() | {"num_hidden_layers": 3} | overrides, seed=5)
    make = (lambda: LocalDeviceModel(tmp_path, dtype=torch.float32)) if device else None
    local = make() if make else LocalModel(tmp_path)
    prompt = [Span(list(range(3, 43)), 0, 40, range(4))]
    untouched = local.logits(prompt)
    for held in local.model.gate_biases.values():
        held.open(16, "cpu")
    assert torch.equal(local.logits(prompt), untouched), "zero changes no bit"
    last = local.config.moe_layers[-1]
    by = np.zeros(16)
    by[:8] = -2.0  # two groups of four
    local.model.gate_biases[last].adjust(by)
    if device:
        changed = local.logits(prompt)
        assert int(local.state.experts[:40].min()) >= 8
    else:
        before = local.expert_rows[last][:8]
        changed = local.logits(prompt)
        assert local.expert_rows[last][:8] == before
    assert not torch.equal(changed, untouched)
    local.model.gate_biases[last].adjust(np.zeros(16))
    assert torch.equal(local.logits(prompt), untouched)
