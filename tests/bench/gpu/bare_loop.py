"""The floor of the round trip in Python: the same way of a block in bare loops, without our protocol.

    python -m tests.bench.gpu.bare_loop [--tokens 128] [--in-flight 1,3] [--experts 8] [--out FILE]

Attention -> router -> experts -> router -> attention, as in `round_trip`: FP8 rows out, bf16 rows back, attention and
router on GPU 0, experts (which only convert their rows) on GPU 1, over the same library and the same transports. No
headers, credits, failures or asyncio: every process polls, every receive is posted ahead into a slot of full size, who
gets which row comes from the sender, pack and sum are replayed CUDA graphs.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from common.transport.device import open_context
from common.transport.environment import set_ucx_environment
from kernels import ops
from tests.bench.gpu.cluster import DEVICE, mps
from tests.bench.gpu.environment import gpu_facts
from tests.device import synchronise

WIDTH, ROW_NBYTES = 7168, 7424  # e4m3 values, then fp32 scales per 128, padded
TABLES, ROWS, QUESTION, ANSWER, COMBINED = range(1, 6)  # kinds of messages
WARM_UP = 50
_LIMIT_S = 60.0
Shape = tuple[int, int, int]  # tokens, experts, slots
Step = Iterator[None]


class Peers:
    """A UCX worker and endpoints to others by name; parents hand the addresses round."""

    def __init__(self, parent: Connection) -> None:
        from ucxx._lib import libucxx
        from ucxx._lib.arr import Array

        self._lib, self.array = libucxx, Array
        self._worker = libucxx.UCXWorker(
            libucxx.UCXContext({}, (libucxx.Feature.TAG, libucxx.Feature.WAKEUP))
        )
        self.progress: Callable[[], None] = self._worker.progress
        parent.send(bytes(self._worker.address))
        self._addresses: dict[str, bytes] = parent.recv()

    def endpoint(self, name: str) -> Any:
        address = self._lib.UCXAddress.create_from_buffer(self._addresses[name])
        return self._lib.UCXEndpoint.create_from_worker_address(self._worker, address, True)

    def tag(self, kind: int, slot: int, expert: int = 0) -> Any:
        return self._lib.UCXXTag(kind << 32 | expert << 16 | slot)

    def turn(self, steps: Sequence[Step]) -> None:
        """Progress, then let every slot look."""
        self.progress()
        for step in steps:
            next(step)


def done(requests: Sequence[Any]) -> Step:
    while not all(request.completed for request in requests):
        yield


def computed() -> Step:
    """Until the device has done what was launched so far."""
    if DEVICE == "cpu":
        return
    event = torch.cuda.Event()
    event.record()
    while not event.query():
        yield


def replayed(compute: Callable[[], object]) -> Callable[[], object]:
    """The same as a CUDA graph."""
    if DEVICE == "cpu":
        return compute
    for _ in range(2):
        compute()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    return graph.replay


def _bytes(tensor: torch.Tensor) -> Any:
    flat = tensor.view(-1).view(torch.uint8)
    return flat.numpy() if DEVICE == "cpu" else flat


def tables(tokens: int, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One buffer: the row of each place, the places of each row (int32 [tokens * experts] each), and both as views."""
    both = np.empty(2 * tokens * experts, np.int32)
    rows, slots = both[: tokens * experts], both[tokens * experts :]
    return both.view(np.uint8), rows, slots


