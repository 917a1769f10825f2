"""A model whose gates prefer one expert: with `gate_bias_max` it gets fewer rows, without that nothing changes."""

import asyncio

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.ids import Role
from common.model.small import small_config
from common.model.writer import write_random
from tests.inproc_cluster import inproc_cluster

BUSY, ROUNDS = 3, 40
V2 = {
    "model_type": "deepseek_v2", "topk_method": "greedy", "n_group": None, "topk_group": None,
    "norm_topk_prob": False, "routed_scaling_factor": 1.0,
}  # fmt: skip


def skewed(directory, overrides):
    """Every gate prefers `BUSY`: by its bias, or where it has none by larger scores."""
    write_random(directory, small_config() | {"num_hidden_layers": 3} | overrides, seed=5)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[BUSY] += 0.3
        elif overrides and name.endswith("mlp.gate.weight"):
            tensor[BUSY] *= 2.5
    save_file(tensors, directory / "model.safetensors")
    return directory


def texts():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 250, (4, 100), generator=generator).tolist() * (ROUNDS // 4)


async def busiest(model, run_dir, most):
    """Rows of `BUSY` over the mean of all experts in the last rounds, all logits, the worker's counters."""
    async with inproc_cluster(model, run_dir, wire="bf16", gate_bias_max=most) as cluster:
        experts = cluster.of(Role.EXPERT)
        logits, before = [], []
        for i, text in enumerate(texts()):
            if i == ROUNDS - 4:
                before = [sum(e.bank.rows.values()) for e in experts]
            logits.append(await cluster.logits(text))
        rows = [sum(e.bank.rows.values()) for e in experts]
        late = [b - a for a, b in zip(before, rows, strict=True)]
        (attention,) = cluster.of(Role.ATTENTION)
        counters = attention._status().to_json()["counters"]
        return late[BUSY] * len(late) / sum(late), logits, counters


@pytest.mark.parametrize(("overrides", "most"), [({}, 0.5), (V2, 0.1)], ids=["v3", "v2"])
def test_the_busiest_experts_load_falls(overrides, most, tmp_path, caplog):
    torch.set_num_threads(1)
    model = skewed(tmp_path / "model", overrides)
    off, logits, counters = asyncio.run(busiest(model, tmp_path / "off", 0.0))
    assert not [name for name in counters if name.startswith("gate")]
    assert "gate_bias_max" not in caplog.text
    on, others, counters = asyncio.run(busiest(model, tmp_path / "on", most))
    assert off > 1.4
    assert on < 1.3
    assert counters["gate_lowered"] >= 1
    assert 0 < counters["gate_largest_bias"] <= most
    (said,) = [r.getMessage() for r in caplog.records if "gate_bias_max" in r.getMessage()]
    assert "outputs differ from the model's own" in said
    assert torch.equal(others[0], logits[0]), "until enough rows have been counted"
    assert not torch.equal(others[-1], logits[-1])
