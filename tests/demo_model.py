"""What ships beside the demo model, and how held-out perplexity is measured, whoever computes the probabilities."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

MODEL = Path(__file__).parents[1] / "deploy" / "demo" / "model"
REFERENCE = MODEL / "reference"

# token ids -> log p(ids[i] | ids[:i]) in nats, for i = 1 .. len(ids) - 1
LogProbs = Callable[[list[int]], Sequence[float]]


@dataclass(frozen=True)
class Window:
    """A run of held-out paragraphs that fits the context; `ids` begin with the begin-of-sequence token."""

    source: str
    text: str
    ids: list[int]


def held_out() -> list[Window]:
    """The 24 windows of reference/heldout.jsonl, 22,313 tokens."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    windows = []
    for line in (REFERENCE / "heldout.jsonl").read_text().splitlines():
        record = json.loads(line)
        ids = tokenizer.encode("<|bos|>" + record["text"], add_special_tokens=False).ids
        windows.append(Window(record["source"], record["text"], ids))
    return windows


def perplexity(windows: Iterable[Sequence[int]], log_probs: LogProbs) -> float:
    """exp of the mean loss over every token but each window's first."""
    total, count = 0.0, 0
    for ids in windows:
        values = log_probs(list(ids))
        assert len(values) == len(ids) - 1
        total -= sum(values)
        count += len(values)
    return math.exp(total / count)


def bits_per_byte(windows: Iterable[Window], log_probs: LogProbs) -> float:
    """The same loss in bits, divided by the bytes of text: comparable between tokenizers."""
    nats, num_bytes = 0.0, 0
    for window in windows:
        nats -= sum(log_probs(window.ids))
        num_bytes += len(window.text.encode())
    return nats / math.log(2) / num_bytes
