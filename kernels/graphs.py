"""CUDA graphs of steps on tensors that stay where they are: launch cost leaves the critical path.

On CPU a step runs as it is, so that the same code is tested everywhere.
"""

import ctypes
import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

log = logging.getLogger(__name__)
_Launch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


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
        self._steps: dict[int, Callable[[], None]] = {}  # without graphs: by what stands for one

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
        self._steps.pop(_number(key), None)
        if not self._graphs:
            self._pool = (
                None  # memory that the last graph took along: torch refuses to capture into it
            )

    def handle(self, key: Hashable, step: Callable[[], None]) -> int:
        """The CUgraphExec of that key, for whoever launches it from C; 0 while there is none.

        Without graphs it stands for the step.
        """
        if not self._captures:
            self._steps[_number(key)] = step
            return _number(key)
        graph: Any = self._graphs.get(key)
        if graph is None or not hasattr(graph, "raw_cuda_graph_exec"):  # of an older torch
            return 0
        return int(graph.raw_cuda_graph_exec())

    def launcher(self) -> Any:  # noqa: ANN401  -- ctypes'
        """int launch(handle, stream), 0 if well: the driver's, or what runs the step. To be kept while it is used."""
        if self._captures:
            return ctypes.CDLL("libcuda.so.1").cuGraphLaunch
        return _Launch(self._run_step)

    def _run_step(self, handle: int, stream: int) -> int:
        del stream
        try:
            self._steps[handle]()
        except Exception:
            log.exception("a step failed")
            return 1
        return 0

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


def _number(key: Hashable) -> int:
    """Like an address, and not 0."""
    return hash(key) & (1 << 47) - 1 | 1
