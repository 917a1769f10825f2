"""One micro-batch lane: step after step through the layers, one await per MoE layer.

While this lane's rows are at the experts, the shared expert of the same rows runs, then whatever other lane is ready.
The loop in `_forward` reads as the paper does; everything that happens once per step stands around it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from services.attention.batch import ForwardBatch, Span
from services.attention.latent_cache import LatentCache
from services.attention.model import AttentionModel
from services.attention.moe_client import MoeClient
from services.attention.scheduler import Slice

Tensor = torch.Tensor


@dataclass(slots=True)
class StepTimes:
    """Sums since the start: steps, tokens, and microseconds of this lane's own computing."""

    steps: int = 0
    tokens: int = 0
    layers: int = 0
    attention_us: int = 0
    shared_us: int = 0
    step_us: int = 0


@dataclass(slots=True)
class Lane:
    """A lane's forward pass. `times` is shared by all lanes of a worker."""

    index: int
    model: AttentionModel
    cache: LatentCache
    moe: MoeClient
    times: StepTimes
    clock_ns: Callable[[], int] = time.perf_counter_ns

    async def forward(self, slices: list[Slice], *, all_rows: bool = False) -> Tensor:
        """Run the tokens of a step; their latents are in the cache afterwards.

        Returns fp32 logits: one row per slice (of its last token), or one per token when `all_rows`. Raises AtollError
        when a block got no answer; the cache then holds a partial step, so the slices' sequences must end.
        """
        started = self.clock_ns()
        batch = self.model.batch([_span(piece) for piece in slices], self.cache)
        hidden = await self._forward(batch)
        rows = torch.arange(batch.num_rows) if all_rows else batch.last_rows
        logits = self.model.logits(hidden, rows)
        self.times.steps += 1
        self.times.tokens += batch.num_rows
        self.times.step_us += (self.clock_ns() - started) // 1000
        return logits

    async def _forward(self, batch: ForwardBatch) -> Tensor:
        model, times, clock, n = self.model, self.times, self.clock_ns, batch.num_rows
        hidden = model.embed(batch)
        for layer in range(model.config.num_layers):
            t0 = clock()
            hidden, x = model.attend(layer, hidden, batch, self.cache)
            if model.is_dense(layer):
                hidden = hidden + model.dense_mlp(layer, x)
                times.attention_us += (clock() - t0) // 1000
                continue
            experts, weights = model.gate(layer, x)
            answer = self.moe.dispatch(layer, self.index, x[:n], experts[:n], weights[:n])
            t1 = clock()
            shared = model.shared_expert(layer, x)
            times.layers += 1
            times.attention_us += (t1 - t0) // 1000
            times.shared_us += (clock() - t1) // 1000
            hidden = model.add_experts(hidden, await answer, shared)
        return hidden


def _span(piece: Slice) -> Span:
    sequence = piece.sequence
    tokens = sequence.token_ids[piece.start : piece.start + piece.count]
    return Span(tokens, piece.start, sequence.num_prompt, sequence.pages)
