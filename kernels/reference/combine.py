"""Weighted sums of expert rows in one fixed order: the answer depends on no arrival order and on no other row.

For each row, acc = 0; for its pairs in ascending expert id: acc = acc + weight * row, product and sum each rounded
once. The sum is in fp32, or in float64 when `out` is float64 (the exact wire: float64 products of fp32 numbers). The
same holds for the sum of node partials, in ascending node order: float64 partials are summed in float64 and rounded
once.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.reference.quant import quantise_rows

OTHER = 1 << 30  # slots from here on are rows of a second source
_CHUNK_ELEMENTS = 1 << 22  # bounds the gathered products to 32 MiB


def slot_table(
    pair_rows: Tensor, pair_slots: Tensor, pair_weights: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Turn (row, expert) pairs, sorted by row and then by ascending expert id, into tables [num_rows, max pairs].

    pair_rows int32, pair_slots int32 (where the pair's expert row lies in the source of `combine`) and pair_weights
    fp32 are [num_pairs]. Returns slots int32 (-1: no such pair) and weights fp32 (0 there).
    """
    rows = pair_rows.long()
    counts = torch.bincount(rows, minlength=num_rows)
    nth = torch.arange(rows.numel(), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    depth = int(counts.max()) if num_rows else 0
    slots = torch.full((num_rows, depth), -1, dtype=torch.int32, device=rows.device)
    weights = torch.zeros((num_rows, depth), device=rows.device)
    slots[rows, nth] = pair_slots.int()
    weights[rows, nth] = pair_weights
    return slots, weights


def combine(
    source: Tensor, slots: Tensor, weights: Tensor | None, out: Tensor, more: Tensor | None = None
) -> None:
    """out[i] = sum over j, ascending, of weights[i, j] * source[slots[i, j]], skipping slots of -1.

    source [m, width] bf16, fp32 or float64; slots [n, k] int32; weights [n, k] fp32, or None for a plain sum;
    out [n, width] bf16, fp32 or float64. A row without pairs becomes zero. In a plain sum a slot of OTHER + i is row i
    of `more`, whose dtype may be another.
    """
    if more is not None and more.shape[0]:  # wider than both: no bit is lost
        slots = torch.where(slots >= OTHER, slots + (source.shape[0] - OTHER), slots)
        source = torch.cat([source, more])
    num_rows, depth = slots.shape
    if source.shape[0] == 0 or depth == 0:
        out.zero_()
        return
    step = max(1, _CHUNK_ELEMENTS // max(1, depth * source.shape[1]))
    is_exact = torch.float64 in (out.dtype, source.dtype)
    if is_exact and torch.bfloat16 not in (out.dtype, source.dtype) and source.device.type == "cpu":
        _combine_on_host(source, slots, weights, out, step)
        return
    wide = torch.float64 if is_exact else torch.float32
    for start in range(0, num_rows, step):
        part = slice(start, start + step)
        chosen = slots[part]
        terms = source.index_select(0, chosen.clamp_min(0).flatten()).to(wide)
        terms = terms.view(*chosen.shape, source.shape[1])
        if weights is not None:
            terms = terms * weights[part].to(wide).unsqueeze(-1)
        absent = chosen < 0
        if bool(absent.any()):  # adding +0 changes no bit: an accumulator is never -0
            terms = terms.masked_fill(absent.unsqueeze(-1), 0.0)
        acc = torch.zeros(terms.shape[0], terms.shape[2], dtype=wide, device=source.device)
        for j in range(depth):
            acc += terms[:, j]
        out[part] = acc


def _combine_on_host(
    source: Tensor, slots: Tensor, weights: Tensor | None, out: Tensor, step: int
) -> None:
    """The exact wire's sum in numpy: the same bits, a call costs a third of torch's."""
    rows, table, sums = (t.numpy() for t in (source, slots, out))
    absent = table < 0
    is_ragged = bool(absent.any())
    for start in range(0, len(table), step):
        part = slice(start, start + step)
        terms = rows.take(table[part], axis=0, mode="clip").astype("f8", copy=False)
        if weights is not None:
            terms *= weights.numpy()[part, :, None]
        if is_ragged:
            terms[absent[part]] = 0.0
        acc = terms[:, 0] + 0.0  # zero plus the first
        for j in range(1, table.shape[1]):
            acc += terms[:, j]
        sums[part] = acc


def combining(
    source: Tensor, slots: Tensor, weights: Tensor | None, out: Tensor, more: Tensor | None = None
) -> Callable[[], object]:
    """See `kernels.combine.combining`."""
    return functools.partial(combine, source, slots, weights, out, more)


def combine_fp8(
    source: Tensor, slots: Tensor, weights: Tensor | None, payload: Tensor, *, rows_offset: int,
    scales_offset: int,
) -> None:  # fmt: skip
    """`combine` with FP8 rows and scales written into `payload` (uint8), as `quantise_rows` lays them out."""
    out = torch.empty(slots.shape[0], source.shape[1], device=source.device)
    combine(source, slots, weights, out)
    quantise_rows(out, payload, rows_offset=rows_offset, scales_offset=scales_offset)


def sum_partials(partials: Sequence[Tensor], rows: Sequence[Tensor | None], out: Tensor) -> None:
    """Add node partials into `out` [n, width] in the order given (ascending node), starting from zero.

    partials[j] [n_j, width] holds the rows rows[j] [n_j] (distinct; None: all n rows in order). float64 partials are
    summed in float64 and rounded once to `out`; others are summed in fp32.
    """
    exact = any(p.dtype is torch.float64 for p in partials)
    wide = torch.float64 if exact else torch.float32
    acc = torch.zeros(out.shape, dtype=wide, device=out.device)
    for partial, index in zip(partials, rows, strict=True):
        if index is None:
            acc += partial.to(wide)
        else:
            acc.index_add_(0, index, partial.to(wide))
    out.copy_(acc)
