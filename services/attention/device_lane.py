"""One micro-batch lane on a GPU: one graph replay and one message per MoE layer, nothing that waits for the device.

While this lane's rows are out its shared expert runs, then whatever other lanes have launched. Spans of a trace are
the device's own times (`device_clock`), so that what is called busy was; with one, a layer is two graphs.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.obs.trace import Recorder
from common.wire.header import Wire
from services.attention.device_batch import LaneState
from services.attention.device_clock import DeviceClock
from services.attention.device_model import DeviceModel
from services.attention.gate_balance import GateBalance
from services.attention.lane import StepTimes, span_of
from services.attention.moe_client import MoeClient
from services.attention.scheduler import Slice

Tensor = torch.Tensor
_SEGMENT = "attention"  # span of everything between two exchanges with the experts


@dataclass(slots=True)
class DeviceLane:
    """A lane's forward pass, as `services.attention.lane.Lane`; `state` is its own."""

    index: int
    model: DeviceModel
    state: LaneState
    moe: MoeClient
    times: StepTimes
    trace: Recorder | None = None
    device_clock: DeviceClock | None = None  # with a trace
    balance: GateBalance | None = None
    clock_ns: Callable[[], int] = time.monotonic_ns

    async def forward(
        self, slices: list[Slice], *, all_rows: bool = False
    ) -> tuple[Tensor, list[int]]:
        """Run the tokens of a step. See `services.attention.lane.Lane.forward`; the logits stay on the device."""
        started = self.clock_ns()
        state = self.state
        state.fill([span_of(piece) for piece in slices])
        try:
            for segment, layer in enumerate(self.model.config.moe_layers):
                await self._layer(segment, layer)
            before = self._mark()
            logits = self.model.head(state, None if all_rows else state.last_row_index())
            best = self._to_host(logits.argmax(dim=-1))
            after = self._mark()
            await self._passed()
        finally:
            state.let_go(self.moe.seam)
        ended = self.clock_ns()
        self.times.steps += 1
        self.times.tokens += state.num_rows
        self.times.step_us += (ended - started) // 1000
        if self.trace is not None:
            num_prompt = sum(piece.count for piece in slices if piece.sequence.in_prefill)
            self.trace.span("step", 0, num_prompt, self.index, started, ended, state.num_rows)
            self.trace.span("head", 0, 0, self.index, before, after, state.num_rows)
        return logits, best.tolist()

    async def _layer(self, segment: int, layer: int) -> None:
        state, trace, times, graphs = self.state, self.trace, self.times, self.model.graphs
        replays = graphs.num_replays
        t0, begin = self.clock_ns(), self._mark()
        fp8 = self.moe.wire is Wire.FP8  # other rows have yet to be copied
        if whole := fp8 and trace is None:  # a trace tells attention and shared expert apart
            self.model.layer(state, segment)
        else:
            self.model.before_experts(state, segment)
        packed = self._mark()
        block, n = self.moe.next_block, state.num_rows
        rows = state.outgoing() if fp8 else state.x[:n]
        answer = self.moe.dispatch(
            layer, self.index, rows, *state.choice, out=state.answer, since=packed,
            written=state.published() if whole else None, keep=state.keep,
        )  # fmt: skip
        t1, shared = self.clock_ns(), packed if fp8 else self._mark()
        if not whole:
            self.model.shared_expert(state, segment)
        if trace is not None:
            trace.span(_SEGMENT, block, layer, self.index, begin, packed, n)
            trace.span("shared", block, layer, self.index, shared, self._mark(), n)
        t2 = self.clock_ns()
        times.layers += 1
        times.attention_us += (t1 - t0) // 1000
        times.shared_us += (t2 - t1) // 1000
        if graphs.num_replays > replays:
            times.replayed_layers += 1
            times.replayed_us += (t2 - t0) // 1000
        await answer  # so the device has written the ids
        state.answered()
        if self.balance is not None:
            self.balance.count(layer, state.choice[0].numpy())

    def _mark(self) -> object:
        return None if self.device_clock is None else self.device_clock.mark()

    def _to_host(self, values: Tensor) -> Tensor:
        """A copy that is there when the device has come this far."""
        there = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        return there.copy_(values, non_blocking=True)

    async def _passed(self) -> None:
        """Until the device has done everything launched so far."""
        passed = asyncio.Event()
        self.moe.seam.fence().then(passed.set)
        await passed.wait()
