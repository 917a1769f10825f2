"""One block from an attention worker through router and experts and back, GPU to GPU, through the real services.

    python -m tests.bench.gpu.round_trip [--tokens 128,512] [--in-flight 1,2,3,4] [--experts 8] [--out FILE]

This process is the attention worker (its `MoeClient` on its transport, GPU 0); router (GPU 0) and experts (GPU 1) are
the real processes. Every token goes to all experts, as in the bare loop that this is held against. Times are medians,
microseconds: `latency` from `dispatch` to the answer, `expert` the slowest expert's own time (queue and compute, as its
answer says), `per_block` the whole run over its blocks.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import uvloop

from common.config import ClusterConfig
from common.errors import LinkClosed
from common.ids import Role
from common.model.hf_config import load_config
from common.model.manifest import build_manifest
from common.model.presets import preset_config, write_random_source
from common.obs.trace import DIRECTORY, open_recorder
from common.transport.base import Hello, Link
from common.transport.buffers import Buffer
from common.transport.device import DeviceBlock, DeviceRows
from common.transport.dial import keep_connected
from common.transport.factory import open_transport
from common.transport.outbox import Outbox
from common.wire.blocks import RowType, combined_rows, row_segment
from common.wire.header import Header, Landed, Wire
from deploy.trace.blocks import blocks, by_layer
from deploy.trace.spans import read
from kernels import ops
from services.attention.moe_client import MoeClient
from tests.bench.gpu.cluster import DEVICE, GpuCluster, as_client_of_mps, gpu_config
from tests.bench.gpu.environment import gpu_facts
from tests.device import synchronise

LAYER = 3
WARM_UP = 30  # blocks of every lane


class Attention:
    """What an attention worker does of a block, without a model around it."""

    def __init__(self, config: ClusterConfig) -> None:
        self.transport = open_transport(config)
        self.config = config
        self.model = load_config(config.model.path)
        self.hash = build_manifest(config.model.path, cache_dir=config.model.cache_dir).model_hash
        wire = Wire.parse(config.cluster.wire)
        self.moe = MoeClient(
            0, self.model.hidden_size, wire, config.cluster.epoch, self.transport.pool, 30.0,
            combined_rows(wire, DEVICE), self.transport.seam,
            routers={r.id.index: Outbox(str(r.id)) for r in config.routers_of(0)},
            by_block=config.routers_divide_blocks,
        )  # fmt: skip
        self.opened = asyncio.Event()
        self.moe.trace = open_recorder(config, config.process(Role.ATTENTION, 0))

    def hello(self) -> Hello:
        spec, cluster = self.config.process(Role.ATTENTION, 0), self.config.cluster
        return Hello(spec.id, 0, os.getpid(), self.hash, cluster.epoch, cluster.wire)

    def on_open(self, link: Link) -> None:
        self.moe.routers[link.peer.process.index].opened(link)
        if all(outbox.link is not None for outbox in self.moe.routers.values()):
            self.opened.set()

    def on_close(self, link: Link, error: LinkClosed) -> None:
        self.moe.routers[link.peer.process.index].closed(link)

    def on_message(self, link: Link, header: Header, payload: Buffer | None) -> None:
        self.expert_us = header.queue_us + header.compute_us
        self.moe.on_message(link, header, payload)

    def on_landed(self, link: Link, answer: Landed, landing: DeviceRows) -> None:
        self.expert_us = answer.queue_us + answer.compute_us
        self.moe.on_landed(link, answer, landing)

    def on_control(self, link: Link, message: dict[str, Any]) -> None:
        pass


class Held:
    """Keeps an answer until the next one, as a lane does whose graph reads it where it lies."""

    def __init__(self) -> None:
        self._rows: DeviceRows | None = None

    def __call__(self, rows: DeviceRows) -> None:
        self.let_go()
        self._rows = rows.retain()

    def let_go(self) -> None:
        """Of the last one."""
        before, self._rows = self._rows, None
        if before is not None:
            before.release()


async def measure(a: Attention, tokens: int, in_flight: int, blocks: int) -> dict[str, Any]:
    """`blocks` blocks of `tokens` rows, `in_flight` at a time."""
    width, experts, top_k = a.model.hidden_size, a.model.num_experts, a.model.top_k
    latencies: list[float] = []
    expert: list[int] = []
    left = blocks
    warm = asyncio.Barrier(in_flight)  # every lane has had its blocks: every router has its kernels
    started = 0.0

    async def lane(index: int) -> None:
        nonlocal left, started
        x = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
        rows = quantised(x)
        out, held = torch.empty_like(x), Held()
        order = torch.rand(tokens, experts).argsort(1)[:, :top_k].int()
        ids = pinned(order.sort(1).values)
        weights = pinned(torch.full((tokens, top_k), 1 / top_k))
        told = pinned(torch.ones(1, dtype=torch.int64)).numpy().data
        synchronise(DEVICE)

        async def block() -> float:
            t, since = time.perf_counter(), time.monotonic_ns()
            if a.moe.trace is not None:  # a trace wants the attention before a block
                a.moe.trace.span("attention", a.moe.next_block, LAYER, index, since, since)
            await a.moe.dispatch(
                LAYER,
                index,
                rows.rows(0, rows.capacity),
                ids,
                weights,
                out=out,
                since=since,
                written=lambda: told[0] >= 1,  # asked as a lane asks of what its graph wrote
                keep=held,
            )
            return (time.perf_counter() - t) * 1e6

        for _ in range(WARM_UP):
            await block()
        await warm.wait()
        started = time.perf_counter()
        while left > 0:
            left -= 1
            latencies.append(await block())
            expert.append(a.expert_us)
        held.let_go()

    await asyncio.gather(*(lane(i) for i in range(in_flight)))
    per_block = (time.perf_counter() - started) / blocks * 1e6
    synchronise(DEVICE)
    ordered = sorted(latencies)
    return {
        "tokens": tokens, "in_flight": in_flight, "latency_us": round(median(latencies), 1),
        "latency_p90_us": round(ordered[int(0.9 * len(ordered))], 1),
        "expert_us": median(expert), "per_block_us": round(per_block, 1),
        "without_expert_us": round(median(x - y for x, y in zip(latencies, expert, strict=True)), 1),
    }  # fmt: skip


async def run(
    config: ClusterConfig, tokens: Sequence[int], flights: Sequence[int], blocks: int
) -> list[dict[str, Any]]:
    a = Attention(config)
    rows = []
    async with asyncio.TaskGroup() as group:
        links = [
            group.create_task(keep_connected(a.transport, r.address, a.hello, a))
            for r in config.routers_of(0)
        ]
        async with asyncio.timeout(180):
            await a.opened.wait()
            await ready(a)
        for n in tokens:
            for m in flights:
                async with asyncio.timeout(60):
                    rows.append(await measure(a, n, m, blocks))
                print(json.dumps(rows[-1]), flush=True)
        for task in links:
            task.cancel()
    await a.transport.close()
    if a.moe.trace is not None:
        a.moe.trace.write()
    return rows


def quantised(x: torch.Tensor) -> DeviceBlock:
    """Rows as an attention worker's graph leaves them: sent from where they are."""
    segment = row_segment(*x.shape, RowType.FP8)
    block = DeviceBlock(torch.zeros(segment.end, dtype=torch.uint8, device=DEVICE), lambda _: None)
    ops.quantise_rows(x, block.tensor, rows_offset=0, scales_offset=segment.scales_offset)
    return block


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory() if DEVICE == "cuda" else tensor


