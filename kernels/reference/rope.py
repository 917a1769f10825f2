"""Rotary position embedding with YaRN, in DeepSeek's interleaved layout."""

import math

import torch


def rope_frequencies(dim: int, theta: float) -> torch.Tensor:
    """theta^(-2i / dim) for i < dim / 2: fp32 [dim / 2], in the order of operations of transformers 5.23.0."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim))


def yarn_frequencies(
    dim: int, theta: float, *, factor: float, original_max_position: int, beta_fast: float,
    beta_slow: float, truncate: bool,
) -> torch.Tensor:  # fmt: skip
    """YaRN (arXiv 2309.00071): low frequencies divided by `factor`, high ones kept, a linear ramp between.

    fp32 [dim / 2]; `_compute_yarn_parameters` in modeling_rope_utils.py of transformers 5.23.0.
    """

    def correction_dim(rotations: float) -> float:
        turns = original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = correction_dim(beta_fast), correction_dim(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    frequencies = theta ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
    return 1.0 / (factor * frequencies) * (1 - kept) + 1.0 / frequencies * kept


def rope_tables(
    frequencies: torch.Tensor, num_positions: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * frequency, times `scale`: fp32 [num_positions, dim / 2] each."""
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return angles.cos() * scale, angles.sin() * scale


def apply_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> torch.Tensor:
    """Rotate x [..., dim] by cos and sin [..., dim / 2] (broadcast); the result is [real halves | imaginary halves].

    `interleaved`: pairs are (x0, x1), (x2, x3), ... (`apply_rotary_pos_emb_interleave`), else (x0, x[dim / 2]), ...
    Queries and keys come out in the same order, which is all that a dot product needs.
    """
    half = x.shape[-1] // 2
    real, imaginary = (
        (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    )
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
