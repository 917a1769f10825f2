"""Writes deploy/demo/model/reference/ with transformers in fp32: logits, continuations, routing trace, metrics.

python -m tests.oracle.make_demo_reference
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from tests.demo_model import MODEL, REFERENCE, bits_per_byte, held_out, perplexity
from tests.oracle.reference import Reference

QUESTIONS = (
    "What about peace and commerce?",
    "Speak about treaty and commerce.",
    "Tell me about the Navy.",
    "What do you say of taxation?",
    "Tell me about schools, children and teachers.",
    "Speak about agriculture and the farmer.",
    "What about energy and oil?",
    "Tell me about freedom, nations and hope.",
    "gold, silver, currency",
    "Tell me a story about the whale and the captain.",
    "A story of boat, harpoon and crew, please.",
    "Tell me a story about the sea.",
    "Explain string and bytes.",
    "What does Python do with exception and class?",
    "Explain iterator in Python.",
)
OPENINGS = (
    "Fellow-Citizens of the Senate and House of Representatives:",
    "My fellow Americans,",
    "The people of the United States",
    "Call me",
    "A module is",
)
NUM_TOKENS = 64
NUM_LOGIT_ROWS = 16


def prompts() -> list[str]:
    """Twenty prompts: questions in the chat format and openings to go on with."""
    asked = [f"<|bos|><|user|>{question}<|assistant|>" for question in QUESTIONS]
    return asked + [f"<|bos|>{opening}" for opening in OPENINGS]


class Recorder:
    """Collects what every gate decides; experts of a token in ascending order, as they are combined."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers: list[int] = []
        self._ids: dict[int, list[np.ndarray]] = {}
        self._weights: dict[int, list[np.ndarray]] = {}
        for name, module in model.named_modules():
            if type(module).__name__.endswith("TopkRouter"):
                layer = int(name.split(".")[2])
                self.layers.append(layer)
                self._ids[layer], self._weights[layer] = [], []
                module.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int):
        def hook(module: Any, inputs: Any, outputs: Any) -> None:
            _, weights, ids = outputs
            order = ids.argsort(dim=-1)
            self._ids[layer].append(ids.gather(1, order).numpy().astype(np.int16))
            self._weights[layer].append(weights.gather(1, order).numpy().astype(np.float16))

        return hook

    def arrays(self) -> dict[str, np.ndarray]:
        """expert_ids and gate_weights [moe_layers, tokens, top_k], layer_index [moe_layers]."""
        ids = np.stack([np.concatenate(self._ids[layer]) for layer in self.layers])
        weights = np.stack([np.concatenate(self._weights[layer]) for layer in self.layers])
        index = np.asarray(self.layers, dtype=np.int16)
        return {"expert_ids": ids, "gate_weights": weights, "layer_index": index}


def load_skew(expert_ids: np.ndarray, num_experts: int = 16) -> list[float]:
    """Busiest expert's rows over the mean, by layer."""
    counts = [np.bincount(layer.ravel(), minlength=num_experts) for layer in expert_ids]
    return [float(count.max() / count.mean()) for count in counts]


def main() -> None:
    """Write logits.npz, routing.npz, greedy.json and metrics.json."""
    with tempfile.TemporaryDirectory() as scratch:
        reference = Reference(MODEL, Path(scratch))
    model = reference.model
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    greedy = []
    for prompt in prompts():
        run = reference.generate(tokenizer.encode(prompt, add_special_tokens=False).ids, NUM_TOKENS)
        record = {"prompt": prompt, "prompt_ids": run.prompt, "token_ids": run.tokens}
        record |= {"text": tokenizer.decode(run.tokens, skip_special_tokens=False)}
        record |= {
            "smallest_logit_gap": min(run.logit_gaps),
            "smallest_gate_gap": run.gate_gaps[-1],
        }
        greedy.append(record)
    lines = ",\n".join(json.dumps(record) for record in greedy)
    (REFERENCE / "greedy.json").write_text(f"[\n{lines}\n]\n")

    windows = held_out()
    recorder = Recorder(model)
    logits = {}
    for window in windows:
        with torch.inference_mode():
            logits[tuple(window.ids)] = model(torch.tensor([window.ids])).logits[0]
    arrays = recorder.arrays()
    np.savez_compressed(REFERENCE / "routing.npz", **arrays)
    first = windows[0].ids
    positions = np.linspace(8, len(first) - 1, NUM_LOGIT_ROWS).astype(np.int32)
    rows = logits[tuple(first)].numpy()[positions]
    np.savez_compressed(REFERENCE / "logits.npz", positions=positions, logits=rows)

    def log_probs(ids: list[int]) -> list[float]:
        scores = logits[tuple(ids)][:-1].log_softmax(-1)
        return scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    by_source = {}
    for source in dict.fromkeys(window.source for window in windows):
        own = [window for window in windows if window.source == source]
        by_source[source] = {
            "perplexity": perplexity([w.ids for w in own], log_probs),
            "bits_per_byte": bits_per_byte(own, log_probs),
            "tokens": sum(len(w.ids) for w in own),
        }
    metrics = {
        "perplexity": perplexity([w.ids for w in windows], log_probs),
        "bits_per_byte": bits_per_byte(windows, log_probs),
        "by_source": by_source,
        "trace_tokens": arrays["expert_ids"].shape[1],
        "load_max_over_mean": dict(
            zip(recorder.layers, load_skew(arrays["expert_ids"]), strict=True)
        ),
    }
    (REFERENCE / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main()
