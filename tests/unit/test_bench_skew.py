"""The random models of benchmarks route as unevenly as the traces they are made from, and not by chance."""

import json

import numpy as np
import pytest
import torch

from common.model import names
from common.model.hf_config import load_config
from common.model.presets import RANDOM_FILE, preset_config
from common.model.source import open_checkpoint
from tests.bench.gpu.skew import (
    SKEWS,
    choose,
    loads,
    popularity,
    trace_of,
    wanted_loads,
    write_skewed_source,
)

LAYER, WIDTH, ROWS = 3, 128, 16384
# what chance makes of it: 256 rows of an expert in the mean where the bias is fitted, 512 here
BOUND = 0.15


def model(directory, skew):
    shape = preset_config("deepseek-v3", layers=4) | {
        "hidden_size": WIDTH, "moe_intermediate_size": 64,
    }  # fmt: skip
    return write_skewed_source(directory, shape, skew, distinct_experts=1)


def off(source, wanted, bias=None):
    """By how much loads on rows that were not fitted miss `wanted`: the 90th percentile of |log ratio|."""
    config = load_config(source)
    with open_checkpoint(source) as checkpoint:
        gate = checkpoint.read(names.layer(LAYER, names.GATE))
        bias = checkpoint.read(names.layer(LAYER, names.GATE_BIAS)) if bias is None else bias
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(77))
    found = loads(choose(config, rows @ gate.T, bias), config.num_experts)
    return float(np.quantile(np.abs(np.log(np.maximum(found, 1e-3) / wanted)), 0.9))


@pytest.mark.parametrize("skew", [s for s in SKEWS if s != "none"])
def test_the_gate_chooses_as_the_trace_does_on_rows_it_was_not_fitted_to(tmp_path, skew):
    source = model(tmp_path, skew)
    wanted = wanted_loads(popularity(trace_of(skew), 256), LAYER)
    right = off(source, wanted)
    assert right < BOUND
    bias = torch.tensor(
        next(iter(json.loads((source / RANDOM_FILE).read_text())["given"].values()))
    )
    turned = wanted_loads(popularity(trace_of(skew), 256), LAYER + 1)
    wrong = off(source, turned), off(source, wanted, bias.roll(1)), off(source, wanted, 4 * bias)
    assert min(wrong) > 1.5 * right


def test_an_imitated_gate_is_uneven_without_its_bias_only_by_chance(tmp_path):
    source = model(tmp_path, "none")
    wanted = wanted_loads(popularity(trace_of("imitated"), 256), LAYER)
    assert "given" in json.loads((source / RANDOM_FILE).read_text())
    assert off(source, wanted) > 2 * BOUND


def test_popularity_by_rank():
    trace = trace_of("measured")
    same = popularity(trace, 16)
    ranked = -np.sort(-trace.loads, axis=1)
    assert same == pytest.approx(ranked.mean(axis=0) / ranked.mean())
    many = popularity(trace, 256)
    assert many.mean() == pytest.approx(1)
    assert (np.diff(many) <= 0).all()
    assert many[0] == pytest.approx(same[0], rel=0.01)
