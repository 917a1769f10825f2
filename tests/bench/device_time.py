"""Device time of kernels and the card's ceilings: replays of a CUDA graph over rotated weights, steadily and in bursts.

Steadily, one replay after another for seconds, a card at its power limit lowers its clocks. In bursts of milliseconds,
with nine times as long a rest behind each, it has power to spare.
"""

import functools
import itertools
import math
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
_SETTLE_S, _TIMED_S = 1.0, 0.6
_BURST_S, _REST = 0.002, 9  # at least, and how many times as long nothing runs
_BURSTS_S, _BURSTS = 1.0, (6, 25)  # of all bursts; of them at least and at most


class Timing(NamedTuple):
    """Microseconds of one call, median over replays."""

    us: float
    low_us: float  # 10th and 90th percentile
    high_us: float
    watts: float  # the card's power meanwhile
    mhz: float  # and its SMs' clock
    burst_us: float  # in bursts
    burst_mhz: float


class Ceiling(NamedTuple):
    """What a card does of one thing alone: bytes or FLOP per second."""

    per_s: float
    burst_per_s: float
    watts: float


@functools.cache
def _card() -> object:
    """NVML's handle of the current card."""
    pynvml.nvmlInit()
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")


def power_limit() -> float:
    """Watts that the card holds its power below."""
    return float(pynvml.nvmlDeviceGetEnforcedPowerLimit(_card())) / 1e3


def _mhz() -> int:
    return int(pynvml.nvmlDeviceGetClockInfo(_card(), pynvml.NVML_CLOCK_SM))


class _Meter:
    """The card's power and clock while the block runs, by NVML's count of energy, which changes some times a second."""

    def __init__(self) -> None:
        self._changes: list[tuple[float, float, int]] = []  # seconds, joules, MHz
        self._done = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "_Meter":
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._reader.join()

    def _read(self) -> None:
        while not self._done.wait(0.002):
            joules = pynvml.nvmlDeviceGetTotalEnergyConsumption(_card()) / 1e3
            if not self._changes or joules > self._changes[-1][1]:
                self._changes.append((time.perf_counter(), joules, _mhz()))

    def means(self, since: float) -> tuple[float, float]:
        """Watts and MHz between the first change after `since` and the last; ValueError if there were not two."""
        seen = [change for change in self._changes if change[0] >= since]
        if len(seen) < 2:
            raise ValueError(f"the count of energy changed {len(seen)} times")
        (began, before, _), *_, (ended, after, _) = seen
        return (after - before) / (ended - began), statistics.fmean(mhz for _, _, mhz in seen)


def _capture(calls: Sequence[Callable[[], object]]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of the calls, repeated up to 32 calls or 4 ms, so that the gap between two replays does not count."""
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
    return graph, len(calls)


def _replayed(graph: torch.cuda.CUDAGraph, replays: int) -> list[torch.cuda.Event]:
    """Ask for replays, and for an event before, between and behind them."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    return events


def _times_us(events: list[torch.cuda.Event], calls: int) -> list[float]:
    return [a.elapsed_time(b) * 1e3 / calls for a, b in itertools.pairwise(events)]


def _in_bursts(graph: torch.cuda.CUDAGraph, calls: int) -> tuple[float, float]:
    """Median microseconds of a call, and MHz; a burst's first replay, which waits for its launch, does not count."""
    graph.replay()
    events = _replayed(graph, 1)
    torch.cuda.synchronize()
    (once,) = _times_us(events, calls)
    replay_s = once * calls / 1e6
    replays = max(3, math.ceil(_BURST_S / replay_s))
    rest_s = _REST * replays * replay_s
    least, most = _BURSTS
    times, clocks = [], []
    for _ in range(max(least, min(most, int(_BURSTS_S / rest_s)))):
        time.sleep(rest_s)
        events = _replayed(graph, replays)
        clocks.append(_mhz())
        torch.cuda.synchronize()
        times += _times_us(events[1:], calls)
    return statistics.median(times), statistics.fmean(clocks)


def time_calls(calls: Sequence[Callable[[], object]]) -> Timing:
    """Device time of one call: `calls` (the same work on rotated inputs) are captured together and replayed."""
    graph, count = _capture(calls)
    burst_us, burst_mhz = _in_bursts(graph, count)
    with _Meter() as meter:
        start, replays = time.perf_counter(), 0
        while time.perf_counter() - start < _SETTLE_S:
            graph.replay()
            torch.cuda.synchronize()
            replays += 1
        since = time.perf_counter()
        events = _replayed(graph, max(2, int(replays * _TIMED_S / _SETTLE_S)))
        torch.cuda.synchronize()
    times = _times_us(events, count)
    tenths = statistics.quantiles(times, n=10)
    watts, mhz = meter.means(since)
    return Timing(statistics.median(times), tenths[0], tenths[-1], watts, mhz, burst_us, burst_mhz)


def _ceiling(work: float, call: Callable[[], object]) -> Ceiling:
    took = time_calls([call])
    return Ceiling(work / took.us * 1e6, work / took.burst_us * 1e6, took.watts)


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
