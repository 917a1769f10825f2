"""Tokens per second of a local cluster against `transformers` in one process, same checkpoint, cores, dtype and batch.

    python -m tests.bench.serving [--size small|medium] [--concurrency 1,16] [--tokens 64] [--out FILE]

Both sides decode greedily in fp32 from the same random prompts. transformers runs `generate` on the whole batch, with
1 and with 2 threads, eager and default expert implementation; its best figure counts. The cluster has one expert
per worker (EP16 for the small model) and is driven over HTTP.

Beside the rates, which share the machine with whatever else runs, stands the CPU time per token, user and system, of
all processes of the cluster and of transformers' process: on a machine whose cores are full, rates go by that.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch

from common.model.small import small_config
from common.model.writer import write_random
from tests.bench.cluster import cpu_s
from tests.bench.environment import facts
from tests.e2e.harness import Cluster
from tests.oracle.reference import Reference

PROMPT_TOKENS = 16
REPEATS = 3
# The small one shows what processes and messages cost, the medium one what is left of that when experts have real work.
SIZES: dict[str, dict[str, Any]] = {
    "small": {},
    "medium": {
        "hidden_size": 1024, "moe_intermediate_size": 1024, "intermediate_size": 2048,
        "q_lora_rank": 256, "kv_lora_rank": 128, "num_attention_heads": 8, "num_key_value_heads": 8,
    },
}  # fmt: skip
Rate = tuple[list[float], str, float]  # tokens/s, how, CPU us per token


def prompts_for(batch: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(3, vocab_size, (batch, PROMPT_TOKENS), generator=generator).tolist()


def cluster_cpu_us(cluster: Cluster) -> Counter[str]:
    """CPU microseconds that the cluster's processes have used, by role."""
    used: Counter[str] = Counter()
    for process in cluster.processes:
        used[process["role"]] += round(cpu_s(process["pid"]) * 1e6)
    return used


def cluster_rate(
    cluster: Cluster, prompts: list[list[int]], tokens: int
) -> tuple[list[float], dict[str, float]]:
    """Rates of `REPEATS` runs, all prompts at once, and CPU microseconds per token by role."""
    cluster.generate(prompts, tokens)  # a warm-up
    rates, made, before = [], 0, cluster_cpu_us(cluster)
    for _ in range(REPEATS):
        started = time.perf_counter()
        count = sum(map(len, cluster.generate(prompts, tokens)))
        rates.append(count / (time.perf_counter() - started))
        made += count
    used = cluster_cpu_us(cluster) - before
    return rates, {role: us / made for role, us in sorted(used.items())}


def transformers_rate(models: dict[str, Any], prompts: list[list[int]], tokens: int) -> Rate:
    """The best of both expert implementations and of 1 and 2 threads, by median."""
    best: Rate = ([0.0], "", 0.0)
    batch = torch.tensor(prompts)
    for (name, model), threads in itertools.product(models.items(), (1, 2)):
        torch.set_num_threads(threads)
        rates, cpu = [], []
        for _ in range(REPEATS + 1):
            started, cpu_started = time.perf_counter(), time.process_time()
            out = model.generate(
                batch, attention_mask=torch.ones_like(batch), do_sample=False, pad_token_id=0,
                max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None,
            )  # fmt: skip
            made = out.numel() - batch.numel()
            rates.append(made / (time.perf_counter() - started))
            cpu.append((time.process_time() - cpu_started) / made * 1e6)
        if median(rates[1:]) > median(best[0]):
            best = rates[1:], f"{name} experts, {threads} threads", median(cpu[1:])
    return best


def load_transformers(checkpoint: Path) -> dict[str, Any]:
    """transformers' model in fp32 with eager experts, and with its own choice."""
    from transformers import AutoModelForCausalLM  # takes seconds to import

    scratch = Path(tempfile.mkdtemp())
    eager = Reference(checkpoint, scratch).model
    own = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32).eval()
    return {"eager": eager, "default": own}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="checkpoint (default: a random one of --size)")
    parser.add_argument("--size", choices=SIZES, default="small", help="width 128 or 1024 (small)")
    parser.add_argument("--concurrency", default="1,16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--cluster", default="--nodes 1 --attention 1 --microbatches 1",
        help="options of atoll up (one node, one attention worker and one micro-batch suit two cores)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.model is None:
        args.model = Path(tempfile.mkdtemp()) / f"{args.size}-random"
        write_random(args.model, small_config() | SIZES[args.size], storage="BF16")
    sizes = [int(n) for n in args.concurrency.split(",")]
    models = load_transformers(args.model)
    vocab_size = models["eager"].config.vocab_size
    rows: list[dict[str, object]] = []
    options = ["--wire", "fp32", *args.cluster.split()]
    for size in sizes:
        prompts = prompts_for(size, vocab_size)
        theirs, how, their_cpu_us = transformers_rate(models, prompts, args.tokens)
        with Cluster("--model", str(args.model), *options) as cluster:
            ours, roles_cpu_us = cluster_rate(cluster, prompts, args.tokens)
        our_cpu_us = sum(roles_cpu_us.values())
        rows.append(
            {
                "concurrency": size, "ours": median(ours), "ours_min": min(ours), "ours_max": max(ours),
                "transformers": median(theirs), "transformers_best": how,
                "ratio": median(ours) / median(theirs), "cpu_us": our_cpu_us, "transformers_cpu_us": their_cpu_us,
                "cpu_us_by_role": roles_cpu_us,
            }
        )  # fmt: skip
        print(f"concurrency {size:3}: ours {median(ours):7.1f} tokens/s, transformers {median(theirs):7.1f}"
              f" ({how}), ratio {rows[-1]['ratio']:.2f}; CPU us/token {our_cpu_us:.0f} and {their_cpu_us:.0f}",
              flush=True)  # fmt: skip
    layout = {"model": args.model.name, "cluster": options}
    if args.out:
        args.out.write_text(json.dumps(facts() | layout | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
