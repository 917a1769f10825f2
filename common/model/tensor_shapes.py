"""Every tensor of a model: its name, its shape, and how a random one is distributed.

Standard deviations are chosen so that greedy output wanders (no token repeated for ever) and every expert gets rows:
each branch adds about as much to the residual as is there, the embedding is weak against it (with tied embeddings a
strong one would repeat its own token), gates are sharp.
"""

import math
from collections.abc import Iterator

from common.model import names
from common.model.hf_config import GateKind, ModelConfig

Described = tuple[str, tuple[int, ...], float, float]  # name, shape, standard deviation, mean
_EMBEDDING_STD = 0.3
# Spread of the logits and gain of the routed experts: with larger ones a network of random weights is chaotic (the FP8
# wire alone moved distributions by 0.1 nats), which no trained one is; smaller ones make dull text.
_LOGIT_STD = 2.0
_ROUTED_GAIN = 0.85
_GATE_LOGIT_STD = 1.2
_GATE_BIAS_STD = 0.02


def tensor_shapes(config: ModelConfig) -> Iterator[Described]:
    """Name, shape, standard deviation and mean of every tensor of a checkpoint, in a fixed order."""
    width = config.hidden_size
    logit_std = _LOGIT_STD / math.sqrt(width)
    embedding_std = logit_std if config.tie_word_embeddings else _EMBEDDING_STD
    yield names.EMBEDDING, (config.vocab_size, width), embedding_std, 0.0
    for index in range(config.num_layers):
        for name, *described in _layer(config, index):
            yield names.layer(index, name), *described  # type: ignore[misc]
    yield names.FINAL_NORM, (width,), 0.1, 1.0
    if not config.tie_word_embeddings:
        yield names.LM_HEAD, (config.vocab_size, width), logit_std, 0.0


def _projection(name: str, rows: int, columns: int, gain: float = 1.0) -> Described:
    return name, (rows, columns), gain / math.sqrt(columns), 0.0


def _norm(name: str, size: int) -> Described:
    return name, (size,), 0.1, 1.0


def _bias(name: str, size: int) -> Described:
    return name, (size,), 0.1, 0.0


def _ffn(prefix: str, width: int, inner: int, *, biased: bool, gain: float) -> Iterator[Described]:
    gate, up, down = names.ffn_weights(prefix)
    yield _projection(gate, inner, width)
    yield _projection(up, inner, width)
    yield _projection(down, width, inner, gain)
    if biased:
        for name, size in zip(names.ffn_biases(prefix), (inner, inner, width), strict=True):
            yield _bias(name, size)


def _layer(config: ModelConfig, index: int) -> Iterator[Described]:
    width, rank, biased = config.hidden_size, config.q_lora_rank, config.attention_bias
    yield _norm(names.INPUT_NORM, width)
    yield _norm(names.POST_ATTENTION_NORM, width)
    if rank is None:
        yield _projection(names.Q, config.num_heads * config.qk_head_dim, width, 1.5)
    else:
        yield _projection(names.Q_A, rank, width)
        if biased:
            yield _bias(names.Q_A_BIAS, rank)
        yield _norm(names.Q_A_NORM, rank)
        yield _projection(names.Q_B, config.num_heads * config.qk_head_dim, rank, 1.5)
    yield _projection(names.KV_A, config.latent_width, width, 1.5)
    if biased:
        yield _bias(names.KV_A_BIAS, config.latent_width)
    yield _norm(names.KV_A_NORM, config.kv_lora_rank)
    kv_out = config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield _projection(names.KV_B, kv_out, config.kv_lora_rank)
    yield _projection(names.OUT, width, config.num_heads * config.v_head_dim, 1.5)
    if biased:
        yield _bias(names.OUT_BIAS, width)
    if index in config.moe_layers:
        yield from _moe(config)
    else:
        inner = config.intermediate_size
        yield from _ffn(names.DENSE, width, inner, biased=config.mlp_bias, gain=2.0)


def _moe(config: ModelConfig) -> Iterator[Described]:
    width = config.hidden_size
    yield _projection(names.GATE, config.num_experts, width, _GATE_LOGIT_STD)
    if config.gate is GateKind.SIGMOID_GROUPS:
        yield names.GATE_BIAS, (config.num_experts,), _GATE_BIAS_STD, 0.0
    # softmax weights are small where there are many experts; sigmoid weights are normalised or near one each
    routed_gain = _ROUTED_GAIN * (
        1.0 if config.gate is GateKind.SIGMOID_GROUPS else math.sqrt(config.num_experts)
    )
    gain, inner = routed_gain / config.routed_scaling_factor, config.moe_intermediate_size
    for expert in range(config.num_experts):
        yield from _ffn(names.expert(expert), width, inner, biased=False, gain=gain)
    if config.num_shared_experts:
        inner = config.shared_intermediate_size
        yield from _ffn(names.SHARED, width, inner, biased=config.mlp_bias, gain=1.5)
