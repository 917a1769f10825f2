"""Device time and power of kernels and the card's ceilings: replays of a CUDA graph, weights rotated."""

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pynvml
import torch
import triton
import triton.language as tl
from torch import Tensor

# Seconds of replays before any is timed, and of those that are: the clocks of a card at its power limit swing for about
# a second after the work has changed (DECISIONS.md).
_SETTLE_S, _TIMED_S = 1.0, 0.8


class Timing(NamedTuple):
    """Microseconds of one call: median, 10th and 90th percentile over replays; the card's power and SM clock meanwhile."""

    us: float
    low_us: float
    high_us: float
    watts: float
    mhz: float


class Ceiling(NamedTuple):
    """What a card does of one thing alone: bytes or FLOP per second, and its power meanwhile."""

    per_s: float
    watts: float


class Meter:
    """The current card's power while the block runs, by NVML's count of energy, which changes some times a second."""

    def __init__(self) -> None:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        self._card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        self._changes: list[tuple[float, float]] = []  # seconds, joules
        self._clocks: list[tuple[float, int]] = []  # seconds, MHz
        self._done = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "Meter":
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._reader.join()

    def _read(self) -> None:
        while not self._done.wait(0.002):
            joules = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._card) / 1e3
            if not self._changes or joules > self._changes[-1][1]:
                clock = pynvml.nvmlDeviceGetClockInfo(self._card, pynvml.NVML_CLOCK_SM)
                now = time.perf_counter()
                self._changes.append((now, joules))
                self._clocks.append((now, clock))

    def watts(self, since: float) -> float:
        """Between the first change after `since` and the last. Raises ValueError when there were not two."""
        seen = [change for change in self._changes if change[0] >= since]
        if len(seen) < 2:
            raise ValueError(f"the count of energy changed {len(seen)} times")
        (began, before), *_, (ended, after) = seen
        return (after - before) / (ended - began)

    def mhz(self, since: float) -> float:
        """Of the SMs, in the mean since then. Raises statistics.StatisticsError when none was read."""
        return statistics.fmean(clock for read, clock in self._clocks if read >= since)

    def limit(self) -> float:
        """What the card holds its power below."""
        return float(pynvml.nvmlDeviceGetEnforcedPowerLimit(self._card)) / 1e3


def idle_watts() -> float:
    """While nothing runs, shortly after something did."""
    torch.cuda.synchronize()
    time.sleep(_SETTLE_S)
    with Meter() as meter:
        since = time.perf_counter()
        time.sleep(_TIMED_S)
    return meter.watts(since)


def time_calls(calls: Sequence[Callable[[], object]]) -> Timing:
    """Device time of one call: `calls` (the same work on rotated inputs) are captured together and replayed.

    They are repeated up to 32 calls or 4 ms, so that the gap between two replays does not count.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(side):
        calls[0]()
        first.record()
        calls[-1]()
        second.record()
    torch.cuda.synchronize()
    most = min(32.0, 4 / first.elapsed_time(second))
    calls = list(calls) * max(1, int(most) // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    with Meter() as meter:
        start, replays = time.perf_counter(), 0
        while time.perf_counter() - start < _SETTLE_S:
            graph.replay()
            torch.cuda.synchronize()
            replays += 1
        replays = max(2, int(replays * _TIMED_S / _SETTLE_S))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        since = time.perf_counter()
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
    times = [a.elapsed_time(b) * 1e3 / len(calls) for a, b in itertools.pairwise(events)]
    tenths = statistics.quantiles(times, n=10)
    return Timing(statistics.median(times), tenths[0], tenths[-1], meter.watts(since), meter.mhz(since))


def _ceiling(work: float, call: Callable[[], object]) -> Ceiling:
    took = time_calls([call])
    return Ceiling(work / took.us * 1e6, took.watts)


@triton.jit
def _read(X, OUT, n, B: tl.constexpr):
    acc = tl.zeros((B,), tl.int32)
    start = tl.program_id(0).to(tl.int64) * B
    step = tl.num_programs(0).to(tl.int64) * B
    for at in tl.range(start, n, step, num_stages=1, loop_unroll_factor=4):
        acc += tl.load(X + at + tl.arange(0, B), cache_modifier=".cg")
    tl.store(OUT + tl.program_id(0), tl.sum(acc, 0))


def read_bandwidth() -> Ceiling:
    """Bytes per second of reading 4 GiB of random numbers with plain wide loads."""
    x = torch.randint(-(1 << 31), (1 << 31) - 1, (1 << 30,), dtype=torch.int32, device="cuda")
    out = torch.empty(1 << 16, dtype=torch.int32, device="cuda")
    found = []
    for programs in (132 * 8, 132 * 16, 132 * 32):
        for block in (2048, 4096):

            def call(programs: int = programs, block: int = block) -> None:
                _read[(programs,)](x, out, x.numel(), block, num_warps=8)

            found.append(_ceiling(x.nbytes, call))
    return max(found)


@triton.jit
def _copy(X, OUT, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    tl.store(OUT + at, tl.load(X + at))


def copy_bandwidth() -> Ceiling:
    """Bytes per second, read and written together, of a 2 GiB copy: the better of cudaMemcpy and a plain kernel."""
    x = torch.randint(-(1 << 31), (1 << 31) - 1, (1 << 29,), dtype=torch.int32, device="cuda")
    y = torch.empty_like(x)

    def kernel() -> None:
        _copy[(x.numel() // 4096,)](x, y, 4096, num_warps=8)

    return max(_ceiling(2 * x.nbytes, f) for f in (lambda: y.copy_(x), kernel))


def bf16_peak() -> Ceiling:
    """FLOP per second of an 8192^3 bf16 product on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return _ceiling(2 * 8192**3, lambda: a @ b)


def fp8_peak() -> Ceiling:
    """FLOP per second of an 8192^3 FP8 product with one scale per tensor, on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")

    def call() -> Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return _ceiling(2 * 8192**3, call)
