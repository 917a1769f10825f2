"""What a rebalance costs those who are being answered: time between tokens of eight streams, with and without one.

    python -m tests.bench.rebalance [--size small|medium] [--tokens 192] [--repeats 3] [--out FILE]

Three kinds of run in turn, on one cluster (EP16, 2 nodes, 2 attention workers, fp32): undisturbed; with a plan given
that moves nearly every expert; with `atoll rebalance`'s own search, which runs in a child process on the same cores.
Figures are over all gaps between tokens of all runs of a kind, prompts left out. Tokens must be equal in all runs.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from common.model.hf_config import load_config
from common.model.small import small_config
from common.model.writer import write_random
from common.placement.plan import Plan
from tests.bench.environment import facts
from tests.bench.serving import SIZES, prompts_for
from tests.e2e.harness import Cluster

STREAMS, WORKERS = 8, 16
OPTIONS = ("--wire", "fp32", "--ep", str(WORKERS), "--nodes", "2", "--attention", "2")
KINDS = ("undisturbed", "given plan", "own search")


async def stream(
    session: aiohttp.ClientSession, model: str, prompt: list[int], tokens: int
) -> tuple[list[int], list[float]]:
    """Token ids of one greedy stream, and the seconds between them."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, "stream": True,
    }  # fmt: skip
    ids: list[int] = []
    gaps: list[float] = []
    last = 0.0
    async with session.post("/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            new = json.loads(line[6:])["choices"][0].get("token_ids") or []
            now = time.perf_counter()
            if new and ids:
                gaps.append((now - last) / len(new))
            if new:
                ids += new
                last = now
    return ids, gaps


async def run(cluster: Cluster, model: str, tokens: int, body: dict[str, Any] | None) -> Any:
    """All streams at once, again and again while a rebalance lasts: token ids, gaps, the rebalance's answer."""
    timeout, over = aiohttp.ClientTimeout(total=600), asyncio.Event()
    gaps: list[float] = []

    async def again_and_again(prompt: list[int]) -> list[int]:
        first: list[int] = []
        while not first or not over.is_set():
            ids, found = await stream(session, model, prompt, tokens)
            first = first or ids
            assert ids == first, "other tokens"
            gaps.extend(found)
        return first

    async with aiohttp.ClientSession(cluster.url, timeout=timeout) as session:
        prompts = prompts_for(STREAMS, 256)
        streams = [asyncio.ensure_future(again_and_again(prompt)) for prompt in prompts]
        answer: dict[str, Any] = {}
        if body is not None:
            await asyncio.sleep(0.5)
            async with session.post("/rebalance", json=body) as response:
                answer = await response.json()
                assert response.status == 200, answer
        over.set()
        return await asyncio.gather(*streams), gaps, answer


def shuffled(layers: list[int], seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    holders = {layer: tuple((w,) for w in rng.sample(range(WORKERS), WORKERS)) for layer in layers}
    half = WORKERS // 2
    return Plan(0, holders, (0,) * half + (1,) * half).to_json()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--size", choices=tuple(SIZES), default="medium", help="checkpoint (medium)"
    )
    parser.add_argument("--tokens", type=int, default=192, help="per stream (192)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (3)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    gaps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / f"{args.size}-random"
        write_random(model, small_config() | SIZES[args.size], storage="BF16")
        layers = list(load_config(model).moe_layers)
        with Cluster("--model", str(model), *OPTIONS) as cluster:
            name, expected = cluster.model, None
            asyncio.run(run(cluster, name, 32, None))  # warm
            for repeat in range(args.repeats):
                bodies = (None, {"plan": shuffled(layers, repeat)}, {})
                for kind, body in zip(KINDS, bodies, strict=True):
                    ids, found, answer = asyncio.run(run(cluster, name, args.tokens, body))
                    expected = expected or ids
                    assert ids == expected, f"{kind}: other tokens"
                    gaps[kind] += found
                    if body is not None:
                        took[kind].append(answer["took_s"])
    rows = []
    for kind in KINDS:
        p50, p99 = (1e3 * np.percentile(gaps[kind], [50, 99])).round(1).tolist()
        row = {"kind": kind, "gaps": len(gaps[kind]), "p50_ms": p50, "p99_ms": p99,
               "max_ms": round(1e3 * max(gaps[kind]), 1)}  # fmt: skip
        if took[kind]:
            row["took_s"] = [round(s, 2) for s in took[kind]]
        rows.append(row)
        print(row, flush=True)
    layout = {
        "size": args.size,
        "streams": STREAMS,
        "tokens": args.tokens,
        "options": list(OPTIONS),
    }
    if args.out:
        args.out.write_text(json.dumps(facts() | layout | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