async def ready(a: Attention) -> None:
    """Until every expert answers: a block of one row waits in the router for those that still load."""
    width, top_k = a.model.hidden_size, a.model.top_k
    x = torch.zeros(1, width, device=DEVICE, dtype=torch.bfloat16)
    ids = torch.arange(top_k, dtype=torch.int32)[None]
    await a.moe.dispatch(LAYER, 0, x, ids, torch.ones(1, top_k))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", default="128,512,1024")
    parser.add_argument("--in-flight", default="1,2,3,4")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--divide", default="destinations", help="as in the cluster's file")
    parser.add_argument("--cards", type=int, default=2, help="the first's experts are on the rest")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=7168)
    parser.add_argument("--spin-us", type=int, default=-1, help="as in the cluster's file")
    parser.add_argument("--blocks", type=int, default=300)
    parser.add_argument("--trace", action="store_true", help="medians of every part of the way")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    as_client_of_mps()
    tokens, flights = ([int(n) for n in v.split(",")] for v in (args.tokens, args.in_flight))
    shape = {
        "n_routed_experts": args.experts, "num_experts_per_tok": min(8, args.experts), "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": args.hidden, "hidden_size": args.width,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="atoll-") as scratch:
        model = write_random_source(
            Path(scratch) / "model", preset_config("deepseek-v3", layers=4) | shape,
            distinct_experts=args.experts,
        )  # fmt: skip
        config = gpu_config(
            model, Path(scratch) / "run", experts=args.experts, routers=args.routers, divide=args.divide,
            trace_events=(1 << 16) * int(args.trace), spin_us=args.spin_us,
        )  # fmt: skip
        with (
            GpuCluster(config, without=Role.ATTENTION, cards=args.cards) as cluster,
            torch.inference_mode(),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            try:
                rows = runner.run(run(cluster.config, tokens, flights, args.blocks))
            except BaseException:
                print(cluster.logs(), flush=True)
                raise
        parts = {}
        if args.trace:
            (parts,) = by_layer(blocks(read(config.cluster.run_dir / DIRECTORY))).values()
            print(json.dumps(parts), flush=True)
    if args.out:
        layout = {
            "experts": args.experts,
            "cards_used": args.cards,
            "hidden": args.hidden,
            "routers": args.routers,
            "divide": args.divide,
        }
        args.out.write_text(
            json.dumps(gpu_facts() | layout | {"rows": rows, "parts_us": parts}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
