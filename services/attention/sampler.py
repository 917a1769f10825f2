"""Chooses tokens from logits. A row's choice depends on its logits, its parameters, seed and position alone.

Greedy is the first largest logit. Otherwise one uniform number per token, a hash of seed and position, goes through the
inverse of the distribution (temperature, then top-k, then top-p): a replay draws the same token in any batch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from common.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; `logprob` and `top` (token id, log-probability, best first) only when asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(
    logits: torch.Tensor, best: Sequence[int], rows: Sequence[int],
    params: Sequence[SamplingParams], positions: Sequence[int],
) -> list[Sampled]:  # fmt: skip
    """A token for each of `rows` of logits fp32 [all rows, vocab]; `best` are the largest logits of all rows.

    `positions[i]` is where the token of rows[i] will stand. Log-probabilities are those of the model, before
    temperature and cuts. Greedy tokens do not touch the logits, which may lie on a device.
    """
    result: list[Sampled] = []
    for row, choice, position in zip(rows, params, positions, strict=True):
        token = best[row]
        if choice.temperature > 0:
            token = _draw(logits[row], choice, uniform(choice.seed, position))
        if choice.logprobs is None:
            result.append(Sampled(token))
        else:
            result.append(token_logprobs(logits[row], token, choice.logprobs))
    return result


def token_logprobs(logits: torch.Tensor, token_id: int, num_top: int) -> Sampled:
    """Log-probability of a token and of the `num_top` best under logits fp32 [vocab]."""
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = torch.topk(logprobs, k=min(num_top, logprobs.shape[0]))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(token_id, float(logprobs[token_id]), top)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a hash of seed and position: 53 bits of blake2b."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _draw(logits: torch.Tensor, params: SamplingParams, u: float) -> int:
    """Inverse transform sampling; float64, so that the cumulative sum reaches 1 with room to spare."""
    probabilities = torch.softmax(logits.double() / params.temperature, dim=-1)
    ordered, ids = torch.sort(probabilities, descending=True, stable=True)
    if params.top_k:
        ordered = ordered[: params.top_k]
    cumulative = ordered.cumsum(dim=0)
    keep = ordered.shape[0]
    if params.top_p < 1.0:  # the fewest tokens whose probabilities reach top_p
        reached = cumulative >= params.top_p * cumulative[-1]
        keep = int(reached.int().argmax()) + 1
    index = int(torch.searchsorted(cumulative[:keep], u * float(cumulative[keep - 1]), right=True))
    return int(ids[min(index, keep - 1)])
