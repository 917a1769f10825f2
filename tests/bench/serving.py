"""Tokens per second of a local cluster against `transformers` in one process, same checkpoint, cores, dtype and batch.

    python -m tests.bench.serving [--model DIR] [--concurrency 1,16] [--tokens 64] [--out FILE]

Both sides decode greedily in fp32 from the same random prompts. transformers runs `generate` on the whole batch, with
1 and with 2 threads; its better figure counts. The cluster is EP16 (or --ep) on 2 nodes, driven over HTTP.
"""

import argparse
import json
import platform
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

from tests.e2e.harness import Cluster

PROMPT_TOKENS = 16
REPEATS = 5


def prompts_for(batch: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(3, vocab_size, (batch, PROMPT_TOKENS), generator=generator).tolist()


def cluster_rate(cluster: Cluster, prompts: list[list[int]], tokens: int) -> list[float]:
    """Tokens per second of `REPEATS` runs, all prompts at once."""
    rates = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        answers = cluster.generate(prompts, tokens)
        elapsed = time.perf_counter() - started
        rates.append(sum(map(len, answers)) / elapsed)
    return rates[1:]  # the first is a warm-up


def transformers_rate(model, prompts: list[list[int]], tokens: int) -> tuple[list[float], int]:
    """Rates at the better of 1 and 2 threads, and that number of threads."""
    best: tuple[list[float], int] = ([0.0], 0)
    batch = torch.tensor(prompts)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rates = []
        for _ in range(REPEATS + 1):
            started = time.perf_counter()
            out = model.generate(
                batch, attention_mask=torch.ones_like(batch), do_sample=False, pad_token_id=0,
                max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None,
            )  # fmt: skip
            rates.append((out.numel() - batch.numel()) / (time.perf_counter() - started))
        if median(rates[1:]) > median(best[0]):
            best = rates[1:], threads
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--concurrency", default="1,16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes = [int(n) for n in args.concurrency.split(",")]
    from tests.oracle.reference import Reference  # transformers takes seconds to import

    reference = Reference(args.model, Path(tempfile.mkdtemp())).model
    vocab_size = reference.config.vocab_size
    rows = []
    for size in sizes:
        prompts = prompts_for(size, vocab_size)
        theirs, threads = transformers_rate(reference, prompts, args.tokens)
        with Cluster(
            "--model", str(args.model), "--wire", "fp32", "--microbatches", str(args.microbatches)
        ) as cluster:
            ours = cluster_rate(cluster, prompts, args.tokens)
        rows.append(
            {
                "concurrency": size, "ours": median(ours), "ours_min": min(ours), "ours_max": max(ours),
                "transformers": median(theirs), "transformers_threads": threads,
                "ratio": median(ours) / median(theirs),
            }
        )  # fmt: skip
        print(f"concurrency {size:3}: ours {median(ours):7.1f} tokens/s, transformers {median(theirs):7.1f}"
              f" ({threads} threads), ratio {rows[-1]['ratio']:.2f}", flush=True)  # fmt: skip
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    report = {
        "commit": commit, "date": datetime.now(UTC).date().isoformat(), "cpu": platform.processor(),
        "torch": torch.__version__, "model": args.model.name, "microbatches": args.microbatches, "rows": rows,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
