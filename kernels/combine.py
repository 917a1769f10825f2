"""Weighted sums of expert rows in one fixed order on the GPU: one program per row and 1024 columns.

All k loads of a program are in flight together; the sum runs in ascending k. Fused multiply-add is off, so that the
bits are those of the reference: product and sum are rounded apart. Floor: (k rows in + 1 row out) / copy bandwidth.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import PROGRAMMATIC, after_predecessor
from kernels.launch import launch
from kernels.reference.combine import OTHER

_COLUMNS = 1024
_SPLIT_ROWS = 512  # below, programs of more threads fill the card
_OTHER = tl.constexpr(OTHER)


@triton.jit
def _combine(
    SOURCE, SLOTS, WEIGHTS, MORE, OUT, width, K: tl.constexpr,
    WEIGHTED: tl.constexpr, TWO: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    after_predecessor()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = column < width
    acc = tl.zeros((C,), WIDE)
    for k in tl.static_range(K):
        slot = tl.load(SLOTS + row * K + k)
        # An absent row is read as zeros: adding +0 changes no bit of an accumulator that is never -0.
        slots = tl.zeros((C,), tl.int32) + slot
        here = inside & (slots >= 0)
        if TWO:
            more = inside & (slots >= _OTHER)
            here = here & (slots < _OTHER)
        at = SOURCE + slot.to(tl.int64) * width + column
        term = tl.load(at, mask=here, other=0.0).to(WIDE)
        if TWO:
            at = MORE + (slot - _OTHER).to(tl.int64) * width + column
            term += tl.load(at, mask=more, other=0.0).to(WIDE)  # one of the two is zero
        if WEIGHTED:
            weight = tl.load(WEIGHTS + row * K + k).to(WIDE)
            term = tl.where(here, term * weight, 0.0)
        acc += term
    tl.store(OUT + row * width + column, acc, mask=inside)


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
    assert more is None or weights is None, "two sources are for plain sums"
    n, depth = slots.shape
    width = source.shape[1]
    if n == 0:
        return
    exact = any(t is not None and t.dtype is torch.float64 for t in (out, source, more))
    launch(
        _combine, (n, triton.cdiv(width, _COLUMNS), 1),
        (source, slots, slots if weights is None else weights, source if more is None else more, out), (width,),
        (depth, weights is not None, more is not None, tl.float64 if exact else tl.float32, _COLUMNS),
        num_warps=_warps(n), enable_fp_fusion=False, **PROGRAMMATIC,
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
