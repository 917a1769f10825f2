"""Random models whose gates are as uneven as measured ones.

`measured` is the demo model's routing of its held-out text (22,313 tokens, 16 experts, trained to be even), `imitated`
that of tests.routing_traces.group_limited (DeepSeek-V3's gate on synthetic text that is not the trained mix). Of either
the popularity by rank, mean over layers, is interpolated to the model's number of experts; which expert has which rank
differs by layer. The gate's correction bias is then moved, step by step, until the gate's choice on random rows of unit
variance is that uneven. What is not taken over: which experts are chosen together, and how that drifts in a text.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.model import names
from common.model.hf_config import ModelConfig, load_config
from common.model.presets import write_random_source
from common.model.source import open_checkpoint
from common.placement.routing_trace import RoutingTrace
from common.routing_trace_file import read_trace
from kernels.reference.gate import gate_v3
from tests.demo_model import REFERENCE
from tests.routing_traces import group_limited

SKEWS = ("none", "measured", "imitated")
ROWS, STEPS = 8192, 12
# the load of an expert grows by about e per 1/20 of bias: sigmoid scores lie close together where they are chosen
_RATE = 0.05
_THREADS = 8

Floats = npt.NDArray[np.float64]


def trace_of(skew: str) -> RoutingTrace:
    """The trace behind a name of SKEWS other than none."""
    if skew == "measured":
        return read_trace(REFERENCE / "routing.npz", num_experts=16)
    return group_limited(layers=range(3, 7), tokens=16384)


def popularity(trace: RoutingTrace, num_experts: int) -> Floats:
    """Load of the experts of a layer against their mean, descending [num_experts]: mean over layers, by rank."""
    ranked = -np.sort(-trace.loads, axis=1).mean(axis=0)
    known, wanted = ((np.arange(n) + 0.5) / n for n in (len(ranked), num_experts))
    curve = np.interp(wanted, known, ranked)
    return np.asarray(curve / curve.mean())


def choose(config: ModelConfig, logits: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The real gate's choice [rows, top_k] on logits [rows, experts]."""
    return gate_v3(
        logits, torch.eye(config.num_experts), bias, top_k=config.top_k, num_groups=config.num_groups,
        top_k_groups=config.top_k_groups, norm_topk_prob=True, routed_scaling_factor=1.0,
    )[0]  # fmt: skip


def loads(ids: npt.ArrayLike, num_experts: int) -> Floats:
    """Rows of each expert against the mean [experts]."""
    counts = np.bincount(np.asarray(ids).ravel(), minlength=num_experts)
    return np.asarray(counts / counts.mean())


def bias_for(config: ModelConfig, logits: torch.Tensor, wanted: Floats) -> torch.Tensor:
    """The bias fp32 [experts] with which the choice on `logits` [rows, experts] has these loads (mean 1)."""
    bias = torch.zeros(config.num_experts)
    least = config.num_experts / (config.top_k * len(logits))  # one row
    for step in range(STEPS):
        found = loads(choose(config, logits, bias), config.num_experts)
        off = np.log(wanted / np.maximum(found, least))
        bias += torch.from_numpy(off).float() * (_RATE / (1 + 4 * step / STEPS))
    return bias - bias.mean()


def wanted_loads(curve: Floats, layer: int) -> Floats:
    """The curve [experts], its ranks dealt out to the experts of a layer."""
    return np.asarray(np.random.default_rng(layer).permutation(curve))


def write_skewed_source(
    directory: Path, shape: dict[str, Any], skew: str, *, distinct_experts: int, rows: int = ROWS
) -> Path:
    """`write_random_source`, with biases that make every gate as uneven as `skew` says."""
    source = write_random_source(directory, shape, distinct_experts=distinct_experts)
    if skew == "none":
        return source
    config = load_config(source)
    curve = popularity(trace_of(skew), config.num_experts)
    x = torch.randn(rows, config.hidden_size, generator=torch.Generator().manual_seed(0))
    given, threads = {}, torch.get_num_threads()
    torch.set_num_threads(min(_THREADS, os.cpu_count() or 1))
    with open_checkpoint(source) as checkpoint:
        for layer in config.moe_layers:
            logits = x @ checkpoint.read(names.layer(layer, names.GATE)).T
            bias = bias_for(config, logits, wanted_loads(curve, layer))
            given[names.layer(layer, names.GATE_BIAS)] = bias.tolist()
    torch.set_num_threads(threads)
    return write_random_source(directory, shape, distinct_experts=distinct_experts, given=given)


def summary(load: Floats, experts_per_worker: int = 1) -> dict[str, float]:
    """Of one layer's loads [experts]: busiest expert and busiest worker of consecutive experts, over their means."""
    by_worker = load.reshape(-1, experts_per_worker).sum(axis=1)
    return {
        "busiest_expert": round(float(load.max() / load.mean()), 3),
        "busiest_tenth": round(float(np.sort(load)[-max(1, len(load) // 10) :].sum() / load.sum()), 3),
        "busiest_worker": round(float(by_worker.max() / by_worker.mean()), 3),
    }  # fmt: skip
