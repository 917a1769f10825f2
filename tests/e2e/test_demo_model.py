"""The shipped model through the real cluster: perplexity on the FP8 wire, greedy continuations on the exact one."""

import asyncio
import json

import pytest

from tests.demo_model import MODEL, REFERENCE, held_out, perplexity
from tests.e2e.harness import Cluster

MAX_PERPLEXITY_CHANGE = 0.01
CONCURRENT = 4


async def prompt_log_probs(
    cluster: Cluster, model: str, windows: list[list[int]]
) -> list[list[float]]:
    """log p of every token but the first of each window, as the API reports them."""
    limit = asyncio.Semaphore(CONCURRENT)

    async def one(ids: list[int]) -> list[float]:
        body = {"model": model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
        async with limit:
            answer = await cluster.fetch("POST", "/v1/completions", body)
        first, *rest = answer["choices"][0]["logprobs"]["token_logprobs"]
        assert first is None
        return rest

    return await asyncio.gather(*(one(ids) for ids in windows))


@pytest.mark.oracle
@pytest.mark.timeout(300)
def test_perplexity_of_all_that_was_held_out():
    metrics = json.loads((REFERENCE / "metrics.json").read_text())
    check_perplexity([window.ids for window in held_out()], metrics["perplexity"])


def test_perplexity_of_the_held_out_documentation():
    """A quarter of it; `make test-oracle` looks at all."""
    metrics = json.loads((REFERENCE / "metrics.json").read_text())["by_source"]
    windows = [window.ids for window in held_out() if window.source == "docs"]
    check_perplexity(windows, metrics["docs"]["perplexity"])


def check_perplexity(windows: list[list[int]], expected: float) -> None:
    """On the FP8 wire it is within one percent of transformers'."""
    with Cluster("--model", str(MODEL), "--wire", "fp8", "--microbatches", "1") as cluster:
        values = asyncio.run(prompt_log_probs(cluster, cluster.model, windows))
    seen = dict(zip(map(tuple, windows), values, strict=True))
    ours = perplexity(windows, lambda ids: seen[tuple(ids)])
    print(f"held-out perplexity {ours:.3f} with the FP8 wire, transformers in fp32 {expected:.3f}")
    assert abs(ours / expected - 1) < MAX_PERPLEXITY_CHANGE


def test_greedy_continuations_on_the_exact_wire_are_those_of_transformers():
    recorded = json.loads((REFERENCE / "greedy.json").read_text())[::2]
    prompts = [entry["prompt_ids"] for entry in recorded]
    with Cluster("--model", str(MODEL), "--wire", "fp32") as cluster:
        ours = cluster.generate(prompts, 64)
    assert ours == [entry["token_ids"] for entry in recorded]
