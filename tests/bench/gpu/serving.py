"""A model at its full width on the cards of this machine: tokens per second over HTTP, and where a layer's time goes.

    python -m tests.bench.gpu.serving [--preset deepseek-v3 | --model DIR] [--layers 8] [--workers 8]
        [--concurrency 32,128,512] [--microbatches 1,2,3] [--trace] [--out FILE]

One attention worker on GPU 0, expert workers on GPU 1; with a preset, weights are random and `--distinct` experts of
a layer play all of them. Every request has a prompt of 16 tokens and is decoded greedily to its full length. With
--trace the last run of each setting is recorded: medians per layer, exposed communication in percent of the step,
the same steps on a wire that costs nothing.
"""

import argparse
import asyncio
import json
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from common.model.presets import preset_config, write_random_source
from common.obs.trace import DIRECTORY
from deploy.trace.blocks import blocks
from deploy.trace.chrome import chrome_trace
from deploy.trace.report import make_report
from deploy.trace.spans import read
from tests.bench.gpu.cluster import GpuCluster, gpu_config, mps
from tests.bench.gpu.environment import gpu_facts

PROMPT_TOKENS = 16
_REQUEST_S = 300.0


async def generate(url: str, concurrency: int, tokens: int) -> float:
    """Seconds for `concurrency` requests of `tokens` tokens each, all at once."""
    timeout = aiohttp.ClientTimeout(total=_REQUEST_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        async with session.get("/v1/models") as response:
            model = (await response.json())["data"][0]["id"]

        async def one(number: int) -> None:
            prompt = [3 + (7 * number + 13 * i) % 251 for i in range(PROMPT_TOKENS)]
            body = {
                "model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True,
                "temperature": 0, "return_token_ids": True,
            }  # fmt: skip
            async with session.post("/v1/completions", json=body) as response:
                answer = await response.json()
                if response.status != 200:
                    raise RuntimeError(f"HTTP {response.status}: {answer}")
                found = answer["choices"][0]["token_ids"]
                assert len(found) == tokens, found

        started = time.perf_counter()
        await asyncio.gather(*(one(i) for i in range(concurrency)))
        return time.perf_counter() - started


def attention_counters(url: str) -> dict[str, int]:
    """Of the attention worker: layers, and microseconds of its loop in what it launches and posts for them."""
    with urllib.request.urlopen(f"{url}/cluster", timeout=20) as response:
        processes = json.load(response)["processes"]
    (counters,) = [p["counters"] for p in processes if p["role"] == "attention"]
    return {name: int(counters[name]) for name in ("layers", "attention_us", "shared_us")}


def measure(cluster: GpuCluster, concurrency: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Two lengths, so that prompts and start-up cancel out; medians, after a warm-up that captures the graphs."""
    lengths = (max(4, tokens // 4), tokens)
    before: dict[str, int] = {}
    seconds: dict[int, list[float]] = {length: [] for length in lengths}
    for number in range(1 + repeats):
        if number == 1:
            before = attention_counters(cluster.url)
        for length in lengths:
            seconds[length].append(asyncio.run(generate(cluster.url, concurrency, length)))
    brief, whole = (median(seconds[length][1:]) for length in lengths)
    decode_s = (whole - brief) / (tokens - lengths[0])
    after = attention_counters(cluster.url)
    layers, python_us = (
        sum(after[name] - before[name] for name in names)
        for names in (["layers"], ["attention_us", "shared_us"])
    )
    return {
        "concurrency": concurrency, "tokens_per_s": round(concurrency * tokens / whole, 1),
        "decode_tokens_per_s": round(concurrency / decode_s, 1), "tpot_ms": round(decode_s * 1e3, 2),
        "python_us_per_layer": round(python_us / layers, 1),
        "runs_s": {length: [round(t, 3) for t in runs] for length, runs in seconds.items()},
    }  # fmt: skip


def trace_report(run_dir: Path, steps: int, out: Path | None) -> dict[str, Any]:
    """What the trace of the last steps says."""
    processes = read(run_dir / DIRECTORY)
    report = make_report(processes, steps=steps)
    print(report.text(), flush=True)
    if out is not None:
        out.write_text(json.dumps(chrome_trace(processes, blocks(processes))))
    found = report.to_json()
    del found["layers"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", default="deepseek-v3")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--distinct", type=int, default=32)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--divide", default="destinations", help="as in the cluster's file")
    parser.add_argument("--concurrency", default="32,128,512")
    parser.add_argument("--microbatches", default="1,2,3")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="medians of so many runs")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--trace-file", type=Path, help="Chrome trace of the last setting")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes, lanes = ([int(n) for n in v.split(",")] for v in (args.concurrency, args.microbatches))
    rows = []
    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch, mps():
        model = args.model and args.model.absolute()
        if model is None:
            shape = preset_config(args.preset, layers=args.layers)
            model = write_random_source(
                Path(scratch) / args.preset, shape, distinct_experts=args.distinct
            )
        experts = json.loads((model / "config.json").read_text())["n_routed_experts"]
        for number, m in enumerate(lanes):
            config = gpu_config(
                model, Path(scratch) / f"run-{number}", experts=args.workers, nodes=args.nodes,
                experts_per_gpu=-(-experts // args.workers), routers=args.routers, divide=args.divide,
                microbatches=m, max_requests=max(sizes),
                trace_events=(1 << 16) * int(args.trace),
            )  # fmt: skip
            started = time.perf_counter()
            with GpuCluster(config) as cluster:
                ready_s = time.perf_counter() - started
                for size in sizes:
                    row = {"microbatches": m, "ready_s": round(ready_s, 1)}
                    try:
                        row |= measure(cluster, size, args.tokens, args.repeats)
                    except Exception:
                        print(cluster.logs(), flush=True)
                        raise
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                run_dir = cluster.config.cluster.run_dir
            if args.trace:
                rows[-1]["trace"] = trace_report(run_dir, 16 * m, args.trace_file)
    if args.out:
        layout = {
            "workers": args.workers,
            "nodes": args.nodes,
            "routers": args.routers,
            "divide": args.divide,
        }
        if args.model is None:
            layout |= {"model": args.preset, "layers": args.layers, "distinct": args.distinct}
        else:
            layout |= {"model": model.name}
        args.out.write_text(json.dumps(gpu_facts() | layout | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
