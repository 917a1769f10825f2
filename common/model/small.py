"""The small random model that is served when no checkpoint is given: its shape, its byte-level tokenizer, its files."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common.model.writer import write_random

_SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_RESERVED = ("<|reserved-0|>", "<|reserved-1|>", "<|reserved-2|>")
BEGIN, END = 256, 257
VOCAB_SIZE = 256 + len(_SPECIAL) + len(_RESERVED)
CHAT_TEMPLATE = (
    "<|begin|>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def small_config(num_experts: int = 16) -> dict[str, Any]:
    """config.json of the default model (16 experts) or of a tiny one with another number of experts.

    From 256 experts on the gate is DeepSeek-V3's: eight groups of which four are used, top-8.
    """
    large = num_experts >= 256 and num_experts % 8 == 0
    groups = 8 if large else 4 if num_experts % 4 == 0 and num_experts >= 16 else 1
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 48,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "n_routed_experts": num_experts,
        "num_experts_per_tok": 8 if large else min(4, num_experts),
        "n_shared_experts": 1,
        "n_group": groups,
        "topk_group": max(1, groups // 2),
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "torch_dtype": "float32",
    }


def write_small_model(directory: Path, *, num_experts: int = 16, seed: int = 0) -> Path:
    """Make the small model in `directory` unless it is there; returns `directory`.

    Complete or absent: it is written beside and renamed, so several processes may do so at once.
    """
    if (directory / "config.json").exists():
        return directory
    partial = directory.with_name(f"{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_random(partial, small_config(num_experts), seed=seed)
    write_tokenizer(partial)
    try:
        partial.rename(directory)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not (directory / "config.json").exists():
            raise
    return directory


def write_tokenizer(directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json: one token per byte (ids 0 to 255) and special tokens from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True) for token in (*_SPECIAL, *_RESERVED)]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[1],
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
