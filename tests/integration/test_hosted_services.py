"""The benchmark's hosts: several real services of a process do what they do one by one, and count what they did."""

import asyncio

import pytest
import torch

from common.model.hf_config import load_config
from tests.bench.gpu.cluster import gpu_config
from tests.bench.gpu.counts import per_block
from tests.bench.gpu.ep256 import (
    Block,
    HostedCluster,
    connected,
    dense,
    measure,
    small_or_v3,
)
from tests.bench.gpu.skew import write_skewed_source

EXPERTS, NODES, TOKENS = 16, 4, 24


def test_hosted_services_answer_like_one_process_and_count_like_the_planner(tmp_path):
    model = write_skewed_source(
        tmp_path / "model", small_or_v3(EXPERTS, 128, 64), "measured", distinct_experts=EXPERTS, rows=512
    )  # fmt: skip
    config = gpu_config(model, tmp_path / "run", experts=EXPERTS, nodes=NODES, wire="fp32")

    async def main(cluster):
        async with connected(cluster) as (a, statuses):
            block = Block(a, TOKENS, seed=3)
            found = await block(a, 0)
            row = await measure(a, statuses, TOKENS, in_flight=2, rounds=1)
            return found, dense(a, block, TOKENS), row

    with HostedCluster(config, expert_hosts=2, router_hosts=1) as cluster, torch.inference_mode():
        assert len(cluster._processes) == 4
        found, wanted, row = asyncio.run(main(cluster))
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6)

    top_k = load_config(model).top_k
    assert row["experts"]["rows"] == TOKENS * top_k
    assert row["between_nodes"]["rows"] == pytest.approx(
        row["planner"]["rows_between_nodes"], abs=0.06
    )
    unicast = row["planner"]["unicast_rows_between_nodes"]
    assert row["between_nodes"]["unicast_rows"] == pytest.approx(unicast, abs=0.06)
    # a block comes and goes, a share goes to each other node and comes back, as do the rows of node 0's experts
    source, others = row["source_router"], row["other_routers"]
    assert source["messages_in"] == source["messages_out"]
    assert 2 * source["messages_in"] + 2 * (NODES - 1) * others["messages_in"] == pytest.approx(
        2 + 4 * (NODES - 1) + row["experts"]["messages"], abs=0.5
    )
    own = row["attention"]
    assert own["messages_in"] == own["messages_out"] == 1


def entry(role, **counters):
    return {"role": role, "state": "ready", "counters": counters}


@pytest.mark.parametrize("key", ["late", "failed", "rerouted", "resent"])
def test_a_run_that_lost_or_repeated_a_message_is_refused(key):
    router = dict.fromkeys(("late", "failed", "rerouted", "resent", "blocks"), 1)
    router |= dict.fromkeys(("messages_in", "messages_out", "bytes_in", "bytes_out"), 0)
    expert = dict.fromkeys(("calls", "rows", "failed", "compute_us"), 0)
    before = {"router-0": entry("router", **router), "expert-0": entry("expert", **expert)}
    own = dict.fromkeys(("messages_in", "messages_out", "bytes_in", "bytes_out"), 0)

    def after(**counters):
        return before | {"router-0": entry("router", **(router | {"blocks": 2} | counters))}

    assert per_block(before, after(), own, blocks=1)["experts"]["asked"] == 0
    with pytest.raises(AssertionError):
        per_block(before, after(**{key: 2}), own, blocks=1)
