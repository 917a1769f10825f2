"""Gates on the GPU: scores, group limit, top-k and weights in one launch, one warp per row.

Semantics: kernels/reference/gate.py (transformers 5.23.0). Of equal scores the expert with the lowest id wins. Ids come
in descending order of score. A NaN among a row's logits makes its weights NaN. Floor: launch latency; 128 rows x 256
experts are 128 KiB.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.linear import linear


@triton.jit
def _top_groups(group_scores, TOP: tl.constexpr, GP: tl.constexpr):
    """1 for the TOP best of group_scores [GP], else 0."""
    group = tl.arange(0, GP)
    chosen = tl.zeros((GP,), tl.int32)
    for _ in tl.static_range(TOP):
        best = tl.argmax(tl.where(chosen == 1, float("-inf"), group_scores), 0)
        chosen = tl.where(group == best, 1, chosen)
    return chosen


@triton.jit
def _gate(
    LOGITS, BIAS, IDS, WEIGHTS, experts, factor, G: tl.constexpr, GP: tl.constexpr,
    PER: tl.constexpr, PP: tl.constexpr, TOP_GROUPS: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, SIGMOID: tl.constexpr, BIASED: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group, place = tl.arange(0, GP), tl.arange(0, PP)
    expert = group[:, None] * PER + place[None, :]  # [GP, PP]
    real = (group < G)[:, None] & (place < PER)[None, :]
    logits = tl.load(LOGITS + row * experts + expert, mask=real, other=float("-inf"))
    bad = tl.max(tl.max((logits != logits).to(tl.int32), 1), 0) > 0
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        e = tl.exp(logits - tl.max(tl.max(logits, 1), 0))
        scores = e / tl.sum(tl.sum(e, 1), 0)
    choice = scores
    if BIASED:
        choice = scores + tl.load(BIAS + expert, mask=real, other=0.0)
    choice = tl.where(real, choice, float("-inf"))
    if G > 1:
        group_scores = tl.max(choice, 1)
        if SIGMOID:
            first = tl.argmax(choice, 1)
            rest = tl.where(place[None, :] == first[:, None], float("-inf"), choice)
            group_scores += tl.max(rest, 1)
        kept = _top_groups(group_scores, TOP_GROUPS, GP)[:, None] == 1
        outside = float("-inf") if BIASED else 0.0
        choice = tl.where(kept | (real == 0), choice, outside)
    choice = tl.reshape(choice, (GP * PP,))
    scores = tl.reshape(scores, (GP * PP,))
    flat = tl.arange(0, GP * PP)
    nth = tl.arange(0, KP)
    ids = tl.zeros((KP,), tl.int32)
    weights = tl.zeros((KP,), tl.float32)
    for k in tl.static_range(K):
        best = tl.argmax(choice, 0)
        weight = tl.sum(tl.where(flat == best, scores if BIASED else choice, 0.0), 0)
        ids = tl.where(nth == k, best // PP * PER + best % PP, ids)
        weights = tl.where(nth == k, weight, weights)
        choice = tl.where(flat == best, float("-inf"), choice)
    if NORMALISE:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    weights = tl.where(bad, float("nan"), weights * factor)
    tl.store(IDS + row * K + nth, ids, mask=nth < K)
    tl.store(WEIGHTS + row * K + nth, weights, mask=nth < K)


def choose(
    logits: Tensor, bias: Tensor | None, *, softmax: bool = False, top_k: int, num_groups: int,
    top_k_groups: int, norm_topk_prob: bool, routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Top-k of logits fp32 [rows, experts]: ids int32 and weights fp32, both [rows, top_k].

    Sigmoid gate with group limit (V3, with a `bias` fp32 [experts]), or softmax gate (V2, without one unless balanced).
    Raises ValueError when the experts do not divide into groups.
    """
    rows, experts = logits.shape
    if experts % num_groups:
        raise ValueError(f"{experts} experts do not divide into {num_groups} groups")
    per = experts // num_groups
    ids = torch.empty(rows, top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(rows, top_k, device=logits.device)
    if rows:
        _gate[(rows,)](
            logits, bias, ids, weights, experts, routed_scaling_factor, num_groups,
            triton.next_power_of_2(num_groups), per, triton.next_power_of_2(per), top_k_groups,
            top_k, triton.next_power_of_2(top_k), not softmax, bias is not None, norm_topk_prob,
            num_warps=1,
        )  # fmt: skip
    return ids, weights


def gate_v3(
    x: Tensor, weight: Tensor, bias: Tensor, *, top_k: int, num_groups: int, top_k_groups: int,
    norm_topk_prob: bool, routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sigmoid gate with group limit: x [rows, width] -> expert ids int32 and weights fp32, both [rows, top_k]."""
    return choose(
        linear(x.float(), weight, out=bias.shape[0]).contiguous(), bias, top_k=top_k,
        num_groups=num_groups, top_k_groups=top_k_groups, norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
    )  # fmt: skip


def gate_v2(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, num_experts: int, top_k: int,
    num_groups: int, top_k_groups: int, routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax gate: x [rows, width] -> expert ids int32 and weights fp32, both [rows, top_k]."""
    return choose(
        linear(x.float(), weight, out=num_experts).contiguous(), bias, softmax=True, top_k=top_k,
        num_groups=num_groups, top_k_groups=top_k_groups, norm_topk_prob=False,
        routed_scaling_factor=routed_scaling_factor,
    )  # fmt: skip
