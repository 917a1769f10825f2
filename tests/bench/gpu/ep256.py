"""EP256 on N nodes with two cards: the messages and bytes of the real layout, and what they cost each kind of process.

    python -m tests.bench.gpu.ep256 [--experts 256] [--nodes 32,1] [--skew measured] [--tokens 128,512,1024]
        [--in-flight 1,3] [--expert-hosts 16] [--router-hosts 8] [--out FILE]

An expert worker per expert of the one MoE layer and a router per node, all of them the real services; hosts
(tests.bench.gpu.host) run several in one process, experts on GPU 1, routers on GPU 0, node 0's router alone in its own.
This process is node 0's attention worker (its `MoeClient`), whose blocks go where DeepSeek-V3's gate sends them, made
uneven by --skew (tests.bench.gpu.skew). Every expert has weights of its own.

Counts are the services' own, from their status before and after, per block: messages and bytes of payloads, in and
out; `busy_us` what a router's transport was at work (see host). Of experts, bytes are what routers sent and received
less what crossed nodes and what went to this process. `planner` is `common.placement.score` on the very tokens sent.
Latencies are those of this set-up: one card computes for 256, and the services of a host take turns.
"""

import argparse
import asyncio
import contextlib
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import uvloop

from common.config import ClusterConfig
from common.ids import ProcessId, Role
from common.model import names
from common.model.hf_config import load_config
from common.model.loader import dequantise
from common.model.presets import preset_config
from common.model.source import open_checkpoint
from common.placement.links import RowBytes, build_links
from common.placement.routing_trace import RoutingTrace
from common.placement.score import score
from common.placement.topology import cluster_topology
from common.plan_file import cluster_plan
from common.transport.dial import keep_connected
from common.wire.header import Wire
from kernels import ops
from kernels.reference.quant import BLOCK
from services.expert.device_bank import load_device_expert
from tests.bench.gpu.cluster import DEVICE, GpuCluster, Launch, as_client_of_mps, gpu_config
from tests.bench.gpu.counts import Statuses, per_block
from tests.bench.gpu.environment import gpu_facts
from tests.bench.gpu.round_trip import LAYER, Attention, pinned, quantised
from tests.bench.gpu.skew import loads, summary, write_skewed_source
from tests.device import synchronise

VARIANTS = 4  # different blocks of a lane, in turn
WARM_ROUNDS, ROUNDS = 5, 12  # of all variants; the first make the experts' graphs
_START_S, _ROW_S = 240.0, 120.0
_CHECKED = 4  # rows
_MOST_ERROR = 0.15  # FP8 on the way and in the experts' middle is off by a few hundredths
_SPIN_US = 20_000  # hosts have a core each, though there are more services than cores


class HostedCluster(GpuCluster):
    """Node 0's routers as processes of their own; the other services in hosts. Without attention and gateway."""

    def __init__(self, config: ClusterConfig, *, expert_hosts: int, router_hosts: int) -> None:
        super().__init__(config, without=Role.ATTENTION)
        self._hosts = {Role.EXPERT: expert_hosts, Role.ROUTER: router_hosts}

    def launches(self) -> Iterator[Launch]:
        own = len(self.config.routers_of(0))
        for role, alone in ((Role.ROUTER, own), (Role.EXPERT, 0)):
            rest = range(alone, len(self.config.of_role(role)))
            parts = [part for part in np.array_split(rest, self._hosts[role]) if len(part)]
            for part in [np.array([i]) for i in range(alone)] + parts:
                first, last = int(part[0]), int(part[-1])
                arguments = ["--role", str(role), "--indices", f"{first}-{last}"]
                name = f"{role}-{first}-{last}"
                yield name, ProcessId(role, first), "tests.bench.gpu.host", arguments


class CountingAttention(Attention):
    """An attention worker that counts what it sends and receives."""

    def __init__(self, config: ClusterConfig) -> None:
        super().__init__(config)
        self.counts = dict.fromkeys(("messages_out", "messages_in", "bytes_out", "bytes_in"), 0)
        self.expert_us = 0
        for outbox in self.moe.routers.values():
            outbox.send = self._counted(outbox.send)  # type: ignore[method-assign]

    def _counted(self, send: Any) -> Any:
        def count(call: Any) -> None:
            self.counts["messages_out"] += 1
            self.counts["bytes_out"] += call.header.payload_nbytes
            send(call)

        return count

    def on_message(self, link: Any, header: Any, payload: Any) -> None:
        self.counts["messages_in"] += 1
        self.counts["bytes_in"] += header.payload_nbytes
        super().on_message(link, header, payload)


