"""Our model in one process: `AttentionModel`, with the experts computed here and combined as the exact wire does."""

from pathlib import Path

import torch

from common.model.checkpoint import Checkpoint
from common.model.loader import load_expert
from kernels.reference.ffn import ffn
from services.attention.batch import ForwardBatch, Span
from services.attention.latent_cache import LatentCache
from services.attention.model import AttentionModel


class LocalModel:
    """All layers of a checkpoint; `expert_rows[layer][expert]` counts rows."""

    def __init__(self, directory: Path, *, num_pages: int = 64, max_context: int = 1024) -> None:
        self.model = AttentionModel.load(directory, max_context=max_context)
        self.config = self.model.config
        self.cache = LatentCache(self.config, num_pages)
        with Checkpoint(directory) as checkpoint:
            self.experts = {
                (layer, expert): load_expert(checkpoint, self.config, layer, expert)
                for layer in self.config.moe_layers
                for expert in range(self.config.num_experts)
            }
        self.expert_rows = {
            layer: [0] * self.config.num_experts for layer in self.config.moe_layers
        }

    def forward(self, spans: list[Span]) -> tuple[torch.Tensor, ForwardBatch]:
        """Residual stream after the last layer [padded, width] and the batch."""
        model = self.model
        with torch.inference_mode():
            batch = model.batch(spans, self.cache)
            h = model.embed(batch)
            for layer in range(self.config.num_layers):
                h, x = model.attend(layer, h, batch, self.cache)
                if model.is_dense(layer):
                    h = h + model.dense_mlp(layer, x)
                else:
                    ids, weights = model.gate(layer, x)
                    n = batch.num_rows
                    routed = self._routed(layer, x[:n], ids[:n], weights[:n])
                    h = model.add_experts(h, routed, model.shared_expert(layer, x))
        return h, batch

    def logits(self, spans: list[Span]) -> torch.Tensor:
        """Next-token logits [spans, vocab]."""
        h, batch = self.forward(spans)
        with torch.inference_mode():
            return self.model.logits(h, batch.last_rows)

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Greedy continuation of one prompt."""
        pages = range(self.cache.num_pages)
        tokens: list[int] = []
        inputs, start = prompt, 0
        for _ in range(num_tokens):
            logits = self.logits([Span(inputs, start, len(prompt), pages)])
            start += len(inputs)
            tokens.append(int(logits[0].argmax()))
            inputs = tokens[-1:]
        return tokens

    def _routed(
        self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum in float64 over experts in ascending id, rounded once, as routers do on the fp32 wire."""
        total = torch.zeros(x.shape, dtype=torch.float64)
        for expert in range(self.config.num_experts):
            rows, places = torch.where(ids == expert)
            if rows.numel():
                self.expert_rows[layer][expert] += rows.numel()
                network = self.experts[layer, expert]
                out = ffn(x[rows], network.gate_up, network.down)
                total[rows] += out.double() * weights[rows, places, None].double()
        return total.float()
