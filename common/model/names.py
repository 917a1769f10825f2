"""The one table of tensor names, as DeepSeek publishes them and transformers writes them on disk."""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

INPUT_NORM = "input_layernorm.weight"
POST_ATTENTION_NORM = "post_attention_layernorm.weight"

Q = "self_attn.q_proj.weight"
Q_A = "self_attn.q_a_proj.weight"
Q_A_BIAS = "self_attn.q_a_proj.bias"
Q_A_NORM = "self_attn.q_a_layernorm.weight"
Q_B = "self_attn.q_b_proj.weight"
KV_A = "self_attn.kv_a_proj_with_mqa.weight"
KV_A_BIAS = "self_attn.kv_a_proj_with_mqa.bias"
KV_A_NORM = "self_attn.kv_a_layernorm.weight"
KV_B = "self_attn.kv_b_proj.weight"
OUT = "self_attn.o_proj.weight"
OUT_BIAS = "self_attn.o_proj.bias"

GATE = "mlp.gate.weight"
GATE_BIAS = "mlp.gate.e_score_correction_bias"
DENSE = "mlp"
SHARED = "mlp.shared_experts"

SCALE_SUFFIX = "_scale_inv"  # appended to the name of an FP8 weight


def layer(index: int, name: str) -> str:
    """Full name of a tensor of one layer."""
    return f"model.layers.{index}.{name}"


def expert(index: int) -> str:
    """Prefix of a routed expert within its layer."""
    return f"mlp.experts.{index}"


def ffn_weights(prefix: str) -> tuple[str, str, str]:
    """gate, up and down weight of a feed-forward network."""
    return f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", f"{prefix}.down_proj.weight"


def ffn_biases(prefix: str) -> tuple[str, str, str]:
    """gate, up and down bias (V2 with `mlp_bias`: dense layers and shared experts)."""
    return f"{prefix}.gate_proj.bias", f"{prefix}.up_proj.bias", f"{prefix}.down_proj.bias"
