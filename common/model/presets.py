"""Shapes of well-known models to be run with random weights (`common.model.random_weights`), at their full width.

`reference-61l-256e` is the model that this project is designed for, `deepseek-v3` DeepSeek-V3 and R1.
"""

import json
from pathlib import Path
from typing import Any

from common.errors import ConfigError

RANDOM_FILE = "random.json"
_BASE: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280,
    "hidden_size": 7168, "num_hidden_layers": 61, "first_k_dense_replace": 3,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "intermediate_size": 18432, "n_routed_experts": 256,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "max_position_embeddings": 163840, "rope_theta": 10000.0,
    "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "reference-61l-256e": {
        "moe_intermediate_size": 18432, "qk_nope_head_dim": 40, "qk_rope_head_dim": 16,
        "v_head_dim": 56,
    },
    "deepseek-v3": {
        "moe_intermediate_size": 2048, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
}  # fmt: skip
_FP8 = {
    "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
    "weight_block_size": [128, 128],
}  # fmt: skip


def preset_config(name: str, *, layers: int = 0) -> dict[str, Any]:
    """config.json of a preset, with its first `layers` layers (0: all). Raises ConfigError."""
    if name not in PRESETS:
        raise ConfigError(f"there is no preset {name!r}, only {', '.join(PRESETS)}")
    config = _BASE | PRESETS[name] | {"quantization_config": _FP8}
    most, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    if layers and not dense < layers <= most:
        raise ConfigError(f"{name} can be run with {dense + 1} to {most} layers, not {layers}")
    return config | {"num_hidden_layers": layers or most}


def write_random_source(
    directory: Path, config: dict[str, Any], *, seed: int = 0, distinct_experts: int = 8,
    given: dict[str, list[float]] | None = None,
) -> Path:  # fmt: skip
    """Write config.json and random.json into `directory` (made if needed); returns it."""
    settings = {"seed": seed, "distinct_experts": distinct_experts, "given": given or {}}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RANDOM_FILE).write_text(json.dumps(settings) + "\n")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory
