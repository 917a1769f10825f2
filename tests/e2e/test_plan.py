"""A plan file decides where experts are, and nothing else: shuffled, with replicas, the tokens stay transformers'."""

import json
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from common.config import local_cluster
from common.ids import Role
from common.placement.plan import Plan
from common.plan_file import write_plan
from tests.demo_model import MODEL, REFERENCE
from tests.e2e.harness import ATOLL, Cluster

NUM_PROMPTS, NUM_TOKENS = 4, 64
WORKERS, LAYERS, EXPERTS = 18, range(1, 6), 16


@pytest.fixture
def cluster_toml(tmp_path):
    """18 workers on 3 nodes; every layer's 16 experts shuffled over them, and a second holder for two of them."""
    config = local_cluster(
        MODEL, ep=WORKERS, nodes=3, attention=2, experts_per_gpu=1, microbatches=2, wire="fp32",
        port=0, run_dir=tmp_path / "run",
    )  # fmt: skip
    rng = np.random.default_rng(5)
    holders = {}
    for layer in LAYERS:
        places = rng.permutation(WORKERS).tolist()
        first = [(worker,) for worker in places[:EXPERTS]]
        for expert, worker in zip((3, 11), places[EXPERTS:], strict=True):
            first[expert] = (*first[expert], worker)
        holders[layer] = tuple(first)
    nodes = tuple(spec.node for spec in config.of_role(Role.EXPERT))
    plan = Plan(9, holders, nodes)
    write_plan(tmp_path / "plan.json", plan)
    placement = replace(config.placement, plan=tmp_path / "plan.json")
    path = tmp_path / "cluster.toml"
    path.write_text(replace(config, placement=placement).to_toml())
    return path, plan


def test_a_shuffled_plan_gives_the_same_tokens_and_is_where_the_rows_go(cluster_toml):
    path, plan = cluster_toml
    runs = json.loads((REFERENCE / "greedy.json").read_text())[:NUM_PROMPTS]
    with Cluster("--cluster", str(path)) as cluster:
        tokens = cluster.generate([run["prompt_ids"] for run in runs], NUM_TOKENS)
        experts = cluster.counters("expert")
    assert tokens == [run["token_ids"] for run in runs]
    for worker, counters in enumerate(experts):
        held = {f"{layer}:{expert}" for layer, expert in plan.residents(worker)}
        assert set(counters["rows_by_expert"]) == held, f"expert-{worker} loaded something else"
    second = [
        experts[holders[1]]["rows_by_expert"][f"{layer}:{expert}"]
        for layer, layer_holders in plan.holders.items()
        for expert, holders in enumerate(layer_holders)
        if len(holders) > 1
    ]
    assert sum(second) > 0, "no replica but the first was ever asked"


def test_a_plan_for_another_cluster_is_one_sentence_and_exit_code_2(cluster_toml):
    path, plan = cluster_toml
    write_plan(path.parent / "plan.json", Plan(1, plan.holders, tuple(0 for _ in plan.nodes)))
    done = subprocess.run(
        [ATOLL, "up", "--cluster", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"atoll: plan {path.parent / 'plan.json'}: the plan is for 18")
    assert done.stderr.count("\n") == 1
