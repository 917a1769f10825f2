"""A process that tells which UCX it loads, or moves bytes to a twin and measures it: for `atoll doctor`.

    python -m common.transport.transfer_probe about
    python -m common.transport.transfer_probe self|sender|receiver [cuda[:INDEX]]

The environment decides what UCX may use (`UCX_TLS`, `UCX_NET_DEVICES`). JSON lines: an end first writes
{"address": hex} and reads its twin's in the same form from stdin, which must come from an authenticated place; the
sender then writes {"gb_per_s", "latency_us", "carriers", "cpu_share"}. It polls, since what the medium can do is
asked, not what waking up costs. A process of its own because UCX aborts on some faults, and reads its environment once.
"""

import json
import os
import signal
import statistics
import sys
import time
from typing import Any

import numpy as np

from common.transport.carriers import carriers_of, loaded_library

DEADLINE_S = 20  # to load, and then to measure; the process else dies of SIGALRM
_ADDRESS_TAG, _SMALL_NBYTES, _NUM_PINGS = 7, 8, 200
_BURST = 4  # large messages in flight
_NBYTES, _CUDA_NBYTES = 8 << 20, 64 << 20
_MEASURE_S = 0.4
_YIELD_EVERY = 64
_PING, _BURST_FOLLOWS, _END = 0, 1, 2


class End:
    """A UCX worker and its endpoint to the twin."""

    def __init__(self) -> None:
        from ucxx._lib import libucxx
        from ucxx._lib.arr import Array

        self._lib = libucxx
        self.array = Array
        self._tag = libucxx.UCXXTag(_ADDRESS_TAG)
        self._mask = libucxx.UCXXTagMask(2**64 - 1)
        self.context = libucxx.UCXContext({}, (libucxx.Feature.TAG,))
        self._worker = libucxx.UCXWorker(self.context)
        self.address = bytes(self._worker.address)
        self._endpoint: Any = None

    def connect(self, address: bytes) -> None:
        """To the twin's worker: a garbage address aborts the process. `self` has no error handling and needs none."""
        parsed = self._lib.UCXAddress.create_from_buffer(address)
        self._endpoint = self._lib.UCXEndpoint.create_from_worker_address(
            self._worker, parsed, address != self.address
        )

    def carriers(self) -> tuple[str, ...]:
        """What UCX chose."""
        return carriers_of(int(self._endpoint.handle))

    def send(self, array: object) -> Any:  # noqa: ANN401  -- a request of ucxx
        """Post a send."""
        return self._endpoint.tag_send(array, self._tag)

    def receive(self, array: object) -> Any:  # noqa: ANN401
        """Post a receive."""
        return self._worker.tag_recv(array, self._tag, self._mask)

    def wait(self, *requests: Any) -> None:  # noqa: ANN401
        """Progress until all are done. Raises what UCX says."""
        rounds = 0
        for request in requests:
            while not request.completed:
                self._worker.progress()
                rounds += 1
                if rounds % _YIELD_EVERY == 0:
                    os.sched_yield()  # the twin may be waiting for this core
            request.check_error()


def about() -> dict[str, Any]:
    """Library, version and every resource of the UCX that this process loads."""
    from ucxx._lib import libucxx

    context = libucxx.UCXContext({}, (libucxx.Feature.TAG,))
    library = loaded_library("libucp")
    lines = [line.partition(" -- ")[2].strip() for line in str(context.info).splitlines()]
    return {
        "library": "" if library is None else str(library),
        "version": ".".join(map(str, libucxx.get_ucx_version())),
        "resources": sorted({line for line in lines if line}),
    }


class CpuShare:
    """What part of a core this process, which never sleeps, got: below 1 when others want it too."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def now(self) -> float:
        """Since it was made, 0 to 1."""
        wall, cpu = time.perf_counter() - self._started[0], time.process_time() - self._started[1]
        return min(1.0, cpu / wall) if wall > 0 else 1.0


class Memory:
    """The buffers of one end: host memory, or a card's."""

    def __init__(self, end: End, device: str, *, fill: bool) -> None:
        self._is_cuda = device.startswith("cuda")
        size = _CUDA_NBYTES if self._is_cuda else _NBYTES
        if self._is_cuda:
            import torch

            torch.cuda.set_device(torch.device(device))
            self.blocks: list[Any] = [
                torch.full((size,), (i + 1) * fill, dtype=torch.uint8, device=device)
                for i in range(_BURST)
            ]
            torch.cuda.synchronize()
        else:
            self.blocks = [np.full(size, (i + 1) * fill, dtype=np.uint8) for i in range(_BURST)]
        self.arrays = [end.array(block) for block in self.blocks]
        self.nbytes = size * _BURST
        self.small = np.zeros(_SMALL_NBYTES, dtype=np.uint8)
        self.reply = np.zeros(_SMALL_NBYTES, dtype=np.uint8)
        self.small_array, self.reply_array = end.array(self.small), end.array(self.reply)

    def is_whole(self) -> bool:
        """True when what a sender filled in is here, every byte."""
        return all(bool((block == i + 1).all()) for i, block in enumerate(self.blocks))


