"""Experts on a GPU: one as it is, one on few rows as a CUDA graph, several of a layer in one launch each way."""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn.functional import linear

from common.placement.plan import Place
from common.transport.device import open_copy
from kernels import ops
from kernels.graphs import Replays
from services.expert import desk
from services.expert.bank import Call, joined, own_rows
from services.expert.desk import Answered, Desk
from services.expert.staged import Staged

Tensor = torch.Tensor
Group = tuple["DeviceExpert", int, int]  # and its rows: the first, the one behind the last


@dataclass(frozen=True, slots=True, eq=False)
class DeviceExpert:
    """gate_up [2 * hidden, width], gate first; down [width, hidden]. e4m3 where there are scales per 128x128 block."""

    gate_up: Tensor
    down: Tensor
    gate_up_scales: Tensor | None = None
    down_scales: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the kernels take of an FP8 expert, in their order."""
        assert self.gate_up_scales is not None, "an expert without scales"
        assert self.down_scales is not None, "an expert without scales"
        return self.gate_up, self.gate_up_scales, self.down, self.down_scales

    @property
    def is_fp8(self) -> bool:
        """Whether it goes through the fused kernel."""
        return self.gate_up_scales is not None

    def __call__(self, rows: Tensor, scales: Tensor | None) -> Tensor:
        """rows [n, width], e4m3 where `scales` fp32 [n, ceil(width / 128)] are given: [n, width], bf16 or fp32."""
        if self.gate_up_scales is not None and self.down_scales is not None:
            if scales is None:
                rows, scales = ops.quantise(rows)
            return ops.expert_ffn(
                rows, scales, self.gate_up, self.gate_up_scales, self.down, self.down_scales
            )
        dtype = self.gate_up.dtype
        x = rows.to(dtype) if scales is None else ops.dequantise(rows, scales, dtype)
        gate, up = linear(x, self.gate_up).float().chunk(2, dim=1)
        return linear((torch.nn.functional.silu(gate) * up).to(dtype), self.down)


class GraphedExperts:
    """FP8 experts on few rows as CUDA graphs: a call cost 133 us of Python, with copies by torch; its kernels launched
    one by one cost 271 (128 rows, hidden 2048, two H100 hosts, 2026-11-25).

    A graph per expert and bucket of rows, on buffers that all share; rows that are left over in a bucket hold what was
    there before, and nobody reads theirs.
    """

    BUCKETS = (8, 16, 32, 64, 128)  # as `desk.c` has them: each twice the one before

    def __init__(self, width: int, device: torch.device) -> None:
        self._graphs = Replays(device)
        self._staged = Staged(self.BUCKETS[-1], width, device)

    def __call__(self, expert: DeviceExpert, calls: Sequence[Call]) -> list[Tensor] | None:
        """Outputs of an expert, bf16; no more rows together than the largest bucket.

        None while as many graphs are under way as may be.
        """
        if not self._staged.has_room:
            return None
        bucket = _bucket(self.BUCKETS, sum([call.num_rows for call in calls]))
        outputs = self._staged.bring(calls)
        self._staged.run(self._graphs, (expert, bucket), partial(self._compute, expert, bucket))
        return outputs

    def written(self) -> Callable[[], bool]:
        """Asks whether the last outputs are."""
        return self._staged.written()

    def open_desk(self, answered: Answered) -> Desk | None:
        """For questions that need no Python; None where there is no compiler."""
        if not desk.is_possible():
            return None
        return Desk(self._staged, self._graphs, len(self.BUCKETS), answered)

    def teach(self, to: Desk, place: Place, expert: DeviceExpert, num_rows: int) -> None:
        """Tell the desk of the graph for so many rows of the expert at `place`, if it does not know."""
        number = bisect.bisect_left(self.BUCKETS, num_rows)
        if not to.knows(place, number):
            bucket = self.BUCKETS[number]
            step = partial(self._compute, expert, bucket)
            to.learn(place, number, self._graphs.handle((expert, bucket), step))

    def _compute(self, expert: DeviceExpert, bucket: int) -> None:
        """The step of a graph."""
        ops.expert_ffn_placed(*self._staged.stage(bucket), *expert.parts, self._staged.places)
        self._staged.tell()

    def forget(self, expert: DeviceExpert) -> None:
        """Its weights are given up: a graph would read them."""
        for bucket in self.BUCKETS:
            self._graphs.forget((expert, bucket))


class GroupedExperts:
    """FP8 experts side by side in memory, so that one launch reaches them all: the traditional layout.

    Up to 1024 rows and 128 per group it is one CUDA graph, on buffers that all share; groups that are left over in a
    bucket are empty. A slot that an expert gave up is used again.
    """

    ROWS, GROUPS, TALL = (128, 256, 512, 1024), (32, 128, 512), (64, 128)
    _STAGINGS = 4  # more than there are batches under way

    def __init__(self, like: DeviceExpert, size: int, device: torch.device) -> None:
        """Room for `size` experts of the same shape."""
        width = like.down.shape[0]
        self._stacked = [part.new_empty((size, *part.shape)) for part in like.parts]
        self._slots: dict[DeviceExpert, int] = {}
        self._free = list(range(size))[::-1]
        self._graphs = Replays(device)
        self._copy = open_copy(device)
        self._staged = Staged(self.ROWS[-1], width, device)
        self._table = torch.zeros(self.GROUPS[-1], 3, dtype=torch.int32, device=device)
        self._stagings = torch.zeros(
            self._STAGINGS, self.GROUPS[-1], 3, dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        self._turn = 0

    def hold(self, expert: DeviceExpert) -> DeviceExpert:
        """The same expert in a slot; itself where no slot is free."""
        if not self._free:
            return expert
        slot = self._free.pop()
        for stacked, part in zip(self._stacked, expert.parts, strict=True):
            stacked[slot].view(torch.uint8).copy_(part.view(torch.uint8))
        gate_up, gate_up_scales, down, down_scales = (stacked[slot] for stacked in self._stacked)
        held = DeviceExpert(gate_up, down, gate_up_scales, down_scales)
        self._slots[held] = slot
        return held

    def forget(self, expert: DeviceExpert) -> None:
        """Give its slot up, if it has one."""
        slot = self._slots.pop(expert, None)
        if slot is not None:
            self._free.append(slot)

    def __call__(self, groups: list[Group], calls: Sequence[Call]) -> list[Tensor] | None:
        """Outputs, bf16; `groups` are of the rows of all calls, one call behind the other.

        None when an expert has no slot, there are more groups than the largest bucket, or as many graphs are under way
        as may be.
        """
        slots = [(self._slots.get(expert, -1), start, stop) for expert, start, stop in groups]
        slots.sort()  # who reads the same weights is side by side
        if slots[0][0] < 0 or len(slots) > self.GROUPS[-1] or not self._staged.has_room:
            return None
        count = _bucket(self.GROUPS, len(slots))
        self._upload(slots, count)
        sizes = [call.num_rows for call in calls]
        n, most = sum(sizes), max(stop - start for _, start, stop in slots)
        if n > self.ROWS[-1] or most > self.TALL[-1]:
            own = own_rows(calls)
            rows, scales = map(joined, zip(*(call.quantised for call in own), strict=True))
            table = self._table[:count]
            out = ops.expert_ffn_grouped(rows, scales, table, *self._stacked, max_rows=most)
            return list(torch.split(out, sizes))
        num, tall = _bucket(self.ROWS, n), _bucket(self.TALL, most)
        outputs = self._staged.bring(calls)
        step = partial(self._compute, num, count, tall)
        self._staged.run(self._graphs, (num, count, tall), step)
        return outputs

    def _upload(self, slots: list[tuple[int, int, int]], count: int) -> None:
        """The first `count` groups on the device, in its turn: memory of its own for each batch under way."""
        self._turn = (self._turn + 1) % self._STAGINGS
        staging = self._stagings[self._turn]
        there = staging.numpy()
        there[: len(slots)] = np.array(slots, np.int32)
        there[len(slots) : count] = 0
        self._copy(self._table.data_ptr(), staging.data_ptr(), 12 * count)

    def _compute(self, num: int, count: int, tall: int) -> None:
        """The step of a graph."""
        rows, scales = self._staged.stage(num)
        out = ops.expert_ffn_grouped(
            rows, scales, self._table[:count], *self._stacked, max_rows=tall
        )
        ops.deliver(out, self._staged.places)
        self._staged.tell()


def _bucket(sizes: tuple[int, ...], wanted: int) -> int:
    return sizes[bisect.bisect_left(sizes, wanted)]
