"""Experts on a GPU: one as it is, one on few rows as a CUDA graph, several of a layer in one launch each way."""

import bisect
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn.functional import linear

from common.transport.device import open_copy
from kernels import ops
from kernels.graphs import Replays
from kernels.reference.quant import BLOCK

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

    A graph per expert and bucket of rows, on buffers that all share, into which a kernel copies and whose last kernel
    copies out; rows that are left over in a bucket hold what was there before, and nobody reads theirs.
    """

    BUCKETS = (8, 16, 32, 64, 128)

    def __init__(self, width: int, device: torch.device) -> None:
        blocks = -(-width // BLOCK)
        self._graphs = Replays(device)
        most = self.BUCKETS[-1]
        self._rows = torch.zeros(most, width, dtype=torch.uint8, device=device)
        self._scales = torch.ones(most, blocks, device=device)
        self._place = torch.zeros(2, dtype=torch.int64, device=device)  # of the outputs

    def __call__(
        self, expert: DeviceExpert, rows: Tensor, scales: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """rows e4m3 [n, width] with scales fp32, n at most the largest bucket, contiguous: bf16 [n, width].

        In `out` if that is bf16; contiguous.
        """
        n = len(rows)
        bucket = _bucket(self.BUCKETS, n)
        if out is None or out.dtype is not torch.bfloat16:
            out = torch.empty_like(rows, dtype=torch.bfloat16)
        ops.stage(rows, scales, out, self._rows, self._scales, self._place)
        self._graphs.run((expert, bucket), partial(self._compute, expert, bucket))
        return out

    def _compute(self, expert: DeviceExpert, bucket: int) -> None:
        """The step of a graph."""
        rows = self._rows[:bucket].view(torch.float8_e4m3fn)
        ops.deliver(expert(rows, self._scales[:bucket]), self._place)

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
        self._rows = torch.zeros(self.ROWS[-1], width, dtype=torch.uint8, device=device)
        self._scales = torch.ones(self.ROWS[-1], -(-width // BLOCK), device=device)
        self._place = torch.zeros(2, dtype=torch.int64, device=device)  # of the outputs
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

    def __call__(self, groups: list[Group], rows: Tensor, scales: Tensor) -> Tensor | None:
        """rows e4m3 [n, width] with scales fp32, contiguous: bf16 [n, width].

        None when an expert has no slot, or there are more groups than the largest bucket.
        """
        slots = [(self._slots.get(expert, -1), start, stop) for expert, start, stop in groups]
        slots.sort()  # who reads the same weights is side by side
        if slots[0][0] < 0 or len(slots) > self.GROUPS[-1]:
            return None
        count = _bucket(self.GROUPS, len(slots))
        self._upload(slots, count)
        n, most = len(rows), max(stop - start for _, start, stop in slots)
        if n > self.ROWS[-1] or most > self.TALL[-1]:
            table = self._table[:count]
            return ops.expert_ffn_grouped(rows, scales, table, *self._stacked, max_rows=most)
        num, tall = _bucket(self.ROWS, n), _bucket(self.TALL, most)
        out = torch.empty_like(rows, dtype=torch.bfloat16)
        ops.stage(rows, scales, out, self._rows, self._scales, self._place)
        self._graphs.run((num, count, tall), partial(self._compute, num, count, tall))
        return out

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
        rows = self._rows[:num].view(torch.float8_e4m3fn)
        out = ops.expert_ffn_grouped(
            rows, self._scales[:num], self._table[:count], *self._stacked, max_rows=tall
        )
        ops.deliver(out, self._place)


def _bucket(sizes: tuple[int, ...], wanted: int) -> int:
    return sizes[bisect.bisect_left(sizes, wanted)]
