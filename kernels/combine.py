"""Weighted sums of expert rows in one fixed order on the GPU: one program per row and 1024 columns.

All k loads of a program are in flight together; the sum runs in ascending k. Fused multiply-add is off, so that the
bits are those of the reference: product and sum are rounded apart. Floor: (k rows in + 1 row out) / copy bandwidth.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import PROGRAMMATIC, after_predecessor
from kernels.launch import Launcher
from kernels.quant import quantise_blocks
from kernels.reference.combine import OTHER
from kernels.reference.quant import BLOCK, SCALE_MIN, rows_view

_COLUMNS = 1024
_SPLIT_ROWS = 512  # below, programs of more threads fill the card
_OTHER = tl.constexpr(OTHER)


@triton.jit
def _weighted_sum(
    SOURCE, SLOTS, WEIGHTS, MORE, row, column, inside, width, K: tl.constexpr,
    WEIGHTED: tl.constexpr, TWO: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Sum of K rows over columns [C], ascending k, in WIDE."""
    acc = tl.zeros((C,), WIDE)
    for k in tl.static_range(K):
        slot = tl.load(SLOTS + row * K + k)
        # An absent row is read as zeros: adding +0 changes no bit of an accumulator that is never -0.
        slots = tl.zeros((C,), tl.int32) + slot
        here = inside & (slots >= 0) & ((slots < _OTHER) | (not TWO))
        at = SOURCE + slot.to(tl.int64) * width + column
        term = tl.load(at, mask=here, other=0.0).to(WIDE)
        if TWO:  # one of the two is zero
            at = MORE + (slot - _OTHER).to(tl.int64) * width + column
            term += tl.load(at, mask=inside & (slots >= _OTHER), other=0.0).to(WIDE)
        if WEIGHTED:
            # No choice per number: the predicates for all rows would not fit, and their loads wait for each other.
            term *= tl.where(slot < 0, 0.0, tl.load(WEIGHTS + row * K + k)).to(WIDE)
        acc += term
    return acc


