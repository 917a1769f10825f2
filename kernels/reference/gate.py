"""Gates: which experts a row goes to and with which weight.

Semantics are `DeepseekV3TopkRouter` and `DeepseekV2TopkRouter` of transformers 5.23.0; ties fall as `torch.topk` lets
them fall there. Logits, scores and weights are fp32 whatever the dtype of the rows. Expert ids come unsorted.
"""

import torch
from torch import Tensor

from kernels.reference.ffn import sigmoid
from kernels.reference.linear import linear


def gate_v3(
    x: Tensor, weight: Tensor, bias: Tensor, *, top_k: int, num_groups: int, top_k_groups: int,
    norm_topk_prob: bool, routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sigmoid gate with group limit: x [rows, width] -> expert ids int32 and weights fp32, both [rows, top_k].

    weight [experts (padded), width] and bias [experts] in fp32. A group scores the sum of the two best of
    score + bias; other groups count as -inf. Weights are the unbiased scores, divided by their sum + 1e-20 if
    `norm_topk_prob`, times `routed_scaling_factor`.
    """
    scores = sigmoid(linear(x.float(), weight, out=bias.shape[0]))
    choice = scores + bias
    if num_groups > 1:
        group_scores = choice.view(x.shape[0], num_groups, -1).topk(2, dim=-1)[0].sum(dim=-1)
        choice = _mask_groups(choice, group_scores, top_k_groups, float("-inf"))
    ids = torch.topk(choice, k=top_k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return ids.to(torch.int32), weights * routed_scaling_factor


def gate_v2(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, num_experts: int, top_k: int,
    num_groups: int, top_k_groups: int, routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax gate: x [rows, width] -> expert ids int32 and weights fp32, both [rows, top_k].

    weight [experts (padded), width] in fp32. With `num_groups` above 1 (group_limited_greedy) a group scores its
    maximum and other groups count as 0.0. Weights are never normalised, always times `routed_scaling_factor`.
    A `bias` [experts] fp32, which transformers has not, is added as in V3: for the choice only, other groups are -inf.
    """
    scores = linear(x.float(), weight, out=num_experts).softmax(dim=-1)
    if bias is not None:
        choice = scores + bias
        if num_groups > 1:
            best = choice.view(x.shape[0], num_groups, -1).max(dim=-1).values
            choice = _mask_groups(choice, best, top_k_groups, float("-inf"))
        ids = torch.topk(choice, k=top_k, dim=-1, sorted=False)[1]
        return ids.to(torch.int32), scores.gather(1, ids) * routed_scaling_factor
    if num_groups > 1:
        group_scores = scores.view(x.shape[0], num_groups, -1).max(dim=-1).values
        scores = _mask_groups(scores, group_scores, top_k_groups, 0.0)
    weights, ids = torch.topk(scores, k=top_k, dim=-1, sorted=False)
    return ids.to(torch.int32), weights * routed_scaling_factor


def _mask_groups(scores: Tensor, group_scores: Tensor, top_k_groups: int, fill: float) -> Tensor:
    """scores [rows, experts] with every expert outside the best groups set to `fill`."""
    best = torch.topk(group_scores, k=top_k_groups, dim=-1, sorted=False)[1]
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
    rows, groups = group_scores.shape
    grouped = scores.view(rows, groups, -1).masked_fill(outside.unsqueeze(-1), fill)
    return grouped.view(rows, -1)
