"""CPU time of one call to an expert, without its messages: in one process, and in sixteen that take turns on one core.

    python -m tests.bench.expert_turns [--out FILE]

What EP16 on two cores pays for having sixteen processes: each finds the caches full of the others. A call is a header
to read, four rows to compute (width 128, inner width 64) and an answer to write; processes are forked like the
cluster's. Medians over `ROUNDS` rounds.
"""

import argparse
import gc
import json
import os
import socket
import struct
import time
from pathlib import Path
from statistics import median

import torch

from common.model.loader import FfnWeights
from common.tensors import put_bytes, rows_of, write_rows
from common.transport.buffers import BufferPool
from common.wire.blocks import RowType, expert_in_layout, row_segment
from common.wire.header import HEADER_NBYTES, Header, Kind, Wire
from services.expert.bank import Bank
from services.expert.engine import compute, parse
from tests.bench.environment import facts

WIDTH, INNER, ROWS, ROUNDS, WARM_UP = 128, 64, 4, 300, 30
_LAYER, _EXPERT = 1, 3
_spent = struct.Struct("q")


def answer_for_ever(link: socket.socket) -> None:
    """Make one call per byte that comes; tell the nanoseconds of CPU that it took."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    weights = FfnWeights(torch.randn(2 * INNER, WIDTH) / 9, torch.randn(WIDTH, INNER) / 9)
    place = _LAYER, _EXPERT
    bank = Bank(WIDTH, "model", {place: weights}, {}, {place: 0})
    pool = BufferPool()
    layout = expert_in_layout(ROWS, WIDTH, 1, Wire.FP32)
    question = pool.acquire(layout.nbytes)
    rows_of(question, layout.rows).normal_()
    put_bytes(question, layout.segments, torch.tensor([_EXPERT, ROWS], dtype=torch.int32).numpy())
    header = Header(
        Kind.EXPERT_IN, Wire.FP32, layer=_LAYER, width=WIDTH, num_rows=ROWS, num_pairs=1,
        payload_nbytes=layout.nbytes,
    )  # fmt: skip
    packed = bytearray(HEADER_NBYTES)
    header.pack_into(packed)
    segment = row_segment(ROWS, WIDTH, RowType.FP32)
    with torch.inference_mode():
        while link.recv(1):
            started = time.thread_time_ns()
            request = Header.unpack_from(packed, max_payload_nbytes=1 << 20)
            (rows,) = compute(bank, _LAYER, [parse(request, question, bank)])
            buffer = pool.acquire(segment.end)
            write_rows(buffer, segment, rows)
            reply = request.derive(
                Kind.EXPERT_OUT, target=0, num_rows=ROWS, payload_nbytes=segment.end
            )
            reply.pack_into(buffer.view)
            buffer.release()
            link.send(_spent.pack(time.thread_time_ns() - started))


def call_us(num_processes: int) -> float:
    """CPU microseconds of a call when this many processes are asked in turn."""
    links: list[socket.socket] = []
    for _ in range(num_processes):
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            for link in (ours, *links):
                link.close()
            try:
                answer_for_ever(theirs)
            finally:
                os._exit(0)
        theirs.close()
        links.append(ours)
    spent = []
    for number in range(ROUNDS):
        for link in links:
            link.send(b"x")
            (ns,) = _spent.unpack(link.recv(_spent.size))
            if number >= WARM_UP:
                spent.append(ns / 1000)
    for link in links:
        link.close()
    for _ in links:
        os.wait()
    return median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    figures = {f"call_us_{n}": call_us(n) for n in (1, 16)}
    print(figures)
    if args.out:
        args.out.write_text(json.dumps(facts() | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
