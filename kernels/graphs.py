"""CUDA graphs of steps on tensors that stay where they are: launch cost leaves the critical path.

On CPU a step runs as it is, so that the same code is tested everywhere.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch


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
        if not self._graphs:
            self._pool = (
                None  # memory that the last graph took along: torch refuses to capture into it
            )

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
