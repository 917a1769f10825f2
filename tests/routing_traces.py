"""Synthetic routing traces, the same for the same seed.

zipf          popularity falls as 1 / rank^exponent, experts independent of one another: load without structure
group_limited DeepSeek-V3's gate on synthetic logits (arXiv 2412.19437, section 2.1.2: sigmoid scores plus a bias that
              evens out the load in training; the best groups by the sum of their two best, the best experts in them).
              Sequences have topics, tokens are words of a Zipf vocabulary, and both have favourite experts (that the
              word decides most was found by OpenMoE, arXiv 2402.01739): some experts are chosen together, and a text
              of other topics than the trained mix skews the load
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from common.placement.routing_trace import RoutingTrace

_TOPICS, _WORDS, _SEQUENCE = 32, 4096, 128  # of the synthetic text; tokens of a sequence
_TOPIC, _WORD, _NOISE = 0.5, 0.8, 0.6  # standard deviations of the logits' parts
_TRAINED, _BIAS_STEPS, _BIAS_RATE = (
    2048,
    12,
    0.04,
)  # tokens of the trained mix; how its biases are found

Array = npt.NDArray[np.float32]
_Text = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def zipf(
    *, layers: Iterable[int], tokens: int, num_experts: int, top_k: int, exponent: float, seed: int
) -> RoutingTrace:
    """Each token draws `top_k` experts without replacement; which expert is popular differs by layer."""
    rng, layers = np.random.default_rng(seed), tuple(layers)
    popularity = -exponent * np.log(np.arange(1, num_experts + 1))
    ids = np.empty((len(layers), tokens, top_k), np.int16)
    for layer in ids:
        # the largest of log p + Gumbel noise are a draw without replacement with probabilities p
        logits = popularity[rng.permutation(num_experts)] + rng.gumbel(size=(tokens, num_experts))
        layer[:] = np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]
    return RoutingTrace(np.sort(ids, axis=2), layers, num_experts)


def group_limited(
    *, layers: Iterable[int], tokens: int, num_experts: int = 256, top_k: int = 8, num_groups: int = 8,
    top_k_groups: int = 4, seed: int = 0,
) -> RoutingTrace:  # fmt: skip
    """V3's shape by default. The text served is about a few topics, the text the biases were trained on about all."""
    rng, layers = np.random.default_rng(seed), tuple(layers)
    served = _text(tokens, 1 / np.arange(1, _TOPICS + 1), rng)
    trained = _text(_TRAINED, np.ones(_TOPICS), rng)
    ids = np.empty((len(layers), tokens, top_k), np.int16)
    for layer in ids:
        of_topic = _TOPIC * rng.standard_normal((_TOPICS, num_experts), np.float32)
        of_word = _WORD * rng.standard_normal((_WORDS, num_experts), np.float32)

        def scores(text: _Text, topics: Array = of_topic, words: Array = of_word) -> Array:
            noise = _NOISE * rng.standard_normal((len(text[0]), topics.shape[1]), np.float32)
            return np.asarray(
                1 / (1 + np.exp(-(topics[text[0]] + words[text[1]] + noise))), np.float32
            )

        bias = np.zeros(num_experts, np.float32)
        sample = scores(trained)
        for _ in range(_BIAS_STEPS):
            chosen = _choose(sample + bias, top_k, num_groups, top_k_groups)
            load = np.bincount(chosen.ravel(), minlength=num_experts) * num_experts / chosen.size
            bias += (_BIAS_RATE * (1 - load)).astype(np.float32)
        layer[:] = _choose(scores(served) + bias, top_k, num_groups, top_k_groups)
    return RoutingTrace(np.sort(ids, axis=2), layers, num_experts, num_groups, top_k_groups)


def _text(tokens: int, topic_weights: npt.NDArray[np.float64], rng: np.random.Generator) -> _Text:
    """Topic and word of each token: sequences of one topic, words of a Zipf vocabulary."""
    topics = rng.choice(
        _TOPICS, size=-(-tokens // _SEQUENCE), p=topic_weights / topic_weights.sum()
    )
    frequency = 1 / np.arange(1, _WORDS + 1)
    words = rng.choice(_WORDS, size=tokens, p=frequency / frequency.sum())
    return np.repeat(topics, _SEQUENCE)[:tokens], words


def _choose(scores: Array, top_k: int, num_groups: int, top_k_groups: int) -> npt.NDArray[np.int64]:
    """The gate's choice, [tokens, top_k]: best groups by the sum of their two best scores, best experts in them."""
    grouped = scores.reshape(len(scores), num_groups, -1)
    best_two = np.partition(grouped, -2, axis=2)[:, :, -2:].sum(axis=2)
    kept = np.argpartition(-best_two, top_k_groups - 1, axis=1)[:, :top_k_groups]
    outside = np.ones((len(scores), num_groups), bool)
    np.put_along_axis(outside, kept, values=False, axis=1)
    masked = np.where(outside[..., None], -np.inf, grouped).reshape(len(scores), -1)
    return np.argpartition(-masked, top_k - 1, axis=1)[:, :top_k]
