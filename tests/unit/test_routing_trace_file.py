"""Routing traces as files: what is written is read back, and what is none is refused in one sentence."""

import io
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError
from common.placement.routing_trace import RoutingTrace
from common.routing_trace_file import pack_trace, parse_trace, read_trace


def test_a_trace_survives():
    ids = np.array([[[0, 3], [1, 2]], [[3, 2], [0, 1]]], np.int16)
    trace = RoutingTrace(ids, (1, 4), 8, num_groups=4, top_k_groups=2)
    back = parse_trace(pack_trace(trace))
    assert (back.expert_ids == ids).all()
    assert (back.layers, back.num_experts) == ((1, 4), 8)
    assert (back.num_groups, back.top_k_groups) == (4, 2)


def test_the_demo_model_s_trace_is_one():
    path = Path(__file__).parents[2] / "deploy/demo/model/reference/routing.npz"
    trace = read_trace(path, num_experts=16)
    assert trace.num_experts == 16
    assert trace.num_tokens > 1000


def test_mistakes_are_one_sentence_naming_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"trace .*/none\.npz: No such file"):
        read_trace(tmp_path / "none.npz")
    for data, sentence in (
        (b"text", "not an npz file"),
        (_npz(layer_index=np.zeros(1, np.int16)), "it has no expert_ids"),
        (_npz(expert_ids=np.zeros((1, 2, 1)), layer_index=[1]), "must be integers"),
        (_npz(expert_ids=np.zeros((2, 1), int), layer_index=[1]), "a trace needs"),
    ):
        (tmp_path / "t.npz").write_bytes(data)
        with pytest.raises(ConfigError, match=rf"t\.npz: .*{sentence}"):
            read_trace(tmp_path / "t.npz")


def _npz(**arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()
