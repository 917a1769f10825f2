"""CUDA graphs of a step for a few batch sizes: launch cost leaves the critical path.

A step is a function of tensors whose first dimension is the number of rows. For each bucket it is captured once on
inputs of its own; a call copies its rows in, sets the rows left over to `idle`, replays, and returns views of the
outputs, valid until the next call of any bucket (graphs share their memory). On CPU the step runs on the same padded
inputs without a graph, so that the same code is tested everywhere.
"""

import bisect
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[..., Tensor | tuple[Tensor, ...]]


class BucketedStep:
    """`step` captured per bucket. `idle` holds one row of every input, as it stands where no row is."""

    def __init__(self, step: Step, buckets: Sequence[int], idle: Sequence[Tensor]) -> None:
        """buckets: numbers of rows, each at least 1; idle: tensors [1, ...] on the device of the step."""
        if not buckets or min(buckets) < 1:
            raise ValueError(f"buckets must be positive numbers of rows, not {list(buckets)}")
        self.buckets = sorted(set(buckets))
        self._step = step
        self._idle = tuple(idle)
        self._inputs: dict[int, tuple[Tensor, ...]] = {}
        self._outputs: dict[int, tuple[Tensor, ...]] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def __repr__(self) -> str:
        return f"<BucketedStep {self.buckets} [{len(self._graphs)} captured]>"

    def bucket(self, num_rows: int) -> int:
        """The smallest bucket that holds `num_rows`; ValueError when none does."""
        place = bisect.bisect_left(self.buckets, num_rows)
        if place == len(self.buckets):
            raise ValueError(f"{num_rows} rows do not fit the largest bucket, {self.buckets[-1]}")
        return self.buckets[place]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the step on inputs [num_rows, ...]; ValueError when they do not fit or do not agree."""
        num_rows = inputs[0].shape[0]
        if len(inputs) != len(self._idle) or any(x.shape[0] != num_rows for x in inputs):
            raise ValueError(f"{len(self._idle)} inputs of the same number of rows are wanted")
        bucket = self.bucket(num_rows)
        self._fill(bucket, inputs)
        if self._idle[0].is_cuda:
            self._graph(bucket).replay()
        else:
            self._outputs[bucket] = self._run(bucket)
        return tuple(y[:num_rows] for y in self._outputs[bucket])

    def capture(self) -> None:
        """Capture every bucket now, largest first, so that smaller ones share its memory."""
        for bucket in reversed(self.buckets):
            self._fill(bucket, ())
            if self._idle[0].is_cuda:
                self._graph(bucket)

    def _fill(self, bucket: int, inputs: Sequence[Tensor]) -> None:
        if bucket not in self._inputs:
            self._inputs[bucket] = tuple(
                x.expand(bucket, *x.shape[1:]).contiguous() for x in self._idle
            )
        for place, given, idle in zip(self._inputs[bucket], inputs, self._idle, strict=False):
            place[: given.shape[0]].copy_(given)
            place[given.shape[0] :].copy_(idle)

    def _run(self, bucket: int) -> tuple[Tensor, ...]:
        result = self._step(*self._inputs[bucket])
        return result if isinstance(result, tuple) else (result,)

    def _graph(self, bucket: int) -> torch.cuda.CUDAGraph:
        if bucket not in self._graphs:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles kernels and warms allocators
                self._run(bucket)
            torch.cuda.current_stream().wait_stream(side)
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._outputs[bucket] = self._run(bucket)
            self._graphs[bucket] = graph
        return self._graphs[bucket]


class Replays:
    """Steps on tensors that stay where they are, by key: run as they are on CPU, captured at first use on a GPU.

    Graphs share their scratch memory, so they must be replayed one after another on one stream, and what a step leaves
    outside tensors of its caller is valid until the next replay of any of them.
    """

    def __init__(self, device: torch.device, *, capture: bool = True) -> None:
        """`capture` False runs every step as it is."""
        self.num_replays = 0
        self._captures = capture and device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._side: torch.cuda.Stream | None = None

    def __repr__(self) -> str:
        return f"<Replays [{len(self._graphs)} captured | {self.num_replays} replays]>"

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Replay what `step` launched when this key was new. It must launch the same for the same key."""
        if not self._captures:
            step()
            return
        graph = self._graphs.get(key)
        if graph is None:
            self._graphs[key] = self._capture(step)
            return
        graph.replay()
        self.num_replays += 1

    def forget(self, key: Hashable) -> None:
        """What the step of this key reads is gone."""
        self._graphs.pop(key, None)

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Run the step, which compiles its kernels and may not be repeatable, then capture without running it."""
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if self._side is None:
            self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        # not torch.cuda.graph: before each of hundreds of captures it would give all cached memory back to the driver
        with torch.cuda.stream(self._side):
            # other threads of the process may call CUDA meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        self._pool = graph.pool()
        return graph
