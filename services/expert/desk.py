"""The desk: where there is a compiler, an idle expert answers small questions of neighbours without Python (`desk.c`).

It launches the graphs that `GraphedExperts` has captured, from the places that these share, so a question that it
refuses is computed as if there were none. What it answered it tells of afterwards.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import common.transport
from common.compiled import compiled
from common.placement.plan import Place
from kernels.graphs import Replays
from services.expert.staged import Staged

_HEADER = Path(common.transport.__file__).with_name("answerer.h")
_compiled = compiled(Path(__file__).with_name("desk.c"), headers=(_HEADER,))

Answered = Callable[[int, int, int, int, int, int, int], None]
"""Is told of (layer, expert, num_rows, trace, microbatch, since_ns, ended_ns)."""


class Desk:
    """The graphs of one worker's experts, by place and bucket of rows."""

    def __init__(
        self, staged: Staged, graphs: Replays, num_buckets: int, answered: Answered
    ) -> None:
        """Takes over counting the turns of `staged`, none of which may be under way. See `is_possible`."""
        assert _compiled is not None, "no compiler"
        self._handles: dict[int, bytes] = {}
        self._nothing = bytes(8 * num_buckets)
        self._known: set[tuple[Place, int]] = set()
        self._staged, self._launcher = staged, graphs.launcher()
        most, width = staged.rows.shape
        launch = ctypes.cast(self._launcher, ctypes.c_void_p).value
        device = staged.rows.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        self._desk: Any = _compiled.Desk(
            width, most, staged.TURNS, *staged.addresses, launch, stream, self._handles, answered
        )
        assert self._desk.turn == staged.turns.turn, "a turn under way"
        staged.turns = self._desk

    @property
    def num_waiting(self) -> int:
        """Questions that it has taken and not answered."""
        waiting: int = self._desk.num_waiting
        return waiting

    @property
    def answerer(self) -> object:
        """For `Transport.answer_with`."""
        return self._desk.capsule()

    def knows(self, place: Place, bucket: int) -> bool:
        """Whether it was told of that graph."""
        return (place, bucket) in self._known

    def learn(self, place: Place, bucket: int, handle: int) -> None:
        """The graph of an expert for bucket number `bucket` of rows; 0: there is none."""
        key = _key(place)
        handles = memoryview(bytearray(self._handles.get(key, self._nothing))).cast("Q")
        handles[bucket] = handle
        self._handles[key] = handles.tobytes()
        if handle:
            self._known.add((place, bucket))

    def forget(self, place: Place) -> None:
        """That expert is given up."""
        self._handles.pop(_key(place), None)
        self._known = {known for known in self._known if known[0] != place}


def _key(place: Place) -> int:
    layer, expert = place
    return layer << 16 | expert


def is_possible() -> bool:
    """Whether there is a compiler."""
    return _compiled is not None
