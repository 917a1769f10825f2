"""Processes are killed under load: no request is lost, and no token changes."""

import asyncio
import os
import signal
from typing import Any

import pytest
import torch

from tests.e2e.harness import Cluster
from tests.e2e.kills import eventually, replaced, state, stop_while_they_owe
from tests.oracle.configs import CONFIGS
from tests.oracle.reference import build_checkpoint

NUM_STREAMS = 8
NUM_TOKENS = 64
ARGUMENTS = ("--wire", "fp32", "--nodes", "2", "--attention", "2", "--microbatches", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_checkpoint(tmp_path_factory.getbasetemp() / CONFIGS[0].name, CONFIGS[0])


@pytest.fixture(scope="module")
def undisturbed(model):
    """A cluster for all kills that leave it whole, and what it answers before any of them."""
    with Cluster("--model", str(model), *ARGUMENTS) as cluster:
        yield cluster, cluster.generate(prompts(), NUM_TOKENS)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = range(4, 4 + NUM_STREAMS)
    return [torch.randint(0, 250, (n,), generator=generator).tolist() for n in lengths]


async def kill_while_it_owes(cluster: Cluster, expert: int) -> None:
    """And wait for its successor."""
    (victim,) = await stop_while_they_owe(cluster, expert)
    os.kill(victim, signal.SIGKILL)
    await replaced(cluster, "expert", expert, victim)


def test_ten_killed_experts_cost_no_request_and_no_token(undisturbed):
    cluster, expected = undisturbed
    name = cluster.model

    async def scenario() -> list[list[list[int]]]:
        async def ask_for_ever(prompt: list[int], out: list[list[int]]) -> None:
            while not done.is_set():
                out.append(await cluster.continuation(name, prompt, NUM_TOKENS))

        done = asyncio.Event()
        results: list[list[list[int]]] = [[] for _ in expected]
        async with asyncio.TaskGroup() as tasks:
            for prompt, out in zip(prompts(), results, strict=True):
                tasks.create_task(ask_for_ever(prompt, out))
            for kill in range(10):
                await kill_while_it_owes(cluster, (kill * 7) % 16)
            done.set()
        return results

    results = asyncio.run(scenario())
    resent = sum(counters["resent"] for counters in cluster.counters("router"))
    links = [counters["carriers"] for counters in cluster.counters("router")]
    assert [sum(name.startswith("expert") for name in peers) for peers in links] == [8, 8]
    assert all(carriers == ["tcp/lo"] for peers in links for carriers in peers.values())
    assert resent >= 10, "no block was owed by a killed expert"
    for stream, (runs, wanted) in enumerate(zip(results, expected, strict=True)):
        assert runs, f"stream {stream} finished nothing"
        assert all(tokens == wanted for tokens in runs), f"stream {stream} changed its tokens"


@pytest.mark.parametrize("role", ["router", "attention"])
def test_a_killed_router_or_attention_worker_leaves_a_whole_service(undisturbed, role):
    check_whole_after_a_kill(*undisturbed, role)


def test_a_killed_router_of_two_rails_leaves_a_whole_service(model, undisturbed):
    with Cluster("--model", str(model), *ARGUMENTS, "--routers", "2") as cluster:
        check_whole_after_a_kill(cluster, undisturbed[1], "router")


def test_a_killed_router_whose_blocks_another_takes_costs_no_request(model, undisturbed):
    arguments = (*ARGUMENTS, "--routers", "2", "--routers-divide", "blocks")
    with Cluster("--model", str(model), *arguments) as cluster:
        check_whole_after_a_kill(cluster, undisturbed[1], "router", may_fail=False)


def check_whole_after_a_kill(
    cluster: Cluster, expected: list[list[int]], role: str, *, may_fail: bool = True
) -> None:
    """Its requests may fail, with a sentence; then the service is whole again within seconds."""
    name = cluster.model
    victim = next(p["pid"] for p in cluster.state_or_nothing() if p["role"] == role)

    async def scenario() -> list[Any]:
        async def kill_later() -> None:
            await asyncio.sleep(0.3)
            os.kill(victim, signal.SIGKILL)

        posts = [cluster.continuation(name, prompt, NUM_TOKENS) for prompt in prompts()]
        answers = await asyncio.gather(*posts, kill_later(), return_exceptions=True)

        async def whole() -> bool:
            entries = await state(cluster)
            return all(p["state"] == "ready" for p in entries) and victim not in {
                p["pid"] for p in entries
            }

        await eventually(whole, f"a new {role} is ready", within_s=20)
        return answers[:-1]

    for answer, wanted in zip(asyncio.run(scenario()), expected, strict=True):
        if isinstance(answer, BaseException):
            assert may_fail, str(answer)
            assert "attention-" in str(answer) or "router" in str(answer), str(answer)
        else:
            assert answer == wanted
    assert cluster.generate(prompts(), NUM_TOKENS) == expected