def attention(parent: Connection, shape: Shape, blocks: int) -> None:
    tokens, experts, num_slots = shape
    peers = Peers(parent)
    router = peers.endpoint("router")
    latencies: list[float] = []
    left = blocks + WARM_UP
    started = 0.0

    def slot(m: int) -> Step:
        nonlocal left, started
        numbers, rows, places = tables(tokens, experts)
        rows[:] = np.tile(np.arange(tokens), experts)
        places[:] = (np.arange(tokens)[:, None] + np.arange(experts) * tokens).ravel()
        block = torch.randint(0, 100, (tokens * ROW_NBYTES,), dtype=torch.uint8, device=DEVICE)
        out = torch.empty(tokens * WIDTH * 2, dtype=torch.uint8, device=DEVICE)
        synchronise(DEVICE)
        arrays = [peers.array(memory) for memory in (_bytes(out), numbers, _bytes(block))]
        tags = [peers.tag(kind, m) for kind in (COMBINED, TABLES, ROWS)]
        while left > 0:
            left -= 1
            t = time.perf_counter()
            yield from done(
                [
                    router.tag_recv(arrays[0], tags[0]),
                    router.tag_send(arrays[1], tags[1]),
                    router.tag_send(arrays[2], tags[2]),
                ]
            )
            latencies.append((time.perf_counter() - t) * 1e6)
            if len(latencies) == WARM_UP:
                started = time.perf_counter()

    steps = [slot(m) for m in range(num_slots)]
    while steps:
        peers.progress()
        steps = [step for step in steps if next(step, steps) is None]
    per_block = (time.perf_counter() - started) / blocks * 1e6
    ordered = sorted(latencies[WARM_UP:])
    parent.send((median(ordered), ordered[int(0.9 * len(ordered))], per_block))


