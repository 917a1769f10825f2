"""config.json of a Hugging Face directory -> one frozen `ModelConfig`.

Decides what is supported and what a missing key means (transformers' own default for the family); every other value is
refused in one sentence that names the key. Semantics follow transformers 5.23.0, `models/deepseek_v3` and
`models/deepseek_v2`. Leaves tensors to `loader`.
"""

import json
import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from common.errors import ModelError


class Family(StrEnum):
    """Supported values of `model_type`."""

    V3 = "deepseek_v3"
    V2 = "deepseek_v2"


class GateKind(StrEnum):
    """How a gate scores and chooses experts."""

    SIGMOID_GROUPS = "sigmoid_groups"  # V3: sigmoid + bias, groups by the sum of their two best
    SOFTMAX = "softmax"  # V2, topk_method greedy
    SOFTMAX_GROUPS = "softmax_groups"  # V2, topk_method group_limited_greedy


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `yarn` False leaves all fields but `theta` unused.

    `attention_factor` multiplies cos and sin; `scale_factor` multiplies the softmax scale (mscale squared).
    """

    theta: float = 10000.0
    yarn: bool = False
    factor: float = 1.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    scale_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A checkpoint's shape. Widths are elements, `*_scale` multiply, ids are token ids."""

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int
    num_shared_experts: int
    gate: GateKind
    num_groups: int
    top_k_groups: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    first_k_dense: int
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    max_position: int
    rope: RopeConfig
    rope_interleave: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    fp8_block: tuple[int, int] | None  # rows and columns that share a `weight_scale_inv`

    @property
    def moe_layers(self) -> range:
        """Layers with experts; the layers before are dense."""
        return range(self.first_k_dense, self.num_layers)

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_width(self) -> int:
        """Elements that a token keeps in the cache of one layer: the latent and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def shared_intermediate_size(self) -> int:
        """Hidden width of the shared expert, 0 without one."""
        return self.moe_intermediate_size * self.num_shared_experts

    @property
    def softmax_scale(self) -> float:
        """What scores are multiplied by before the softmax (`yarn_apply_mscale` in modeling_deepseek_v3.py)."""
        return float(self.qk_head_dim**-0.5) * self.rope.scale_factor


# What transformers assumes for a key that is absent; keys not listed here must be present.
_DEFAULTS: dict[Family, dict[str, Any]] = {
    Family.V3: {"n_shared_experts": 1, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3}
    | {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "bos_token_id": 0, "eos_token_id": 1},
    Family.V2: {"n_shared_experts": 2, "n_group": None, "topk_group": None}
    | {"first_k_dense_replace": 0, "norm_topk_prob": False, "routed_scaling_factor": 1.0}
    | {"bos_token_id": 1, "eos_token_id": 2, "topk_method": "greedy"},
}
_COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "rope_interleave": True,
    "num_key_value_heads": None,
    "moe_layer_freq": 1,
    "quantization_config": None,
}


def load_config(directory: Path) -> ModelConfig:
    """Read `directory/config.json`. Raises ModelError naming the file, the key and what is supported."""
    return parse_config(read_json(directory / "config.json"), source=str(directory / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk. Raises ModelError naming the file."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as exc:
        raise ModelError(f"{path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise ModelError(f"{path}: not valid JSON ({exc})") from exc
    if not isinstance(document, dict):
        raise ModelError(f"{path}: must hold a JSON object, not a {type(document).__name__}")
    return document


def parse_config(document: dict[str, Any], *, source: str) -> ModelConfig:
    """Check a parsed config.json. Raises ModelError naming `source`, the key and its value."""
    model_type = document.get("model_type")
    if model_type not in tuple(Family):
        supported = " and ".join(Family)
        raise ModelError(f"{source}: model_type {model_type!r} is not supported, only {supported}")
    family = Family(model_type)
    keys = _Keys(_COMMON_DEFAULTS | _DEFAULTS[family] | document, source)
    config = ModelConfig(
        family=family,
        vocab_size=keys.count("vocab_size"),
        hidden_size=keys.count("hidden_size"),
        num_layers=keys.count("num_hidden_layers"),
        num_heads=keys.count("num_attention_heads"),
        q_lora_rank=keys.optional_count("q_lora_rank"),
        kv_lora_rank=keys.count("kv_lora_rank"),
        qk_nope_head_dim=keys.count("qk_nope_head_dim"),
        qk_rope_head_dim=keys.count("qk_rope_head_dim"),
        v_head_dim=keys.count("v_head_dim"),
        intermediate_size=keys.count("intermediate_size"),
        moe_intermediate_size=keys.count("moe_intermediate_size"),
        num_experts=keys.count("n_routed_experts"),
        top_k=keys.count("num_experts_per_tok"),
        num_shared_experts=keys.count("n_shared_experts", least=0, null=0),
        gate=_gate_kind(family, keys),
        num_groups=keys.count("n_group", null=1),
        top_k_groups=keys.count("topk_group", null=1),
        norm_topk_prob=keys.flag("norm_topk_prob"),
        routed_scaling_factor=keys.number("routed_scaling_factor"),
        first_k_dense=keys.count("first_k_dense_replace", least=0, null=0),
        rms_norm_eps=keys.number("rms_norm_eps"),
        attention_bias=keys.flag("attention_bias"),
        mlp_bias=keys.flag("mlp_bias") and family is Family.V2,
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        max_position=keys.count("max_position_embeddings"),
        rope=_rope(keys),
        rope_interleave=keys.flag("rope_interleave") or family is Family.V2,
        bos_token_id=keys.optional_count("bos_token_id", least=0),
        eos_token_ids=_eos(keys),
        fp8_block=_fp8_block(keys),
    )
    _check(config, keys)
    return config


class _Keys:
    """Typed access to a JSON object; every failure names source, key and value."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def fail(self, key: str, need: str) -> ModelError:
        if key not in self.values:
            return ModelError(f"{self.source}: {key} is missing, it must be {need}")
        return ModelError(f"{self.source}: {key} must be {need}, not {self.values[key]!r}")

    def count(self, key: str, *, least: int = 1, null: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and null is not None and key in self.values:
            return null
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.fail(key, f"a whole number of at least {least}")
        return value

    def optional_count(self, key: str, *, least: int = 1) -> int | None:
        if key in self.values and self.values[key] is None:
            return None
        return self.count(key, least=least)

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.fail(key, "a number")
        if not math.isfinite(value) or value <= 0:
            raise self.fail(key, "a finite number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if value is None and key in self.values:
            return False
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value


def _gate_kind(family: Family, keys: _Keys) -> GateKind:
    if family is Family.V3:
        return GateKind.SIGMOID_GROUPS  # transformers reads neither scoring_func nor topk_method
    kinds = {"greedy": GateKind.SOFTMAX, "group_limited_greedy": GateKind.SOFTMAX_GROUPS}
    method = keys.values["topk_method"]
    if not isinstance(method, str) or method not in kinds:
        raise keys.fail("topk_method", "greedy or group_limited_greedy for deepseek_v2")
    return kinds[method]


def _rope(keys: _Keys) -> RopeConfig:
    """Rope of `rope_scaling` (real checkpoints) or `rope_parameters` (transformers 5), in transformers' priority.

    The formulas are `_compute_yarn_parameters` (modeling_rope_utils.py) and `yarn_apply_mscale`.
    """
    nested = keys.values.get("rope_scaling") or keys.values.get("rope_parameters") or {}
    if not isinstance(nested, dict):
        raise keys.fail("rope_scaling", "an object")
    theta = keys.values.get("rope_theta")
    rope = _Keys({"rope_theta": 10000.0 if theta is None else theta} | nested, keys.source)
    rope_type = rope.values.get("rope_type", rope.values.get("type", "default"))
    theta = rope.number("rope_theta")
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type != "yarn":
        raise ModelError(
            f"{keys.source}: rope_type {rope_type!r} is not supported, only default and yarn"
        )
    factor = rope.number("factor")
    original = {"original_max_position_embeddings": keys.count("max_position_embeddings")}
    rope.values = original | rope.values
    if keys.values.get("original_max_position_embeddings") is not None:
        rope.values["original_max_position_embeddings"] = keys.count(
            "original_max_position_embeddings"
        )
    mscale = float(rope.values.get("mscale") or 0.0)
    mscale_all_dim = float(rope.values.get("mscale_all_dim") or 0.0)
    attention = rope.values.get("attention_factor")
    if attention is None:
        both = bool(mscale) and bool(mscale_all_dim)
        attention = (
            _mscale(factor, mscale) / _mscale(factor, mscale_all_dim) if both else _mscale(factor)
        )
    return RopeConfig(
        theta=theta,
        yarn=True,
        factor=factor,
        original_max_position=rope.count("original_max_position_embeddings"),
        beta_fast=float(rope.values.get("beta_fast") or 32),
        beta_slow=float(rope.values.get("beta_slow") or 1),
        truncate=bool(rope.values.get("truncate", True)),
        attention_factor=float(attention),
        scale_factor=_mscale(factor, mscale_all_dim) ** 2 if mscale_all_dim else 1.0,
    )


def _mscale(factor: float, mscale: float = 1.0) -> float:
    """`yarn_get_mscale`: 0.1 * mscale * ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _eos(keys: _Keys) -> tuple[int, ...]:
    value = keys.values["eos_token_id"]
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise keys.fail("eos_token_id", "a token id, a list of them or null")
    return tuple(ids)


def _fp8_block(keys: _Keys) -> tuple[int, int] | None:
    quantization = keys.values["quantization_config"]
    if quantization is None:
        return None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        raise keys.fail("quantization_config", "null or of quant_method fp8")
    block = quantization.get("weight_block_size", [128, 128])
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int for b in block)):
        raise ModelError(
            f"{keys.source}: weight_block_size must be two whole numbers, not {block!r}"
        )
    if min(block) < 1:
        raise ModelError(f"{keys.source}: weight_block_size must be positive, not {block!r}")
    return block[0], block[1]


def _check(config: ModelConfig, keys: _Keys) -> None:
    def need(condition: bool, key: str, sentence: str) -> None:
        if not condition:
            raise keys.fail(key, sentence)

    need(keys.values["hidden_act"] == "silu", "hidden_act", "silu")
    need(keys.values["moe_layer_freq"] == 1, "moe_layer_freq", "1 (transformers knows no other)")
    heads = keys.values["num_key_value_heads"]
    need(
        heads in (None, config.num_heads),
        "num_key_value_heads",
        f"equal to num_attention_heads {config.num_heads}: the latent is expanded per head",
    )
    need(config.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "even")
    need(
        config.first_k_dense < config.num_layers,
        "first_k_dense_replace",
        f"less than num_hidden_layers {config.num_layers}: a model without MoE layers is not served",
    )
    need(config.top_k <= config.num_experts, "num_experts_per_tok", "at most n_routed_experts")
    if config.gate is not GateKind.SOFTMAX:
        _check_groups(config, keys)


def _check_groups(config: ModelConfig, keys: _Keys) -> None:
    group = config.num_experts // config.num_groups
    if config.num_experts % config.num_groups:
        raise keys.fail("n_group", f"a divisor of n_routed_experts {config.num_experts}")
    if config.gate is GateKind.SIGMOID_GROUPS and group < 2:
        raise keys.fail(
            "n_group", f"at most {config.num_experts // 2}: a group has two experts or more"
        )
    if config.top_k_groups > config.num_groups:
        raise keys.fail("topk_group", f"at most n_group {config.num_groups}")
    if config.top_k > config.top_k_groups * group:
        reachable = config.top_k_groups * group
        raise keys.fail(
            "num_experts_per_tok", f"at most {reachable}, the experts of topk_group groups"
        )
