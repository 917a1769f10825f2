"""The gates choose and weigh as transformers' routers do, on the same logits and on ties."""

import pytest
import torch
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from kernels.reference.gate import gate_v2, gate_v3

WIDTH = 48


def same(ours: tuple[torch.Tensor, torch.Tensor], ids: torch.Tensor, weights: torch.Tensor) -> None:
    mine, order = ours[0].long().sort(dim=-1)
    theirs, their_order = ids.sort(dim=-1)
    assert torch.equal(mine, theirs)
    torch.testing.assert_close(
        ours[1].gather(1, order), weights.gather(1, their_order), rtol=2e-6, atol=1e-7
    )
    assert ours[0].dtype is torch.int32


@pytest.mark.parametrize("tied", [False, True], ids=["random", "tied"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("experts", "groups", "kept", "top_k"),
    [(16, 4, 2, 4), (6, 1, 1, 3), (64, 8, 3, 8), (384, 1, 1, 8)],
)
def test_v3(experts: int, groups: int, kept: int, top_k: int, norm: bool, tied: bool) -> None:
    torch.manual_seed(experts)
    config = DeepseekV3Config(
        hidden_size=WIDTH,
        n_routed_experts=experts,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=top_k,
        norm_topk_prob=norm,
        routed_scaling_factor=1.7,
    )
    router = DeepseekV3TopkRouter(config)
    router.weight.data = torch.zeros(experts, WIDTH) if tied else torch.randn(experts, WIDTH)
    router.e_score_correction_bias = torch.zeros(experts) if tied else torch.randn(experts) / 10
    x = torch.randn(40, WIDTH)
    _, weights, ids = router(x)
    ours = gate_v3(
        x,
        router.weight.data,
        router.e_score_correction_bias,
        top_k=top_k,
        num_groups=groups,
        top_k_groups=kept,
        norm_topk_prob=norm,
        routed_scaling_factor=1.7,
    )
    same(ours, ids, weights.detach())


@pytest.mark.parametrize("tied", [False, True], ids=["random", "tied"])
@pytest.mark.parametrize(("method", "groups"), [("greedy", 1), ("group_limited_greedy", 4)])
def test_v2(method: str, groups: int, tied: bool) -> None:
    torch.manual_seed(groups)
    config = DeepseekV2Config(
        hidden_size=WIDTH,
        num_attention_heads=4,
        n_routed_experts=16,
        n_group=groups,
        topk_group=max(1, groups // 2),
        topk_method=method,
        num_experts_per_tok=6,
        norm_topk_prob=True,
        routed_scaling_factor=1.7,
    )
    router = DeepseekV2TopkRouter(config)
    router.weight.data = torch.zeros(16, WIDTH) if tied else torch.randn(16, WIDTH)
    x = torch.randn(40, WIDTH)
    _, weights, ids = router(x)
    ours = gate_v2(
        x,
        router.weight.data,
        num_experts=16,
        top_k=6,
        num_groups=groups,
        top_k_groups=max(1, groups // 2),
        routed_scaling_factor=1.7,
    )
    same(ours, ids, weights.detach())
