"""Processes of `atoll up` on GPUs are killed under streams: nobody else falls, and no token changes.

    python -m tests.bench.gpu.kills [--model deploy/demo/model] [--streams 6] [--rounds 4] [--out FILE]

Clients ask for continuations without a pause. In every round an expert is killed while it owes a block, two at once, a
router, an expert with a router, and an attention worker, whose requests fail; of the others no request is lost. All
streams finish a request between two kills. Seconds are from the kill to the successors being ready; `fell` are those
that nobody killed and that have a successor all the same.
"""

import argparse
import asyncio
import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.bench.gpu.environment import gpu_facts
from tests.e2e.harness import Cluster
from tests.e2e.kills import eventually, pid_of, replaced, state, stop_while_they_owe

NUM_TOKENS = 64
Names = tuple[tuple[str, int], ...]


def victims(rounds: int, experts: int, routers: int) -> list[Names]:
    """Who is killed, one group after the other."""
    groups: list[Names] = []
    for i in range(rounds):
        at = [("expert", (7 * (4 * i + j)) % experts) for j in range(4)]
        router = ("router", i % routers)
        groups += [(at[0],), (at[1], at[2]), (router,), (at[3], router), (("attention", i % 2),)]
    return groups


async def kill(cluster: Cluster, group: Names) -> dict[str, Any]:
    """Experts, the first of a group, while they owe a block, others as they are."""
    before = await pids_of(cluster)
    experts = [index for role, index in group if role == "expert"]
    pids = [
        await eventually(partial(pid_of, cluster, role, index), f"{role}-{index} is up")
        for role, index in group
        if role != "expert"
    ]
    pids = (await stop_while_they_owe(cluster, *experts) if experts else []) + pids
    started = time.monotonic()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for (role, index), pid in zip(group, pids, strict=True):
        await replaced(cluster, role, index, pid)
    seconds, after = round(time.monotonic() - started, 2), await pids_of(cluster)
    killed = [f"{role}-{index}" for role, index in group]
    fell = [name for name, pid in before.items() if name not in killed and after.get(name) != pid]
    row = {"killed": killed, "ready_again_s": seconds, "fell": fell}
    print(json.dumps(row), flush=True)
    return row


async def pids_of(cluster: Cluster) -> dict[str, int]:
    """Of every process."""
    return {f"{p['role']}-{p['index']}": p["pid"] for p in await state(cluster)}


async def scenario(
    cluster: Cluster, prompts: list[list[int]], groups: list[Names]
) -> tuple[list[dict[str, Any]], list[list[list[int]]]]:
    """The kills, and what every stream got meanwhile."""
    name, done = await asyncio.to_thread(lambda: cluster.model), asyncio.Event()
    answers: list[list[list[int]]] = [[] for _ in prompts]
    rows: list[dict[str, Any]] = []
    failed, may_fail = 0, False

    async def ask_for_ever(prompt: list[int], out: list[list[int]]) -> None:
        nonlocal failed
        while not done.is_set():
            try:
                out.append(await cluster.continuation(name, prompt, NUM_TOKENS))
            except AssertionError:  # an answer of HTTP that is none
                if not may_fail:
                    raise
                failed += 1

    async with asyncio.TaskGroup() as tasks:
        for prompt, out in zip(prompts, answers, strict=True):
            tasks.create_task(ask_for_ever(prompt, out))
        try:
            for group in groups:
                failed, may_fail = 0, ("attention", 0) in group or ("attention", 1) in group
                rows.append(await kill(cluster, group))
                finished = [len(out) for out in answers]
                await eventually(partial(_has_gone_on, answers, finished), "every stream goes on")
                rows[-1]["failed"] = failed
        finally:
            done.set()
    return rows, answers


async def _has_gone_on(answers: list[list[list[int]]], finished: list[int]) -> bool:
    return all(len(out) > n for out, n in zip(answers, finished, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("deploy/demo/model"))
    parser.add_argument("--device", default="cuda", help="cpu: to try it without GPUs")
    parser.add_argument("--routers", type=int, default=3)
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    layout = f"--nodes 1 --attention 2 --routers {args.routers} --routers-divide blocks".split()
    devices = ["--device", args.device, *["--oversubscribe"] * (args.device == "cuda")]
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(3, 250, (4 + i,), generator=generator).tolist() for i in range(args.streams)
    ]
    options = ("--model", str(args.model), *layout, *devices)
    with Cluster(*options, start_deadline_s=240) as cluster:
        experts = sum(p["role"] == "expert" for p in cluster.processes)
        before = [cluster.generate([prompt], NUM_TOKENS)[0] for prompt in prompts]
        groups = victims(args.rounds, experts, args.routers)
        rows, answers = asyncio.run(scenario(cluster, prompts, groups))
        resent = sum(counters["resent"] for counters in cluster.counters("router"))
    num_changed = sum(a != wanted for got, wanted in zip(answers, before, strict=True) for a in got)
    found = {
        "experts": experts, "routers": args.routers, "streams": args.streams, "tokens": NUM_TOKENS,
        "requests": sum(map(len, answers)), "failed": sum(row["failed"] for row in rows), "changed": num_changed,
        "resent_to_experts": resent, "rows": rows,
    }  # fmt: skip
    print(json.dumps(found | {"rows": len(rows)}), flush=True)
    if args.out:
        args.out.write_text(json.dumps(gpu_facts() | found, indent=1) + "\n")
    fell = [name for row in rows for name in row["fell"]]
    if num_changed or fell:
        raise SystemExit(f"{num_changed} answers have other tokens; killed by nobody: {fell}")


if __name__ == "__main__":
    main()