class Block:
    """Rows of unit variance and where the gate sends them; `ids` int32 and `weights` fp32 [tokens, top_k], host."""

    def __init__(self, a: Attention, tokens: int, seed: int) -> None:
        model = a.model
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, model.hidden_size, generator=generator)
        dtype = torch.float32 if a.config.cluster.wire == "fp32" else torch.bfloat16
        self.x = x.to(DEVICE, dtype)
        with open_checkpoint(a.config.model.path) as checkpoint:
            weight, bias = (
                checkpoint.read(names.layer(LAYER, name), DEVICE)
                for name in (names.GATE, names.GATE_BIAS)
            )
        ids, weights = ops.gate_v3(
            self.x, weight, bias, top_k=model.top_k, num_groups=model.num_groups,
            top_k_groups=model.top_k_groups, norm_topk_prob=model.norm_topk_prob,
            routed_scaling_factor=model.routed_scaling_factor,
        )  # fmt: skip
        self.ids, self.weights = pinned(ids.cpu()), pinned(weights.float().cpu())
        self.block = None if DEVICE == "cpu" else quantised(self.x)
        self.out = None if DEVICE == "cpu" else torch.empty_like(self.x)
        synchronise(DEVICE)

    async def __call__(self, a: Attention, lane: int) -> torch.Tensor:
        """There and back: the combined rows [tokens, width]."""
        rows = self.x if self.block is None else self.block.rows(0, self.block.capacity)
        return await a.moe.dispatch(LAYER, lane, rows, self.ids, self.weights, out=self.out)


async def measure(
    a: CountingAttention, statuses: Statuses, tokens: int, in_flight: int, rounds: int
) -> dict[str, Any]:
    """`in_flight` blocks at a time, each lane its own VARIANTS of them, `rounds` times."""
    lanes = [
        [Block(a, tokens, 1000 * tokens + VARIANTS * lane + i) for i in range(VARIANTS)]
        for lane in range(in_flight)
    ]
    latencies: list[float] = []
    expert: list[int] = []

    async def run(lane: int, times: int) -> None:
        for _ in range(times):
            for block in lanes[lane]:
                started = time.perf_counter()
                await block(a, lane)
                latencies.append((time.perf_counter() - started) * 1e6)
                expert.append(a.expert_us)

    await asyncio.gather(*(run(lane, WARM_ROUNDS) for lane in range(in_flight)))
    latencies.clear()
    expert.clear()
    before, own = await statuses.read(), dict(a.counts)
    started = time.perf_counter()
    await asyncio.gather(*(run(lane, rounds) for lane in range(in_flight)))
    elapsed = time.perf_counter() - started
    blocks = in_flight * VARIANTS * rounds
    spent = {key: value - own[key] for key, value in a.counts.items()}
    ids = np.concatenate([block.ids.numpy() for lane in lanes for block in lane])
    return {
        "tokens": tokens, "in_flight": in_flight, "blocks": blocks,
        "latency_us": round(median(latencies), 1),
        "latency_p90_us": round(sorted(latencies)[int(0.9 * len(latencies))], 1),
        "expert_us": median(expert), "per_block_us": round(elapsed / blocks * 1e6, 1),
        "routed": summary(loads(ids, a.model.num_experts)),
        **per_block(before, await statuses.read(), spent, blocks),
        "planner": planner(a.config, ids, tokens),
    }  # fmt: skip


def planner(config: ClusterConfig, ids: np.ndarray[Any, Any], tokens: int) -> dict[str, float]:
    """What a plan's score says of these tokens [tokens, top_k]; `link_us` is that of a block at the NICs' speed."""
    model = load_config(config.model.path)
    trace = RoutingTrace(ids[None].astype(np.int16), (LAYER,), model.num_experts)
    topology = cluster_topology(config)
    found = score(
        cluster_plan(config, model), trace,
        build_links(topology, RowBytes.of(model.hidden_size, config.cluster.wire)),
    )  # fmt: skip
    nic = topology.nodes[0].nic
    return {
        "rows_between_nodes": round(found.rows * tokens, 2),
        "unicast_rows_between_nodes": round(found.unicast_rows * tokens, 2),
        "busiest_link_bytes": round(found.link_s * nic * tokens),
        "busiest_link_us": round(found.link_s * tokens * 1e6, 2),
        "busiest_gpu": round(found.gpu_load, 3),
    }


