"""Microseconds of one layer's attention side, ours and transformers', with 100 tokens of context and one thread.

    PYTHONPATH=. python tests/bench/attention_layer.py

Both include the two layer norms. transformers' is its decoder layer's attention with a cache that is extended but not
kept, in fp32 with eager attention. The best of 7 runs of 100 calls each.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

from services.attention.batch import Span
from tests.oracle.configs import CONFIGS
from tests.oracle.local_model import LocalModel
from tests.oracle.reference import Reference, build_checkpoint

CONTEXT, LAYER = 100, 1


class Extended:
    """A cache that answers with the new rows appended and forgets them."""

    def __init__(self, cache: DynamicCache) -> None:
        self.layers = cache.layers

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int):
        held = self.layers[layer]
        return torch.cat([held.keys, keys], -2), torch.cat([held.values, values], -2)


def best_us(call: Callable[[], object], *, calls: int = 100, runs: int = 7) -> float:
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return min(times[1:])


def measure(ours: LocalModel, theirs: PreTrainedModel, requests: int) -> tuple[float, ...]:
    """Microseconds of attention (ours, theirs) and gate (ours, theirs)."""
    model, layer = ours.model, theirs.model.layers[LAYER]
    ids = torch.randint(0, ours.config.vocab_size, (requests, CONTEXT))
    cache = Extended(theirs(ids, use_cache=True).past_key_values)
    x = torch.randn(requests, 1, ours.config.hidden_size)
    rope = theirs.model.rotary_emb(x, torch.full((requests, 1), CONTEXT))
    spans = [Span([5], CONTEXT, 50, [2 * i, 2 * i + 1]) for i in range(requests)]
    batch = model.batch(spans, ours.cache)
    h = model.embed(batch)

    def attend() -> None:
        normed = layer.input_layernorm(x)
        layer.post_attention_layernorm(layer.self_attn(normed, rope, None, cache)[0])

    return (
        best_us(lambda: model.attend(LAYER, h, batch, ours.cache)),
        best_us(attend),
        best_us(lambda: model.gate(LAYER, h)),
        best_us(lambda: layer.mlp.gate(x)),
    )


def main() -> None:
    torch.set_num_threads(1)
    base = Path(tempfile.mkdtemp())
    directory = build_checkpoint(base / "model", CONFIGS[0])
    theirs, ours = Reference(directory, base / "fp32").model, LocalModel(directory)
    print("requests   attention: ours  transformers   gate: ours  transformers   (us)")
    with torch.inference_mode():
        for requests in (1, 8, 16):
            a, b, c, d = measure(ours, theirs, requests)
            print(f"{requests:8d} {a:17.0f} {b:13.0f} {c:12.0f} {d:13.0f}")


if __name__ == "__main__":
    main()
