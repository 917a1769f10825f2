"""config.json: what is read, what is assumed, what is refused and in which words."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from common.errors import ModelError
from common.model.hf_config import Family, GateKind, load_config, parse_config
from common.model.small import small_config
from tests.oracle.configs import V2, YARN


def parse(**overrides: Any):
    return parse_config(small_config() | overrides, source="config.json")


def test_small_config() -> None:
    config = parse()
    assert config.family is Family.V3
    assert config.gate is GateKind.SIGMOID_GROUPS
    assert config.moe_layers == range(1, 4)
    assert config.latent_width == 80
    assert config.softmax_scale == 48**-0.5


def test_v2_lite_as_published() -> None:
    config = parse_config(
        {
            "model_type": "deepseek_v2",
            "attention_bias": False,
            "aux_loss_alpha": 0.001,
            "bos_token_id": 100000,
            "eos_token_id": 100001,
            "first_k_dense_replace": 1,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "kv_lora_rank": 512,
            "max_position_embeddings": 163840,
            "moe_intermediate_size": 1408,
            "moe_layer_freq": 1,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 40,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
            },
            "rope_theta": 10000,
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "topk_group": 1,
            "topk_method": "greedy",
            "v_head_dim": 128,
            "vocab_size": 102400,
        },
        source="config.json",
    )
    assert config.gate is GateKind.SOFTMAX
    assert config.q_lora_rank is None
    mscale = 0.1 * 0.707 * math.log(40) + 1
    assert config.softmax_scale == pytest.approx(192**-0.5 * mscale**2)
    assert config.rope.attention_factor == 1.0
    assert config.eos_token_ids == (100001,)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500.0, "rope_scaling": YARN},
        {"rope_scaling": None, "rope_theta": None}
        | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0} | YARN},
    ],
    ids=["published", "transformers 5"],
)
def test_both_ways_to_write_rope(rope: dict[str, Any]) -> None:
    config = parse(**rope).rope
    assert (config.yarn, config.theta, config.factor) == (True, 500.0, 40.0)
    assert config.original_max_position == 64


def test_yarn_without_mscale_scales_cos_and_sin() -> None:
    rope = parse(rope_scaling={"type": "yarn", "factor": 4.0}).rope
    assert rope.attention_factor == pytest.approx(0.1 * math.log(4) + 1)
    assert rope.scale_factor == 1.0
    assert rope.original_max_position == 4096


def test_what_may_be_null_or_absent() -> None:
    config = parse(eos_token_id=None, n_shared_experts=None, q_lora_rank=None, bos_token_id=None)
    assert config.eos_token_ids == ()
    assert config.num_shared_experts == 0
    assert config.bos_token_id is None
    document = small_config() | V2
    for key in (
        "rope_theta",
        "rope_scaling",
        "tie_word_embeddings",
        "norm_topk_prob",
        "topk_method",
    ):
        document.pop(key)
    assert parse_config(document, source="").rope.theta == 10000.0
    assert parse(eos_token_id=[1, 2]).eos_token_ids == (1, 2)
    assert parse(num_nextn_predict_layers=1).num_layers == 4


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not supported, only deepseek_v3 and"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_size": "128"}, "hidden_size must be a whole number of at least 1, not '128'"),
        ({"hidden_size": True}, "hidden_size must be a whole number"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok must be a whole number"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok must be at most"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok must be at most 8"),
        ({"n_group": 3}, "n_group must be a divisor of n_routed_experts 16"),
        ({"n_group": 16, "topk_group": 4}, "n_group must be at most 8"),
        ({"topk_group": 5}, "topk_group must be at most n_group 4"),
        (
            {"first_k_dense_replace": 4},
            "first_k_dense_replace must be less than num_hidden_layers 4",
        ),
        ({"moe_layer_freq": 2}, "moe_layer_freq must be 1"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, not 'gelu'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must be equal to num_attention_heads 4"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim must be even"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a finite number above 0"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "factor is missing"),
        ({"eos_token_id": "end"}, "eos_token_id must be a token id"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config must be null or of",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}},
            "weight_block",
        ),
        (V2 | {"topk_method": "noaux_tc"}, "topk_method must be greedy or group_limited_greedy"),
    ],
)
def test_refused(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=f"config.json: {sentence}"):
        parse(**overrides)


@pytest.mark.parametrize("key", ["vocab_size", "kv_lora_rank", "q_lora_rank", "n_routed_experts"])
def test_missing_key(key: str) -> None:
    document = small_config()
    del document[key]
    with pytest.raises(ModelError, match=f"{key} is missing"):
        parse_config(document, source="config.json")


@pytest.mark.parametrize("text", [None, "{", "[]", "\xff"])
def test_unreadable_file(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json: "):
        load_config(tmp_path)


def test_what_transformers_writes_is_read(tmp_path: Path) -> None:
    from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

    DeepseekV3Config().save_pretrained(tmp_path)
    config = load_config(tmp_path)
    assert (config.num_experts, config.top_k, config.num_groups) == (256, 8, 8)
    assert "num_hidden_layers" in json.loads((tmp_path / "config.json").read_text())
    DeepseekV2Config(num_experts_per_tok=6, q_lora_rank=None).save_pretrained(tmp_path)
    assert load_config(tmp_path).q_lora_rank is None
