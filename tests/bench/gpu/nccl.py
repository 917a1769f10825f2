"""The same layer the traditional way: NCCL all_to_all between two ranks that wait for one another, one process a card.

    python -m tests.bench.gpu.nccl [--tokens 128,1024] [--experts 8] [--out FILE]

Rank 0 has the tokens, rank 1 the experts, as in `round_trip`: FP8 rows and their scales, one copy per expert, with the
counts exchanged first; the experts one after the other; bf16 rows back; the weighted sum. Everything on a stream, one
wait at the counts and one at the end. Medians, microseconds per layer: `layer_us` all of it, `exchange_us` the same
with experts that only convert.
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kernels import ops
from tests.bench.gpu.environment import gpu_facts

WIDTH, HIDDEN, TOP_K, BLOCK = 7168, 2048, 8, 128
ROUNDS, WARM_UP = 100, 20


class Layer:
    """One rank's buffers."""

    def __init__(self, rank: int, tokens: int, experts: int, hidden: int) -> None:
        self.rank, self.tokens, self.experts = rank, tokens, experts
        device = self.device = torch.device("cuda", rank)
        torch.manual_seed(0)
        order = torch.rand(tokens, experts).argsort(1)[:, :TOP_K].sort(1).values
        flat = order.reshape(-1)
        self.by_expert = flat.argsort(stable=True).to(device)
        self.counts = flat.bincount(minlength=experts)
        self.pairs = tokens * TOP_K
        if rank == 0:
            x = torch.randn(tokens, WIDTH, device=device, dtype=torch.bfloat16)
            self.rows, self.scales = ops.quantise(x)
            self.weights = torch.full((tokens, TOP_K), 1 / TOP_K, device=device)
            self.slots = self.by_expert.argsort().view(tokens, TOP_K).int()
            self.out = torch.empty(tokens, WIDTH, device=device)
        else:
            blocks = (hidden // BLOCK, WIDTH // BLOCK)
            self.experts_weights = [
                (
                    torch.randn(2 * hidden, WIDTH, device=device).to(torch.float8_e4m3fn),
                    torch.full((2 * blocks[0], blocks[1]), 0.01, device=device),
                    torch.randn(WIDTH, hidden, device=device).to(torch.float8_e4m3fn),
                    torch.full((blocks[1], blocks[0]), 0.01, device=device),
                )
                for _ in range(experts)
            ]

    def run(self, *, compute: bool) -> None:
        """One layer; returns when this rank's device is done."""
        n = self.pairs
        sent = torch.zeros(2, self.experts, dtype=torch.int64, device=self.device)
        got = torch.empty_like(sent)
        if self.rank == 0:
            sent[1].copy_(self.counts, non_blocking=True)
        dist.all_to_all_single(got, sent)
        counts = got.tolist()
        coming = [sum(c) for c in counts]
        going = [0, n] if self.rank == 0 else [0, 0]
        if self.rank == 0:
            index = self.by_expert // TOP_K
            rows = self.rows.view(torch.uint8).index_select(0, index)
            scales = self.scales.index_select(0, index)
        else:
            rows = torch.empty(0, WIDTH, dtype=torch.uint8, device=self.device)
            scales = torch.empty(0, WIDTH // BLOCK, device=self.device)
        there = rows.new_empty(sum(coming), WIDTH)
        there_scales = scales.new_empty(sum(coming), WIDTH // BLOCK)
        dist.all_to_all_single(there, rows, coming, going)
        dist.all_to_all_single(there_scales, scales, coming, going)
        outputs = there.new_empty(0, WIDTH, dtype=torch.bfloat16)
        if self.rank == 1:
            outputs = self._experts(there, there_scales, counts[0], compute=compute)
        back = outputs.new_empty(sum(going), WIDTH)
        dist.all_to_all_single(back, outputs, going, coming)
        if self.rank == 0:
            ops.combine(back, self.slots, self.weights, self.out)
        torch.cuda.synchronize()

    def _experts(
        self, rows: torch.Tensor, scales: torch.Tensor, counts: list[int], *, compute: bool
    ) -> torch.Tensor:
        values = rows.view(torch.float8_e4m3fn)
        if not compute:
            return values.to(torch.bfloat16)
        parts, start = [], 0
        for count, weights in zip(counts, self.experts_weights, strict=True):
            end = start + count
            parts.append(ops.expert_ffn(values[start:end], scales[start:end], *weights))
            start = end
        return torch.cat(parts)


def worker(rank: int, port: int, tokens: list[int], experts: int, hidden: int, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=2, device_id=torch.device("cuda", rank))
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for n in tokens:
            layer = Layer(rank, n, experts, hidden)
            row: dict[str, Any] = {"tokens": n}
            for name, compute in (("exchange_us", False), ("layer_us", True)):
                times = []
                for _ in range(ROUNDS):
                    dist.barrier()
                    torch.cuda.synchronize()
                    started = time.perf_counter()
                    layer.run(compute=compute)
                    times.append((time.perf_counter() - started) * 1e6)
                row[name] = round(median(times[WARM_UP:]), 1)
            rows.append(row)
            if rank == 0:
                print(json.dumps(row), flush=True)
    dist.destroy_process_group()
    if rank == 0 and out:
        layout = {"experts": experts, "hidden": hidden}
        Path(out).write_text(json.dumps(gpu_facts() | layout | {"rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", default="128,512,1024")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--port", type=int, default=29571)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    tokens = [int(n) for n in args.tokens.split(",")]
    mp.spawn(worker, (args.port, tokens, args.experts, args.hidden, args.out), nprocs=2)


if __name__ == "__main__":
    main()
