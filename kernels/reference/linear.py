"""Matrix products whose rows do not depend on one another: the same bits for a row whatever else is in the batch.

MKL's sgemm on CPU takes other paths for few rows, odd remainders and narrow outputs, and they round differently.
Measured (torch 2.13.0, MKL 2024.2, AVX2; 21 shapes, M = 1 to 130 against the same rows at M = 160, bits):

    plain F.linear                  1 thread: M = 1, 2, 3 differ      2 threads: also 5-7 and 9-11
    out features N = 1, 5           some M differ at any size
    M padded to a multiple of 4     1 and 2 threads: equal from N = 16 up; 4 and 8 threads: not for N = 17, 18, 24
    M to 4s and N to 16s            1, 2, 3, 4, 8 threads: equal everywhere, to one another too

Where x and the weight start in memory (every 4 bytes of a cache line) changes nothing: a restarted process, whose
weights lie elsewhere, gives the same bits. Equal too with MKL and torch held to SSE4.2 or AVX.

Hence `ROW_MULTIPLE` and `OUT_MULTIPLE`. Weights are padded once, at load (`pad_out`); rows here or by the caller.
"""

import torch

ROW_MULTIPLE = 4
OUT_MULTIPLE = 16


def padded_rows(num_rows: int) -> int:
    """The next multiple of `ROW_MULTIPLE`."""
    return -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` [rows, ...] with zero rows appended up to `padded_rows`; `x` itself when nothing is missing."""
    missing = -x.shape[0] % ROW_MULTIPLE
    if not missing:
        return x
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])])


def pad_out(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] or bias [out] with zero rows appended up to a multiple of `OUT_MULTIPLE`."""
    missing = -weight.shape[0] % OUT_MULTIPLE
    if not missing:
        return weight.contiguous()
    return torch.cat([weight, weight.new_zeros(missing, *weight.shape[1:])])


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out: int = 0
) -> torch.Tensor:
    """x [rows, in] times weight [out, in] transposed, plus bias: [rows, out], a row's bits depending on that row alone.

    `weight` (and `bias`) should come from `pad_out`, else they are padded at every call. `out` keeps the first columns
    only (0: all that the weight has). fp32 or bf16, CPU or CUDA; accumulation is the library's, in fp32.
    """
    width = out or weight.shape[0]
    if weight.shape[0] % OUT_MULTIPLE:
        weight = pad_out(weight)
        bias = None if bias is None else pad_out(bias)
    num_rows = x.shape[0]
    if num_rows % ROW_MULTIPLE:
        return torch.nn.functional.linear(pad_rows(x), weight, bias)[:num_rows, :width]
    result = torch.nn.functional.linear(x, weight, bias)
    return result if width == weight.shape[0] else result[:, :width]
