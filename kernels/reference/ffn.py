"""SwiGLU feed-forward network: dense layers, shared experts and, on CPU, routed experts."""

from collections.abc import Callable
from functools import partial

import torch

from kernels.reference.linear import OUT_MULTIPLE, ROW_MULTIPLE, linear, pad_rows

Network = Callable[[torch.Tensor], torch.Tensor]
_ONE = torch.ones(1)


def silu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(x), elementwise, the same bits for a value wherever it stands.

    Not `F.silu` or `torch.sigmoid`: on CPU these run a vector routine and, for the last elements, a scalar one that
    rounds differently, so that a row's bits depend on the number of rows (measured, torch 2.13.0: 42 of 216 shapes
    differ). `exp` and division have one result each.
    """
    return x / _one_plus_exp_minus(x)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """1 / (1 + exp(-x)), elementwise; see `silu` for why not `torch.sigmoid`."""
    return _one_plus_exp_minus(x).reciprocal_()


def _one_plus_exp_minus(x: torch.Tensor) -> torch.Tensor:
    result = torch.neg(x).exp_()
    if x.dtype is torch.float32 and x.device.type == "cpu":
        return result.add_(_ONE)  # a Python number costs 2 us more
    return result.add_(1)


def ffn(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, *,
    gate_up_bias: torch.Tensor | None = None, down_bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """down @ (silu(gate @ x) * (up @ x)) for x [rows, width].

    gate_up [2 * inner, width] has the gate's rows first, down is [width, inner].
    `DeepseekV3MLP` and `DeepseekV3Experts` in transformers 5.23.0. Rows are independent, bit for bit.
    """
    num_rows, width = x.shape
    inner = down.shape[1]
    rows = x if gate_up.is_mkldnn else pad_rows(x)  # once for both products
    both = linear(rows, gate_up, gate_up_bias, out=2 * inner)
    hidden = silu(both[:, :inner]).mul_(both[:, inner:])
    result = linear(hidden, down, down_bias, out=width)
    return result if rows.shape[0] == num_rows else result[:num_rows]


def network(gate_up: torch.Tensor, down: torch.Tensor) -> Network:
    """`ffn` of these weights, the same bits, with everything decided that does not depend on the rows.

    Among many processes that take turns on a core nothing is in the caches, and every function on the way counts: four
    rows of a network of 128 x 64 cost 0.10 ms instead of 0.14 (AMD EPYC, 16 processes in turn).
    """
    width, inner = down.shape
    is_plain = gate_up.dtype is down.dtype is torch.float32 and gate_up.device.type == "cpu"
    is_padded = (
        gate_up.shape[0] == 2 * inner and not (2 * inner) % OUT_MULTIPLE + width % OUT_MULTIPLE
    )
    if not is_plain or not is_padded or gate_up.is_mkldnn or down.is_mkldnn:
        return partial(ffn, gate_up=gate_up, down=down)
    zeros = torch.zeros(ROW_MULTIPLE, gate_up.shape[1])
    product, cat, neg, div = torch.nn.functional.linear, torch.cat, torch.neg, torch.div

    def call(x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        missing = -num_rows % ROW_MULTIPLE
        gate, up = product(cat((x, zeros[:missing])) if missing else x, gate_up).chunk(2, 1)
        result = product(div(gate, neg(gate).exp_().add_(_ONE)).mul_(up), down)
        return result[:num_rows] if missing else result

    return call
