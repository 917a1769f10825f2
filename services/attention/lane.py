"""One micro-batch lane: step after step through the layers, one await per MoE layer.

While this lane's rows are at the experts, the shared expert of the same rows runs, then whatever other lane is ready.
The loop in `_forward` reads as the paper does; everything that happens once per step stands around it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.obs.trace import Recorder
from services.attention.batch import ForwardBatch, Span
from services.attention.gate_balance import GateBalance
from services.attention.latent_cache import LatentCache
from services.attention.model import AttentionModel
from services.attention.moe_client import MoeClient
from services.attention.scheduler import Slice

Tensor = torch.Tensor


@dataclass(slots=True)
class StepTimes:
    """Sums since the start: steps, tokens, and microseconds of this lane's own computing.

    On a GPU that is launching, the shared expert with the attention; `replayed`: of layers whose graphs were captured
    before, as all but a few are. A trace makes two of one graph, and its marks come on top.
    """

    steps: int = 0
    tokens: int = 0
    layers: int = 0
    attention_us: int = 0
    shared_us: int = 0
    replayed_layers: int = 0
    replayed_us: int = 0
    step_us: int = 0


@dataclass(slots=True)
class Lane:
    """A lane's forward pass. `times` is shared by all lanes of a worker."""

    index: int
    model: AttentionModel
    cache: LatentCache
    moe: MoeClient
    times: StepTimes
    trace: Recorder | None = None
    balance: GateBalance | None = None
    clock_ns: Callable[[], int] = time.monotonic_ns

    async def forward(
        self, slices: list[Slice], *, all_rows: bool = False
    ) -> tuple[Tensor, list[int]]:
        """Run the tokens of a step; their latents are in the cache afterwards.

        Returns fp32 logits and the best token of each row: one row per slice (of its last token), or one per token when
        `all_rows`. Raises AtollError when a block got no answer; the cache then holds a partial step, so the slices'
        sequences must end.
        """
        started = self.clock_ns()
        batch = self.model.batch([span_of(piece) for piece in slices], self.cache)
        hidden = await self._forward(batch)
        rows = torch.arange(batch.num_rows) if all_rows else batch.last_rows
        before_head = self.clock_ns()
        logits = self.model.logits(hidden, rows)
        best: list[int] = logits.argmax(dim=-1).tolist()
        ended = self.clock_ns()
        self.times.steps += 1
        self.times.tokens += batch.num_rows
        self.times.step_us += (ended - started) // 1000
        if self.trace is not None:
            num_prompt = sum(piece.count for piece in slices if piece.sequence.in_prefill)
            self._span("step", 0, num_prompt, started, ended, batch.num_rows)
            self._span("head", 0, 0, before_head, ended, batch.num_rows)
        return logits, best

    def _span(self, name: str, block: int, layer: int, start: int, end: int, count: int) -> None:
        if self.trace is not None:
            self.trace.span(name, block, layer, self.index, start, end, count)

    async def _forward(self, batch: ForwardBatch) -> Tensor:
        model, times, clock, n = self.model, self.times, self.clock_ns, batch.num_rows
        trace, lane = self.trace, self.index
        hidden = model.embed(batch)
        for layer in range(model.config.num_layers):
            t0 = clock()
            hidden, x = model.attend(layer, hidden, batch, self.cache)
            if model.is_dense(layer):
                hidden = hidden + model.dense_mlp(layer, x)
                t1 = clock()
                times.attention_us += (t1 - t0) // 1000
                if trace is not None:
                    trace.span("attention", 0, layer, lane, t0, t1, n)
                continue
            experts, weights = model.gate(layer, x)
            block = self.moe.next_block
            t1 = clock()
            answer = self.moe.dispatch(layer, lane, x[:n], experts[:n], weights[:n], since=t1)
            t2 = clock()
            shared = model.shared_expert(layer, x)
            t3 = clock()
            times.layers += 1
            times.attention_us += (t2 - t0) // 1000
            times.shared_us += (t3 - t2) // 1000
            if trace is not None:
                trace.span("attention", block, layer, lane, t0, t1, n)
                trace.span("shared", block, layer, lane, t2, t3, n)
            routed = await answer
            if self.balance is not None:
                self.balance.count(layer, experts[:n].numpy())
            t4 = clock()
            hidden = model.add_experts(hidden, routed, shared)
            if trace is not None:
                trace.span("add", block, layer, lane, t4, clock(), n)
        return hidden


def span_of(piece: Slice) -> Span:
    """The tokens of a slice, and where they go."""
    sequence = piece.sequence
    tokens = sequence.token_ids[piece.start : piece.start + piece.count]
    return Span(tokens, piece.start, sequence.num_prompt, sequence.pages)