def send_and_measure(end: End, memory: Memory) -> dict[str, Any]:
    """Round trips of 8 bytes, then bursts for a while. The best counts (of round trips the best tenth): others may use
    the machine.
    """
    times, share = [], CpuShare()
    for _ in range(_NUM_PINGS):
        started = time.perf_counter()
        _ask(end, memory, _PING)
        times.append((time.perf_counter() - started) / 2)
    best, until = float("inf"), time.monotonic() + _MEASURE_S
    is_whole = True
    while time.monotonic() < until or best == float("inf"):
        started = time.perf_counter()
        memory.small[0] = _BURST_FOLLOWS
        requests = [end.send(memory.small_array)]
        requests += [end.send(array) for array in memory.arrays]
        end.wait(*requests, end.receive(memory.reply_array))
        is_whole &= bool(memory.reply[0])
        best = min(best, time.perf_counter() - started)
    carriers = end.carriers()
    memory.small[0] = _END
    end.wait(end.send(memory.small_array), end.receive(memory.reply_array))
    if not is_whole:
        return {"problem": "what arrived was not what was sent"}
    return {
        "gb_per_s": memory.nbytes / best / 1e9,
        "latency_us": statistics.quantiles(times, n=10)[0] * 1e6,
        "carriers": carriers,
        "cpu_share": min(share.now(), int(memory.reply[1]) / 100),
    }


def _ask(end: End, memory: Memory, what: int) -> None:
    memory.small[0] = what
    end.wait(end.send(memory.small_array), end.receive(memory.reply_array))


def receive_and_answer(end: End, memory: Memory) -> None:
    """The twin of `send_and_measure`. Only the first burst is looked through: that takes time."""
    looked, share = False, CpuShare()
    memory.small[0] = 1
    while memory.reply[0] != _END:
        end.wait(end.receive(memory.reply_array))
        if memory.reply[0] == _BURST_FOLLOWS:
            end.wait(*[end.receive(array) for array in memory.arrays])
            if not looked:
                looked, memory.small[0] = True, memory.is_whole()
        memory.small[1] = 100 * share.now()
        end.wait(end.send(memory.small_array))


def measure_self(end: End, sent: Memory, received: Memory) -> dict[str, Any]:
    """A worker that sends to itself."""
    times, share = [], CpuShare()
    for _ in range(_NUM_PINGS):
        started = time.perf_counter()
        end.wait(end.receive(received.reply_array), end.send(sent.small_array))
        times.append(time.perf_counter() - started)
    best, until = float("inf"), time.monotonic() + _MEASURE_S / 2
    while time.monotonic() < until or best == float("inf"):
        started = time.perf_counter()
        requests = [end.receive(array) for array in received.arrays]
        end.wait(*requests, *[end.send(array) for array in sent.arrays])
        best = min(best, time.perf_counter() - started)
    if not received.is_whole():
        return {"problem": "what arrived was not what was sent"}
    return {
        "gb_per_s": sent.nbytes / best / 1e9,
        "latency_us": statistics.quantiles(times, n=10)[0] * 1e6,
        "carriers": end.carriers(),
        "cpu_share": share.now(),
    }


def main(role: str, device: str = "cpu") -> None:
    """One of the roles of the module's docstring."""
    signal.alarm(DEADLINE_S)
    if role == "about":
        _write(about())
        return
    end = End()
    memory = Memory(end, device, fill=role != "receiver")
    if role == "self":
        end.connect(end.address)
        _write(measure_self(end, memory, Memory(end, device, fill=False)))
        return
    _write({"address": end.address.hex()})
    signal.alarm(0)  # others are measured first; when whoever asks dies, stdin ends
    address = bytes.fromhex(json.loads(sys.stdin.readline())["address"])
    signal.alarm(DEADLINE_S)
    end.connect(address)
    if role == "sender":
        _write(send_and_measure(end, memory))
    else:
        receive_and_answer(end, memory)


def _write(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
