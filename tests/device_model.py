"""The device model in one process, with the experts computed here: for comparing it with the CPU's arithmetic."""

from pathlib import Path

import torch

from common.model.hf_config import load_config
from common.model.loader import load_expert
from common.model.source import open_checkpoint
from kernels.reference.ffn import ffn
from services.attention.batch import Span
from services.attention.device_model import DeviceModel
from services.attention.device_weights import load_device_weights
from services.attention.latent_cache import LatentCache


class LocalDeviceModel:
    """All layers of a checkpoint on `device`; experts in fp32 on the rows that the bf16 wire would carry."""

    def __init__(
        self, directory: Path, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16,
        num_pages: int = 64, max_rows: int = 256, capture: bool = True, halves: bool = True,
    ) -> None:  # fmt: skip
        self.halves = halves
        self.config = load_config(directory)
        with open_checkpoint(directory) as checkpoint:
            weights = load_device_weights(checkpoint, self.config, device=device, dtype=dtype)
            self.experts = {
                (layer, expert): load_expert(checkpoint, self.config, layer, expert, device=device)
                for layer in self.config.moe_layers
                for expert in range(self.config.num_experts)
            }
        self.cache = LatentCache(self.config, num_pages, dtype=dtype, device=device)
        self.model = DeviceModel(
            self.config, weights, self.cache, max_context=1024, capture=capture
        )
        self.state = self.model.state(max_rows)

    @torch.inference_mode()
    def logits(self, spans: list[Span], *, state=None, all_rows: bool = False) -> torch.Tensor:
        """Next-token logits fp32 [spans or rows, vocab]."""
        s = state or self.state
        s.fill(spans)
        for i, layer in enumerate(self.config.moe_layers):
            if self.halves:
                self.model.before_experts(s, i)
                self.model.shared_expert(s, i)
            else:
                self.model.layer(s, i)
            if s.h.is_cuda:
                torch.cuda.synchronize()
            assert s.published()()
            n = s.num_rows
            s.routed[:n] = self._routed(layer, s.x[:n].float(), s.experts[:n], s.weights[:n])
            s.answered()
        rows = None if all_rows else torch.tensor(s.last_rows, device=s.h.device)
        return self.model.head(s, rows)

    def _routed(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor):
        total = torch.zeros_like(x)
        for expert in range(self.config.num_experts):
            rows, places = torch.where(ids == expert)
            if rows.numel():
                network = self.experts[layer, expert]
                on = rows.to(x.device)
                out = ffn(x[on], network.gate_up, network.down)
                total[on] += out * weights[rows, places, None].to(x.device)
        return total

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