def router(parent: Connection, shape: Shape, blocks: int) -> None:
    tokens, experts, num_slots = shape
    peers = Peers(parent)
    asker = peers.endpoint("attention")
    workers = [peers.endpoint(f"expert-{e}") for e in range(experts)]

    def slot(m: int) -> Step:
        numbers, rows, _ = tables(tokens, experts)
        pinned = torch.empty(len(numbers) // 4, dtype=torch.int32, pin_memory=DEVICE == "cuda")
        there = torch.zeros(len(pinned), dtype=torch.int32, device=DEVICE)
        index, places = there[: len(rows)], there[len(rows) :].view(tokens, experts)
        weights = torch.full((tokens, experts), 1 / experts, device=DEVICE)
        block = torch.empty(tokens, ROW_NBYTES // 4, dtype=torch.int32, device=DEVICE)
        packed = torch.empty(experts * tokens, ROW_NBYTES // 4, dtype=torch.int32, device=DEVICE)
        answers = torch.zeros(experts * tokens, WIDTH, dtype=torch.bfloat16, device=DEVICE)
        out = torch.empty(tokens, WIDTH, dtype=torch.bfloat16, device=DEVICE)

        def pack() -> None:
            there.copy_(pinned, non_blocking=True)
            torch.index_select(block, 0, index, out=packed)

        gather = replayed(pack)
        combine = replayed(lambda: ops.combine(answers, places, weights, out))
        asked = [peers.array(numbers), peers.array(_bytes(block))]
        asked_tags = [peers.tag(kind, m) for kind in (TABLES, ROWS)]
        sent = [peers.array(_bytes(part)) for part in packed.split(tokens)]
        landings = [peers.array(_bytes(part)) for part in answers.split(tokens)]
        counts = [peers.array(np.full(1, tokens, np.int32).view(np.uint8)) for _ in range(experts)]
        tags = [
            [peers.tag(kind, m, e) for kind in (QUESTION, ROWS, ANSWER)] for e in range(experts)
        ]
        result, result_tag = peers.array(_bytes(out)), peers.tag(COMBINED, m)
        ended: list[Any] = []
        while True:
            block_in = [asker.tag_recv(*each) for each in zip(asked, asked_tags, strict=True)]
            answers_in = [w.tag_recv(landings[e], tags[e][2]) for e, w in enumerate(workers)]
            yield from done([*block_in, *ended])
            pinned.numpy()[:] = numbers.view(np.int32)
            gather()
            yield from computed()
            ended = []
            for e, worker in enumerate(workers):
                ended.append(worker.tag_send(counts[e], tags[e][0]))
                ended.append(worker.tag_send(sent[e], tags[e][1]))
            yield from done(answers_in)
            combine()
            yield from computed()
            ended.append(asker.tag_send(result, result_tag))

    _turn_until_told(parent, peers, [slot(m) for m in range(num_slots)])


def expert(parent: Connection, shape: Shape, index: int) -> None:
    tokens, _, num_slots = shape
    peers = Peers(parent)
    asker = peers.endpoint("router")

    def slot(m: int) -> Step:
        count = np.zeros(1, np.int32)
        block = torch.zeros(tokens, ROW_NBYTES, dtype=torch.uint8, device=DEVICE)
        answer = torch.empty(tokens, WIDTH, dtype=torch.bfloat16, device=DEVICE)
        arrays = [peers.array(memory) for memory in (count.view(np.uint8), _bytes(block))]
        tags = [peers.tag(kind, m, index) for kind in (QUESTION, ROWS, ANSWER)]
        back = peers.array(_bytes(answer))
        values = block[:, :WIDTH].view(torch.float8_e4m3fn)
        ended: list[Any] = []
        while True:
            asked = [asker.tag_recv(arrays[i], tags[i]) for i in range(2)]
            yield from done([*asked, *ended])
            answer.copy_(values)
            yield from computed()
            ended = [asker.tag_send(back, tags[2])]

    _turn_until_told(parent, peers, [slot(m) for m in range(num_slots)])


def _turn_until_told(parent: Connection, peers: Peers, steps: list[Step]) -> None:
    peers.turn(steps)
    parent.send("ready")
    deadline = time.monotonic() + _LIMIT_S
    while not parent.poll() and time.monotonic() < deadline:
        for _ in range(500):
            peers.turn(steps)


def _process(role: str, parent: Connection, shape: Shape, blocks: int) -> None:
    """One process; it ends without tearing UCX down, since its peers may be gone."""
    on_second = role.startswith("expert") and torch.cuda.device_count() > 1
    if DEVICE == "cuda":
        torch.cuda.set_device(int(on_second))
    open_context(DEVICE)
    set_ucx_environment(local=True, device=DEVICE)
    with torch.inference_mode():
        if role == "attention":
            attention(parent, shape, blocks)
        elif role == "router":
            router(parent, shape, blocks)
        else:
            expert(parent, shape, int(role.removeprefix("expert-")))
    os._exit(0)


def measure(tokens: int, experts: int, in_flight: int, blocks: int) -> dict[str, Any]:
    """Medians of one setting, in processes of their own."""
    context = multiprocessing.get_context("spawn")
    names = ["attention", "router", *(f"expert-{e}" for e in range(experts))]
    ends, processes = {}, []
    for name in names:
        ends[name], theirs = context.Pipe()
        shape = (tokens, experts, in_flight)
        process = context.Process(target=_process, args=(name, theirs, shape, blocks))
        process.start()
        processes.append(process)
    try:
        addresses = {name: _receive(end) for name, end in ends.items()}
        for name in names[1:]:
            ends[name].send(addresses)
        for name in names[1:]:
            _receive(ends[name])
        ends["attention"].send(addresses)
        latency, p90, per_block = _receive(ends["attention"])
        for name in names[1:]:
            ends[name].send("end")
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return {
        "tokens": tokens, "in_flight": in_flight, "latency_us": round(latency, 1),
        "latency_p90_us": round(p90, 1), "per_block_us": round(per_block, 1),
    }  # fmt: skip


def _receive(end: Connection) -> Any:
    if not end.poll(_LIMIT_S):
        raise TimeoutError(f"a process said nothing for {_LIMIT_S:g} s")
    return end.recv()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", default="128")
    parser.add_argument("--in-flight", default="1,3")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=800)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    with mps():
        for tokens in map(int, args.tokens.split(",")):
            for in_flight in map(int, args.in_flight.split(",")):
                rows.append(measure(tokens, args.experts, in_flight, args.blocks))
                print(json.dumps(rows[-1]), flush=True)
    if args.out:
        facts = gpu_facts() | {"experts": args.experts, "rows": rows}
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