@triton.jit
def _combine(
    SOURCE, SLOTS, WEIGHTS, MORE, OUT, width, K: tl.constexpr,
    WEIGHTED: tl.constexpr, TWO: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    after_predecessor()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = column < width
    acc = _weighted_sum(
        SOURCE, SLOTS, WEIGHTS, MORE, row, column, inside, width, K, WEIGHTED, TWO, WIDE, C
    )
    tl.store(OUT + row * width + column, acc, mask=inside)


@triton.jit
def _combine_fp8(
    SOURCE, SLOTS, WEIGHTS, ROWS, SCALES, width, per_row, K: tl.constexpr,
    WEIGHTED: tl.constexpr, C: tl.constexpr, MIN: tl.constexpr,
):  # fmt: skip
    after_predecessor()
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * C
    column = first + tl.arange(0, C)
    inside = column < width
    acc = _weighted_sum(
        SOURCE, SLOTS, WEIGHTS, SOURCE, row, column, inside, width, K, WEIGHTED, False, tl.float32, C
    )  # fmt: skip
    q, scale = quantise_blocks(tl.reshape(acc, (C // 128, 128)), MIN)
    tl.store(ROWS + row * width + column, tl.reshape(q, (C,)), mask=inside)
    block = first // 128 + tl.arange(0, C // 128)
    tl.store(SCALES + row * per_row + block, scale, mask=block < per_row)


_launch_combine = Launcher(_combine)


def _warps(num_rows: int) -> int:
    return 4 if num_rows >= _SPLIT_ROWS else 8


def combine(
    source: Tensor, slots: Tensor, weights: Tensor | None, out: Tensor, more: Tensor | None = None
) -> None:
    """out[i] = sum over j, ascending, of weights[i, j] * source[slots[i, j]], skipping slots of -1.

    source [m, width] bf16, fp32 or float64; slots [n, k] int32; weights [n, k] fp32, or None for a plain sum;
    out [n, width] bf16, fp32 or float64. A row without pairs becomes zero. All contiguous. In a plain sum a slot of
    OTHER + i is row i of `more`, whose dtype may be another.
    """
    combining(source, slots, weights, out, more)()


def combining(
    source: Tensor, slots: Tensor, weights: Tensor | None, out: Tensor, more: Tensor | None = None
) -> Callable[[], object]:
    """`combine` to be launched later, prepared by then; the tensors stay where they are and with the caller."""
    assert more is None or weights is None, "two sources are for plain sums"
    n, depth = slots.shape
    width = source.shape[1]
    if n == 0:
        return lambda: None
    weighted, two, few = weights is not None, more is not None, n < _SPLIT_ROWS
    pointers = (
        source,
        slots,
        slots if weights is None else weights,
        source if more is None else more,
        out,
    )
    dtypes = source.dtype, pointers[3].dtype, out.dtype

    def describe() -> tuple[tuple[object, ...], dict[str, object]]:
        exact = torch.float64 in dtypes
        constants = depth, weighted, two, tl.float64 if exact else tl.float32, _COLUMNS
        limit = 40 if few and weighted and depth <= 8 and not exact else None
        options = {"num_warps": _warps(n), "enable_fp_fusion": False, "maxnreg": limit}
        return constants, options | PROGRAMMATIC

    return _launch_combine.prepared(
        (depth, weighted, two, few, width, dtypes),
        (n, -(-width // _COLUMNS), 1), pointers, (width,), describe,
    )  # fmt: skip


def combine_fp8(
    source: Tensor, slots: Tensor, weights: Tensor | None, payload: Tensor, *, rows_offset: int,
    scales_offset: int,
) -> None:  # fmt: skip
    """`combine` with FP8 rows and scales written into `payload` (uint8), as `quantise_rows` lays them out."""
    n, depth = slots.shape
    width = source.shape[1]
    per_row = -(-width // BLOCK)
    rows = rows_view(payload, rows_offset, n, width, torch.float8_e4m3fn)
    scales = rows_view(payload, scales_offset, n, per_row, torch.float32)
    if n == 0:
        return
    _combine_fp8[(n, triton.cdiv(width, _COLUMNS))](
        source, slots, weights, rows, scales, width, per_row, depth, weights is not None,
        _COLUMNS, SCALE_MIN, num_warps=_warps(n), enable_fp_fusion=False, **PROGRAMMATIC,
    )  # fmt: skip


@triton.jit
def _add_rows(PARTIAL, ROWS, ACC, width, INDEXED: tl.constexpr, C: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = column < width
    row = i
    if INDEXED:
        row = tl.load(ROWS + i).to(tl.int64)
    term = tl.load(PARTIAL + i * width + column, mask=inside).to(ACC.dtype.element_ty)
    at = ACC + row * width + column
    tl.store(at, tl.load(at, mask=inside) + term, mask=inside)


def sum_partials(partials: Sequence[Tensor], rows: Sequence[Tensor | None], out: Tensor) -> None:
    """Add node partials into `out` [n, width] in the order given (ascending node), starting from zero.

    partials[j] [n_j, width] holds the rows rows[j] [n_j] (distinct; None: all n rows in order). float64 partials are
    summed in float64 and rounded once to `out`; others are summed in fp32. `combine` with weights None does the same in
    one launch where partials lie side by side.
    """
    exact = any(p.dtype is torch.float64 for p in partials)
    wide = torch.float64 if exact else torch.float32
    acc = torch.zeros(out.shape, dtype=wide, device=out.device)
    width = out.shape[1]
    for partial, index in zip(partials, rows, strict=True):
        if partial.shape[0]:
            grid = (partial.shape[0], triton.cdiv(width, _COLUMNS))
            _add_rows[grid](partial, index, acc, width, index is not None, _COLUMNS)
    out.copy_(acc)
