"""A model at its full width on the cards of this machine: tokens per second over HTTP, and where a layer's time goes.

    python -m tests.bench.gpu.serving [--preset deepseek-v3 | --model DIR] [--layers 8] [--workers 8]
        [--concurrency 32,128,512] [--microbatches 1,2,3] [--skew none,measured] [--trace] [--out FILE]

One attention worker on GPU 0, expert workers on GPU 1; with a preset, weights are random and `--distinct` experts of
a layer play all of them. Every request has a prompt of 16 tokens and is decoded greedily to its full length. With
--trace a cluster more records the last size of each setting: medians per layer, exposed communication in percent of the
step, the same steps on a wire that costs nothing. --skew says how uneven the random gates are (tests.bench.gpu.skew);
what they chose in fact is in the result as `routed`, as the routers counted it: means over layers.
`python_us_per_layer` is the attention worker's own time for what it launches and posts; a trace's marks cost more than
that, so all figures but the trace's are of clusters without.
"""

import argparse
import asyncio
import json
import tempfile
import time
import urllib.request
from pathlib import Path
from statistics import mean, median
from typing import Any

import aiohttp
import numpy as np

from common.model.presets import preset_config
from common.obs.trace import DIRECTORY
from deploy.trace.blocks import blocks
from deploy.trace.chrome import chrome_trace
from deploy.trace.report import make_report
from deploy.trace.spans import read
from tests.bench.gpu.cluster import GpuCluster, gpu_config, mps
from tests.bench.gpu.environment import gpu_facts
from tests.bench.gpu.skew import SKEWS, summary, write_skewed_source

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


def counters_of(url: str, role: str) -> list[dict[str, Any]]:
    """Of every process of a role."""
    with urllib.request.urlopen(f"{url}/cluster", timeout=20) as response:
        processes = json.load(response)["processes"]
    return [p["counters"] for p in processes if p["role"] == role]


def attention_counters(url: str) -> dict[str, int]:
    """Of the attention worker: layers of generated tokens, and its loop's microseconds for what it launches."""
    (counters,) = counters_of(url, "attention")
    return {name: int(counters[name]) for name in ("replayed_layers", "replayed_us")}


def routed(url: str, experts_per_worker: int) -> dict[str, float]:
    """How uneven the gates' choices of the last minutes were, mean over layers."""
    by_layer: dict[str, Any] = {}
    for counters in counters_of(url, "router"):
        for layer, rates in counters["expert_load"].items():
            by_layer[layer] = by_layer.get(layer, 0.0) + np.asarray(rates)
    found = [summary(load, experts_per_worker) for load in by_layer.values()]
    return {key: round(mean(one[key] for one in found), 3) for key in found[0]}


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
    layers, python_us = (after[name] - before[name] for name in before)
    return {
        "concurrency": concurrency, "tokens_per_s": round(concurrency * tokens / whole, 1),
        "decode_tokens_per_s": round(concurrency / decode_s, 1), "tpot_ms": round(decode_s * 1e3, 2),
        "python_us_per_layer": round(python_us / max(layers, 1), 1),
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


def source(directory: Path, skew: str, args: argparse.Namespace) -> Path:
    """The random model."""
    shape = preset_config(args.preset, layers=args.layers)
    return write_skewed_source(directory / args.preset, shape, skew, distinct_experts=args.distinct)


def one_setting(
    model: Path, run_dir: Path, microbatches: int, sizes: list[int], args: argparse.Namespace, *,
    traced: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """A cluster of its own, at every concurrency."""
    experts = json.loads((model / "config.json").read_text())["n_routed_experts"]
    per_worker = -(-experts // args.workers)
    config = gpu_config(
        model, run_dir, experts=args.workers, nodes=args.nodes, experts_per_gpu=per_worker,
        routers=args.routers, divide=args.divide, microbatches=microbatches, max_requests=max(sizes),
        trace_events=(1 << 16) * traced,
    )  # fmt: skip
    rows = []
    started = time.perf_counter()
    with GpuCluster(config) as cluster:
        ready_s = time.perf_counter() - started
        for size in sizes:
            row: dict[str, Any] = {"microbatches": microbatches, "ready_s": round(ready_s, 1)}
            try:
                row |= measure(cluster, size, args.tokens, 1 if traced else args.repeats)
                if experts % args.workers == 0:
                    row["routed"] = routed(cluster.url, per_worker)
            except Exception:
                print(cluster.logs(), flush=True)
                raise
            rows.append(row)
            print(json.dumps(row), flush=True)
    if traced:
        rows[-1]["trace"] = trace_report(run_dir, 16 * microbatches, args.trace_file)
    return rows


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
    parser.add_argument("--skew", default="none", help=f"some of {', '.join(SKEWS)}")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--trace-file", type=Path, help="Chrome trace of the last setting")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes, lanes = ([int(n) for n in v.split(",")] for v in (args.concurrency, args.microbatches))
    skews = ["its own"] if args.model else args.skew.split(",")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch, mps():
        for skew in skews:
            model = (
                args.model.absolute() if args.model else source(Path(scratch) / skew, skew, args)
            )
            for m in lanes:
                run_dir = Path(scratch) / f"run-{len(rows)}"
                found = one_setting(model, run_dir, m, sizes, args)
                if args.trace:
                    run_dir = run_dir.with_name(f"{run_dir.name}-traced")
                    (last,) = one_setting(model, run_dir, m, sizes[-1:], args, traced=True)
                    found[-1]["trace"] = last["trace"]
                rows += [row | {"skew": skew} for row in found]
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
            layout |= {"model": args.model.absolute().name}
        args.out.write_text(json.dumps(gpu_facts() | layout | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
