"""Experts with random FP8 weights, and their answer in float64."""

import torch

from kernels.reference.expert_ffn import dequantise_weight
from kernels.reference.quant import dequantise, quantise


def expert(width, hidden, *, device="cpu", seed=0):
    """gate_up, its scales, down, its scales: as an FP8 checkpoint holds them."""
    g = torch.Generator().manual_seed(seed)
    blocks = -(-hidden // 128)

    def weight(*shape):
        return (torch.randn(*shape, generator=g) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)

    def scales(*shape):
        return torch.rand(*shape, generator=g) * 1e-3 + 2e-4

    parts = (
        weight(2 * hidden, width),
        scales(2 * blocks, -(-width // 128)),
        weight(width, hidden),
        scales(-(-width // 128), blocks),
    )
    return tuple(t.to(device) for t in parts)


def rows(n, width, *, device="cpu", seed=1):
    """Quantised rows with outliers, and scales."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g)
    x[torch.rand(n, width, generator=g) < 0.002] *= 100
    q, scales = quantise(x)
    return q.to(device), scales.to(device)


def exact(q, scales, weights):
    """The expert in float64, its hidden rows requantised as the contract says."""
    gate_up, gate_up_scales, down, down_scales = weights
    hidden = down.shape[1]
    x = dequantise(q, scales, torch.float64)
    both = x @ dequantise_weight(gate_up, gate_up_scales, halves=2).double().t()
    h = torch.nn.functional.silu(both[:, :hidden]) * both[:, hidden:]
    h = dequantise(*quantise(h.float()), torch.float64)
    return h @ dequantise_weight(down, down_scales).double().t()


def error(got, expected):
    """Relative error by norm; NaN where anything is NaN, which fails every comparison."""
    return float(torch.linalg.norm(got.double() - expected) / torch.linalg.norm(expected))
