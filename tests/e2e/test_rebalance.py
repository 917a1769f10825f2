"""A real cluster goes from plan to plan under eight streams: every request ends well, every token is the same."""

import asyncio
import json
import os
import random
import signal

import pytest
import torch

from common.model.hf_config import load_config
from common.placement.plan import Plan
from common.plan_file import write_plan
from tests.e2e.harness import ATOLL, Cluster
from tests.e2e.kills import eventually
from tests.oracle.configs import CONFIGS
from tests.oracle.reference import build_checkpoint

NUM_STREAMS, NUM_TOKENS = 8, 64
EXPERTS, NODES = 16, (0,) * 8 + (1,) * 8
ARGUMENTS = (
    "--wire",
    "fp32",
    "--nodes",
    "2",
    "--attention",
    "2",
    "--microbatches",
    "2",
    "--routers",
    "2",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_checkpoint(tmp_path_factory.getbasetemp() / CONFIGS[0].name, CONFIGS[0])


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(0, 250, (n,), generator=generator).tolist() for n in range(4, 4 + NUM_STREAMS)
    ]


def shuffled(model, seed: int) -> Plan:
    rng = random.Random(seed)
    layers = load_config(model).moe_layers
    holders = {layer: tuple((w,) for w in rng.sample(range(EXPERTS), EXPERTS)) for layer in layers}
    return Plan(0, holders, NODES)


async def rebalance(cluster: Cluster, *arguments: object) -> tuple[int, str]:
    """`atoll rebalance` as a user runs it: exit code and what it said."""
    child = await asyncio.create_subprocess_exec(
        ATOLL, "rebalance", cluster.url, *map(str, arguments),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(child.communicate(), 120)
    return child.returncode or 0, out.decode()


@pytest.mark.timeout(300)
def test_tokens_are_those_of_the_undisturbed_run(model, tmp_path):
    plans = []
    for seed in range(2):
        plans.append(tmp_path / f"plan-{seed}.json")
        write_plan(plans[-1], shuffled(model, seed))

    async def disturbed(cluster: Cluster) -> tuple[list[list[list[int]]], list[tuple[int, str]]]:
        name, over = cluster_model, asyncio.Event()

        async def again_and_again(prompt: list[int]) -> list[list[int]]:
            found = []
            while not over.is_set():
                found.append(await cluster.continuation(name, prompt, NUM_TOKENS))
            return found

        streams = [asyncio.ensure_future(again_and_again(prompt)) for prompt in prompts()]
        await asyncio.sleep(0.3)
        answers = [await rebalance(cluster, "--plan", plans[0])]
        answers.append(await rebalance(cluster))
        answers.append(await rebalance(cluster, "--plan", plans[1]))
        over.set()
        return list(await asyncio.gather(*streams)), answers

    with Cluster("--model", str(model), *ARGUMENTS, "--run-dir", str(tmp_path / "run")) as cluster:
        expected = cluster.generate(prompts(), NUM_TOKENS)
        cluster_model = cluster.model
        streams, answers = asyncio.run(disturbed(cluster))
        for found, row in zip(streams, expected, strict=True):
            assert found == [row] * len(found)
        for epoch, (code, out) in enumerate(answers, start=2):
            assert code == 0, out
            assert f"epoch {epoch} is in force" in out
        state = cluster.get("/cluster")
        assert state["placement"] | {"digest": 0} == {
            "epoch": 4, "served": [4], "rebalancing": False, "digest": 0
        }  # fmt: skip
        assert Plan.from_json(cluster.get("/plan")).digest == shuffled(model, 1).digest
        failed = [c["failed"] for role in ("router", "expert") for c in cluster.counters(role)]
        assert not any(failed)

        for role, index in (("expert", 5), ("router", 3)):  # they come back to the plan in force
            (before,) = [
                p["pid"] for p in state["processes"] if (p["role"], p["index"]) == (role, index)
            ]
            os.kill(before, signal.SIGKILL)

            async def back(role=role, index=index, before=before) -> bool:
                processes = (await cluster.fetch("GET", "/cluster"))["processes"]
                (found,) = [p for p in processes if (p["role"], p["index"]) == (role, index)]
                return found["state"] == "ready" and found["pid"] not in (None, before)

            asyncio.run(eventually(back, f"{role}-{index} is back"))
        assert cluster.generate(prompts(), NUM_TOKENS) == expected

    with Cluster("--model", str(model), *ARGUMENTS, "--run-dir", str(tmp_path / "run")) as cluster:
        assert cluster.get("/cluster")["placement"]["served"] == [4], "a second start"
        assert cluster.generate(prompts()[:2], 32) == [row[:32] for row in expected[:2]]


def test_what_cannot_be_done_is_one_sentence(model, tmp_path):
    with Cluster("--model", str(model), *ARGUMENTS) as cluster:
        code, out = asyncio.run(rebalance(cluster))
        assert (code, out.count("\n")) == (1, 1), out
        assert "has had 0 rows so far, a plan needs at least 64" in out
        wrong = Plan(0, {9: ((0,),) * EXPERTS}, NODES)
        write_plan(tmp_path / "wrong.json", wrong)
        code, out = asyncio.run(rebalance(cluster, "--plan", tmp_path / "wrong.json"))
        assert (code, out.count("\n")) == (2, 1), out
        assert "the plan has layers 9 to 9" in out
        cluster.generate(prompts(), 24)
        code, out = asyncio.run(rebalance(cluster, "--dry-run", "--out", tmp_path / "found.json"))
        assert code == 0, out
        assert json.loads((tmp_path / "found.json").read_text())["epoch"] == 2
        assert cluster.get("/cluster")["placement"]["served"] == [1]
        metrics = asyncio.run(_text(cluster, "/metrics"))
        assert 'atoll_expert_rows_per_second{expert="15"' in metrics


async def _text(cluster: Cluster, path: str) -> str:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.get(cluster.url + path) as response:
        return await response.text()
