"""SwiGLU feed-forward network: dense layers, shared experts and, on CPU, routed experts."""

import torch

from kernels.reference.linear import linear, pad_rows


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), elementwise, the same bits for a value wherever it stands.

    Not `F.silu` or `torch.sigmoid`: on CPU these run a vector routine and, for the last elements, a scalar one that
    rounds differently, so that a row's bits depend on the number of rows (measured, torch 2.13.0: 42 of 216 shapes
    differ). `exp` and division have one result each.
    """
    if _is_host(x):
        return torch.from_numpy(x.numpy() / _one_plus_exp_minus(x).numpy())
    return x / (1 + torch.exp(-x))


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)), elementwise; see `silu` for why not `torch.sigmoid`."""
    if _is_host(x):
        return torch.from_numpy(1.0 / _one_plus_exp_minus(x).numpy())
    return 1 / (1 + torch.exp(-x))


def _is_host(x: torch.Tensor) -> bool:
    return x.dtype is torch.float32 and x.device.type == "cpu"


def _one_plus_exp_minus(x: torch.Tensor) -> torch.Tensor:
    """Arithmetic of numpy has torch's bits at a third of the cost of a call; its exp has not."""
    array = -x.numpy()
    result = torch.from_numpy(array).exp_()
    array += 1.0
    return result


def ffn(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """down @ (silu(gate @ x) * (up @ x)) for x [rows, width].

    gate_up [2 * inner, width] has the gate's rows first, down is [width, inner].
    `DeepseekV3MLP` and `DeepseekV3Experts` in transformers 5.23.0. Rows are independent, bit for bit.
    """
    num_rows, width = x.shape
    inner = down.shape[1]
    rows = x if gate_up.is_mkldnn else pad_rows(x)  # once for both products
    both = linear(rows, gate_up, gate_up_bias, out=2 * inner)
    hidden = silu(both[:, :inner])
    if _is_host(both):
        array = hidden.numpy()
        array *= both.numpy()[:, inner:]
    else:
        hidden = hidden * both[:, inner:]
    return linear(hidden, down, down_bias, out=width)[:num_rows]
