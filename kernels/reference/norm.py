"""Root mean square normalisation."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension of x [..., width], in fp32, in x's dtype.

    The order of operations is `DeepseekV3RMSNorm` in transformers 5.23.0: rounded to x's dtype before the weight.
    A reduction over one row of fixed width: bits do not depend on the number of rows (tests/kernels).
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)
