"""Root mean square normalisation."""

from functools import cache

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension of x [..., width], in fp32, in x's dtype.

    Rounded to x's dtype before the weight, as `DeepseekV3RMSNorm` in transformers 5.23.0. A reduction over one row of
    fixed width: bits do not depend on the number of rows (tests/kernels).
    """
    x32 = x.float()
    scale = (x32 * x32).sum(-1, keepdim=True)
    # one-element tensors, because an operand that is a Python number costs 2 us more (torch 2.13.0)
    scale = scale.mul_(_constant(1 / x.shape[-1], x.device)).add_(_constant(eps, x.device)).rsqrt_()
    return torch.mul((x32 * scale).to(x.dtype), weight, out=out)


@cache
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.full((1,), value, dtype=torch.float32, device=device)
