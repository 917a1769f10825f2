"""The oracle's checkpoints: every property that real DeepSeek-V2 and -V3 checkpoints vary, in small shapes."""

from dataclasses import dataclass, field
from typing import Any

from common.model.small import small_config


@dataclass(frozen=True)
class OracleConfig:
    """A named random checkpoint. `overrides` are keys of config.json that differ from `small_config`.

    Seeds are such that no prompt of the oracle ends in a short loop, which would compare nothing.
    """

    name: str
    overrides: dict[str, Any] = field(default_factory=dict)
    storage: str = "F32"
    seed: int = 0
    max_shard_nbytes: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """config.json as written."""
        return small_config() | self.overrides

    @property
    def num_experts(self) -> int:
        """Routed experts per layer."""
        return int(self.config["n_routed_experts"])


V2 = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "topk_method": "greedy",
    "n_group": None,
    "topk_group": None,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "n_shared_experts": 2,
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
ODD = {
    "hidden_size": 140,
    "q_lora_rank": 37,
    "kv_lora_rank": 51,
    "qk_nope_head_dim": 22,
    "qk_rope_head_dim": 10,
    "v_head_dim": 27,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "intermediate_size": 201,
    "moe_intermediate_size": 45,
    "vocab_size": 331,
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
}

CONFIGS = (
    OracleConfig("v3-default"),
    OracleConfig("v3-no-query-rank", {"q_lora_rank": None, "first_k_dense_replace": 0}, seed=1),
    OracleConfig(
        "v3-five-experts-one-group-top1",
        {"n_routed_experts": 5, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
        | {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "eos_token_id": None},
        seed=2,
    ),
    OracleConfig(
        "v3-no-shared-expert",
        {"n_shared_experts": 0, "num_experts_per_tok": 8, "n_group": 2, "topk_group": 1},
        seed=20,
    ),
    OracleConfig("v3-tied", {"tie_word_embeddings": True, "num_experts_per_tok": 2}, seed=21),
    OracleConfig(
        "v3-yarn",
        {"rope_scaling": YARN | {"mscale": 0.707}, "max_position_embeddings": 2560},
        seed=5,
    ),
    OracleConfig("v3-odd", ODD | {"n_routed_experts": 18, "n_group": 3, "topk_group": 2}, seed=6),
    OracleConfig(
        "v3-72-experts-top8",
        {"n_routed_experts": 72, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 32, "first_k_dense_replace": 2},
        storage="BF16",
        seed=7,
        max_shard_nbytes=1 << 20,
    ),
    OracleConfig(
        "v3-fp8",
        {"hidden_size": 192, "moe_intermediate_size": 144, "num_hidden_layers": 3},
        storage="F8_E4M3",
        seed=8,
    ),
    OracleConfig(
        "v3-split-rope-bias",
        {"rope_interleave": False, "attention_bias": True, "norm_topk_prob": False}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-5}
        | {"num_experts_per_tok": 3, "routed_scaling_factor": 1.7},
        storage="F16",
        seed=9,
    ),
    OracleConfig("v2-greedy", V2 | {"norm_topk_prob": True, "num_experts_per_tok": 6}, seed=10),
    OracleConfig(
        "v2-groups",
        V2
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
        | {"routed_scaling_factor": 16.0, "num_experts_per_tok": 3},
        seed=11,
    ),
    OracleConfig(
        "v2-lite-like",
        V2
        | {"q_lora_rank": None, "n_routed_experts": 64, "num_experts_per_tok": 6}
        | {
            "moe_intermediate_size": 32,
            "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
        storage="BF16",
        seed=12,
    ),
    OracleConfig(
        "v2-odd-bias",
        V2
        | ODD
        | {"kv_lora_rank": 54}  # transformers cannot view an odd cache row as complex numbers
        | {"n_routed_experts": 7, "num_experts_per_tok": 5, "n_shared_experts": 0}
        | {"attention_bias": True, "mlp_bias": True, "first_k_dense_replace": 2},
        seed=13,
    ),
    OracleConfig(
        "v2-tied-fp8",
        V2
        | {"tie_word_embeddings": True, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 7}
        | {
            "topk_method": "group_limited_greedy",
            "first_k_dense_replace": 0,
            "num_hidden_layers": 3,
        },
        storage="F8_E4M3",
        seed=20,
    ),
)
BY_NAME = {config.name: config for config in CONFIGS}
