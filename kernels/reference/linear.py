"""Matrix products whose rows do not depend on one another: the same bits for a row whatever else is in the batch.

MKL's sgemm on CPU chooses its path by the number of rows, the width and the memory's alignment, and paths round
differently. Measured (torch 2.13.0, MKL 2024.2; M = 1 to 130 against the same rows at M = 160; of 13 shapes, how many
have a differing bit):

                                              Intel AVX-512    the same held to AVX2
    rows padded to 4s, columns to 16s         8                13
    weight on the left, rows padded to 4s     0                13
    MKL_CBWR=AUTO,STRICT, padded or not       0                0

On an AMD EPYC (AVX2) padding alone is enough: 21 shapes, 1 to 8 threads, all bits equal. The setting does harm there:
with it and two threads, products of 16 columns have rows that differ.

So MKL is asked for its strict conditional reproducibility (documented for equal bits whatever the alignment and the
number of threads; that it holds over M is what was measured) on CPUs that are not AMD's, and rows and columns are
padded everywhere: `ROW_MULTIPLE` and `OUT_MULTIPLE`. It costs nothing from 64 rows up and 0 to 30 % below. The bits are
those of one instruction set: hosts of different kinds agree with MKL_CBWR=AVX2,STRICT on all of them.

Weights that a checkpoint stores in 16 bits may stay so in memory when rows are fp32: they are widened, which is exact,
a cache-sized tile at a time. Few rows are bound by reading the weight, so half the bytes is 0.6 to 0.8 of the time
(measured at M = 4 to 16, [2048, 1024], Intel AVX-512).

On a CPU with AVX2 alone, large weights are packed for oneDNN instead, in fp32: MKL packs them anew at every product
there. CPU us of a SwiGLU network of width and inner width 1024 (AMD EPYC, torch 2.13.0, one thread):

    rows              1      4      8     16     32
    16 bits, MKL   2338   3203   2729   3274   4508
    fp32, MKL      1729   2348   2790   3146   4261
    fp32, oneDNN    870   1260   1914   2588   5173

Its rows are independent without padding: 13 shapes, M = 1 to 130, no differing bit, as long as the weight is packed for
more than one row (else a single row takes another path). Not where the user chose MKL's instruction set, since hosts of
different kinds could not agree then.
"""

import os
from pathlib import Path

import torch


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# MKL reads it at its first call, so whoever multiplies imports this first; a strict choice of the user's stays
_chosen = "STRICT" in os.environ.get("MKL_CBWR", "")
if not _chosen and not _is_amd():
    os.environ["MKL_CBWR"] = "AUTO,STRICT"

ROW_MULTIPLE = 4
OUT_MULTIPLE = 16
_TILE_NBYTES = 1 << 19  # of widened weight: it should stay in the second-level cache
_MIN_LARGE = 1 << 19  # elements; smaller weights are kept wide and plain: one cheap operation
_packs = not _chosen and torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability() == "AVX2"
_PACKED_FOR = 8  # rows


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


def resident(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight [out, in] as it stays in memory for rows of `dtype`, for `linear` alone: padded, in `dtype`.

    A large one for fp32 rows on a CPU is packed for oneDNN where that pays, else left in 16 bits if it is stored so.
    """
    large = weight.numel() >= _MIN_LARGE and weight.device.type == "cpu" and dtype is torch.float32
    if large and _packs:
        pack = torch.ops.mkldnn._reorder_linear_weight
        packed: torch.Tensor = pack(pad_out(weight.float()), _PACKED_FOR)
        return packed
    return pad_out(weight if large and weight.element_size() == 2 else weight.to(dtype))


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out: int = 0
) -> torch.Tensor:
    """x [rows, in] times weight [out, in] transposed, plus bias: [rows, out], a row's bits depending on that row alone.

    `weight` (and `bias`) should come from `pad_out`, else they are padded at every call. `out` keeps the first columns
    only (0: all that the weight has). fp32 or bf16, CPU or CUDA; accumulation is the library's, in fp32. With fp32 x
    the weight may be fp16 or bf16: the bits are those of the weight converted to fp32.
    """
    width = out or weight.shape[0]
    if weight.is_mkldnn:
        packed: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return packed if width == weight.shape[0] else packed[:, :width]
    if weight.shape[0] % OUT_MULTIPLE:
        weight = pad_out(weight)
        bias = None if bias is None else pad_out(bias)
    num_rows = x.shape[0]
    product = torch.nn.functional.linear if weight.dtype == x.dtype else _widening_linear
    if num_rows % ROW_MULTIPLE:
        return product(pad_rows(x), weight, bias)[:num_rows, :width]
    result = product(x, weight, bias)
    return result if width == weight.shape[0] else result[:, :width]


def _widening_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    num_out, width = weight.shape
    step = max(OUT_MULTIPLE, _TILE_NBYTES // (4 * width) // OUT_MULTIPLE * OUT_MULTIPLE)
    tile = torch.empty(min(step, num_out), width)
    result = torch.empty(x.shape[0], num_out)
    for start in range(0, num_out, step):
        part = weight[start : start + step]
        wide = tile[: part.shape[0]].copy_(part)
        part_bias = None if bias is None else bias[start : start + step]
        result[:, start : start + step] = torch.nn.functional.linear(x, wide, part_bias)
    return result