def dense(a: Attention, block: Block, num_rows: int) -> torch.Tensor:
    """The first rows of a block as one process computes them, fp64 [num_rows, width]: no wire, no requantisation.

    Weights are those that the expert workers made on their device, which other kinds of devices make otherwise.
    """
    out = torch.zeros(num_rows, a.model.hidden_size, dtype=torch.float64)
    with open_checkpoint(a.config.model.path) as checkpoint:
        for row in range(num_rows):
            for expert, weight in zip(
                block.ids[row].tolist(), block.weights[row].tolist(), strict=True
            ):
                w = load_device_expert(checkpoint, a.model, (LAYER, expert), Wire.FP8, DEVICE)
                gate, up = (
                    wide(part, scales) @ block.x[row].float()
                    for part, scales in zip(w.gate_up.chunk(2), w.parts[1].chunk(2), strict=True)
                )
                answer = wide(w.down, w.parts[3]) @ (torch.nn.functional.silu(gate) * up)
                out[row] += weight * answer.double().cpu()
    return out


def wide(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """An e4m3 matrix in fp32."""
    return dequantise(weight, scales, (BLOCK, BLOCK))


async def check(a: Attention) -> float:
    """Combined rows against `dense`: root mean square of the difference over that of the rows. One block alone."""
    block = Block(a, 16, 0)
    found = (await block(a, 0))[:_CHECKED].double().cpu()
    wanted = dense(a, block, _CHECKED)
    return float((found - wanted).norm() / wanted.norm())


@contextlib.asynccontextmanager
async def connected(
    cluster: HostedCluster,
) -> AsyncIterator[tuple[CountingAttention, Statuses]]:
    """The attention worker, and everybody's status; entered when the whole cluster is ready."""
    a = CountingAttention(cluster.config)
    async with asyncio.TaskGroup() as group:
        statuses = Statuses(cluster.config, a.hash, group)
        links = [
            group.create_task(keep_connected(a.transport, r.address, a.hello, a))
            for r in cluster.config.routers_of(0)
        ]
        async with asyncio.timeout(_START_S):
            while not (a.opened.is_set() and await statuses.all_ready()):
                cluster.check()
                await asyncio.sleep(0.25)
        yield a, statuses
        for task in links:
            task.cancel()
        await statuses.close()
    await a.transport.close()


async def run(
    cluster: HostedCluster, tokens: list[int], flights: list[int], rounds: int
) -> dict[str, Any]:
    """One layout: seconds until all were ready, how exact an answer is, and a row per setting."""
    started, rows = time.perf_counter(), []
    async with connected(cluster) as (a, statuses):
        ready_s = time.perf_counter() - started
        error = await check(a)
        assert error < _MOST_ERROR, f"combined rows are off by {error:.3g}"
        for n in tokens:
            for m in flights:
                async with asyncio.timeout(_ROW_S):
                    rows.append(await measure(a, statuses, n, m, rounds))
                print(json.dumps(rows[-1]), flush=True)
    return {"ready_s": round(ready_s, 1), "error": round(error, 5), "rows": rows}


def small_or_v3(experts: int, width: int, hidden: int) -> dict[str, Any]:
    """config.json of DeepSeek-V3 with one MoE layer; of fewer than 64 experts the gate takes four."""
    return preset_config("deepseek-v3", layers=LAYER + 1) | {
        "n_routed_experts": experts, "num_experts_per_tok": 8 if experts >= 64 else 4,
        "moe_intermediate_size": hidden, "hidden_size": width,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--nodes", default="32")
    parser.add_argument("--skew", default="measured")
    parser.add_argument("--tokens", default="128,512,1024")
    parser.add_argument("--in-flight", default="1,3")
    parser.add_argument("--expert-hosts", type=int, default=16)
    parser.add_argument("--router-hosts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=7168)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--spin-us", type=int, default=_SPIN_US if DEVICE == "cuda" else -1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    as_client_of_mps()
    nodes, tokens, flights = (
        [int(n) for n in v.split(",")] for v in (args.nodes, args.tokens, args.in_flight)
    )
    results = []
    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
        model = write_skewed_source(
            Path(scratch) / "model", small_or_v3(args.experts, args.width, args.hidden), args.skew,
            distinct_experts=args.experts,
        )  # fmt: skip
        for count in nodes:
            config = gpu_config(
                model, Path(scratch) / f"{count}", experts=args.experts, nodes=count, spin_us=args.spin_us
            )  # fmt: skip
            with (
                HostedCluster(
                    config, expert_hosts=args.expert_hosts, router_hosts=args.router_hosts
                ) as cluster,
                torch.inference_mode(),
                asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
            ):
                try:
                    found = runner.run(run(cluster, tokens, flights, args.rounds))
                except BaseException:
                    print(cluster.logs(), flush=True)
                    raise
            results.append({"nodes": count} | found)
            if args.out:  # what was measured is not lost with what comes after
                layout = {
                    key: getattr(args, key)
                    for key in ("experts", "hidden", "width", "skew", "expert_hosts", "router_hosts")
                }  # fmt: skip
                document = gpu_facts() | {"cores": os.cpu_count()} | layout | {"layouts": results}
                args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
