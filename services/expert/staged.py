"""What graphs of experts are fed from, and where it is told that they are done: device buffers, and pinned memory."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Protocol

import torch

from kernels import ops
from kernels.graphs import Replays
from kernels.reference.quant import BLOCK
from services.expert.bank import Call

Tensor = torch.Tensor


class Turns(Protocol):
    """`turn`: the last that was brought, from 1 on."""

    turn: int


class _Turns:
    __slots__ = ("turn",)

    def __init__(self) -> None:
        self.turn = 0


class Staged:
    """The buffers of graphs: rows of calls, one call behind the other, and where each row's output is wanted.

    A graph's first kernel reads in pinned memory what to bring, its last tells there that all is written: launching the
    graph is the only call of the driver. A turn's place there is used again when it is over.
    """

    TURNS = 8

    def __init__(self, most: int, width: int, device: torch.device) -> None:
        self.rows = torch.zeros(most, width, dtype=torch.uint8, device=device)
        self.scales = torch.ones(most, -(-width // BLOCK), device=device)
        self.places = torch.zeros(1 + most, dtype=torch.int64, device=device)  # where outputs go
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        pinned = partial(torch.zeros, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._calls, self._told = pinned(self.TURNS, 1 + 5 * most), pinned(1)
        self._fields = [turn.numpy().data for turn in self._calls]
        self._seen = self._told.numpy().data
        self.turns: Turns = _Turns()  # those that were brought

    @property
    def has_room(self) -> bool:
        """Whether there may be another turn: the device still reads those that are not over."""
        return self.turns.turn - self._seen[0] < self.TURNS

    def bring(self, calls: Sequence[Call]) -> list[Tensor]:
        """What the next graph brings: rows e4m3 [n, width] with scales, contiguous. Returns their outputs, bf16."""
        assert self.has_room, "a turn that is not over"
        fields, outputs, end = self._fields[self.turns.turn % self.TURNS], [], 0
        fields[0], at = len(calls), 1
        for call in calls:
            (rows, scales), out, picks = call.quantised, call.out, call.picks
            num_rows, width = call.num_rows, rows.shape[1]
            if out is None or out.dtype is not torch.bfloat16:
                out = rows.new_empty((num_rows, width), dtype=torch.bfloat16)
            end += num_rows
            source, to = rows.data_ptr(), out.data_ptr()
            assert (source | to) & 15 == 0, "rows that are not aligned"
            fields[at], fields[at + 1], fields[at + 2] = end, source, scales.data_ptr()
            fields[at + 3] = to
            fields[at + 4] = 0 if picks is None else picks[0].data_ptr() + picks[1]
            outputs.append(out)
            at += 5
        self.turns.turn += 1  # not for calls that cannot be brought
        return outputs

    def stage(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """A graph's first step, for up to so many rows: what was brought, e4m3 with scales."""
        rows, scales = self.rows[:num_rows], self.scales[:num_rows]
        ops.stage(rows, scales, self.places, self._calls, self._count, 2 * rows.shape[1])
        return rows.view(torch.float8_e4m3fn), scales

    def tell(self) -> None:
        """Its last step: outputs bf16 are where they are wanted."""
        ops.tell(self._count, self._told)

    def run(self, graphs: Replays, key: Hashable, step: Callable[[], None]) -> None:
        """Launch the graph of a turn that was brought; of one that cannot be launched nothing is left."""
        try:
            graphs.run(key, step)
        except BaseException:
            self.turns.turn = int(self._count)
            raise

    def written(self) -> Callable[[], bool]:
        """Asks whether the outputs of the last turn are: a look into memory."""
        wanted, seen = self.turns.turn, self._seen
        return lambda: seen[0] >= wanted

    @property
    def addresses(self) -> tuple[int, int]:
        """Where turns are written down, and where it is told that they are over."""
        return self._calls.data_ptr(), self._told.data_ptr()
