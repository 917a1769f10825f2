"""What passes between a captured graph and the outside: kernels, where the driver would copy or record an event.

A copy by the driver is three of its calls, and what is launched behind one waits for another engine of the card.
Floor: 2 x bytes moved / copy bandwidth, or the link's where rows lie on another card.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import PROGRAMMATIC, after_predecessor
from kernels.pack import unit_of, units

_COLUMNS = 1024
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_RELEASE = tl.constexpr(
    "{ .reg .pred p; mov.u32 $0, %tid.x; setp.eq.u32 p, $0, 0; @p st.release.sys.global.u64 [$1], $2; }"
)


@triton.jit
def _copy_row(SOURCE, row, OUT, to, size, C: tl.constexpr):
    at = tl.arange(0, C)
    value = tl.load(SOURCE + row * size + at, mask=at < size)
    tl.store(OUT + to * size + at, value, mask=at < size)


@triton.jit
def _stage(
    TO_ROWS, TO_SCALES, PLACES, CALLS, COUNT, stride, size, scale_size, out_nbytes, TURNS: tl.constexpr,
    MOST: tl.constexpr, UNIT: tl.constexpr, SCALE_UNIT: tl.constexpr, C: tl.constexpr, CS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    turn = CALLS + tl.load(COUNT) % TURNS * stride
    # of most turns this is the only call: nothing here waits for anything else that is read over PCIe
    num, end, first = tl.load(turn), tl.load(turn + 1), i * 0
    rows, scales, out, picks = (
        tl.load(turn + 2),
        tl.load(turn + 3),
        tl.load(turn + 4),
        tl.load(turn + 5),
    )
    if (num > 1) & (i >= end):
        call = tl.arange(0, MOST)
        ends = tl.load(turn + 1 + call * 5, mask=call < num, other=1 << 62)
        first = tl.max(tl.where(ends <= i, ends, 0))
        at = turn + 1 + tl.minimum(tl.sum((ends <= i).to(tl.int64)), num - 1) * 5
        end, rows, scales = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        out, picks = tl.load(at + 3), tl.load(at + 4)
    if i < end:
        source = i - first
        if picks != 0:
            source = tl.load(picks.to(tl.pointer_type(tl.int32)) + source).to(tl.int64)
        _copy_row(units(tl.multiple_of(rows, 16), UNIT), source, units(TO_ROWS, UNIT), i, size, C)
        _copy_row(
            units(scales, SCALE_UNIT), source, units(TO_SCALES, SCALE_UNIT), i, scale_size, CS
        )
        tl.store(PLACES + 1 + i, out + (i - first) * out_nbytes)
    if i == 0:
        tl.store(PLACES, tl.load(turn + 1 + (num - 1) * 5))


@triton.jit
def _deliver(STAGED, PLACES, size, C: tl.constexpr):
    after_predecessor()
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(PLACES):
        out = tl.multiple_of(tl.load(PLACES + 1 + row), 16).to(tl.pointer_type(tl.int64))
        _copy_row(units(STAGED, 8), row, out, 0, size, C)


@triton.jit
def _add_placed(H, PLACE, SHARED, width, HAS_SHARED: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    if row < tl.load(PLACE + 1):
        kind = H.dtype.element_ty
        placed = tl.multiple_of(tl.load(PLACE), 16).to(tl.pointer_type(kind))
        at, inside = row * width + column, column < width
        term = tl.load(placed + at, mask=inside).to(tl.float32)
        if HAS_SHARED:
            term += tl.load(SHARED + at, mask=inside).to(tl.float32)
        total = tl.load(H + at, mask=inside).to(tl.float32) + term.to(kind).to(tl.float32)
        tl.store(H + at, total, mask=inside)


def stage(
    to_rows: Tensor,
    to_scales: Tensor,
    places: Tensor,
    calls: Tensor,
    count: Tensor,
    out_nbytes: int,
) -> None:
    """Copy the rows of calls, one call behind the other, to a graph's, and note where the output of each is wanted.

    to_rows [most, width] of bytes and to_scales fp32 [most, blocks]; `places` int64 [1 + most] gets the number of rows
    and the address of each one's output (`out_nbytes` long), for `deliver` and `expert_ffn_placed`. `calls` int64
    [turns, 1 + 5 * most], which may be pinned, says in row count % turns how many there are (one at least), and of
    each: its end among the rows to stage; the addresses of its rows, a multiple of 16, and of its scales, contiguous,
    which may be memory of another process; that of its outputs, a multiple of 16; that of numbers int32, which of the
    rows are meant in which order, or 0. `count` int64 [1], see `tell`.
    """
    most, row_nbytes = to_rows.shape[0], to_rows.shape[1] * to_rows.element_size()
    scale_nbytes, turns = 4 * to_scales.shape[1], calls.shape[0]
    unit, scale_unit = unit_of(row_nbytes), unit_of(scale_nbytes)
    size, scale_size = row_nbytes // unit, scale_nbytes // scale_unit
    columns = triton.next_power_of_2(size), triton.next_power_of_2(scale_size)
    _stage[(most,)](
        to_rows, to_scales, places, calls, count, calls.shape[1], size, scale_size, out_nbytes,
        turns, triton.next_power_of_2(most), unit, scale_unit, *columns, num_warps=4,
    )  # fmt: skip


def tell(count: Tensor, told: Tensor) -> None:
    """Count a turn, int64 [1], and tell the number in `told`, which may be pinned, behind all that was written."""
    _tell[(1,)](count, told, num_warps=1, **PROGRAMMATIC)


def add_placed(h: Tensor, place: Tensor, shared: Tensor | None) -> None:
    """h += rows + shared, or h += rows: for the rows, of h's dtype and width, of which `place` has address and number.

    `place` int64 [2] may be pinned host memory; the address is a multiple of 16. Each sum is rounded, as torch does.
    """
    width = h.shape[1]
    _add_placed[(h.shape[0], triton.cdiv(width, _COLUMNS))](
        h, place, h if shared is None else shared, width, shared is not None, _COLUMNS, num_warps=4
    )


def deliver(staged: Tensor, places: Tensor) -> None:
    """Copy the rows that `stage` brought, now outputs [most, width], each to where it is wanted.

    A row has a multiple of 16 bytes.
    """
    most, size = staged.shape[0], staged.shape[1] * staged.element_size() // 8
    _deliver[(most,)](
        staged, places, size, triton.next_power_of_2(size), num_warps=4, **PROGRAMMATIC
    )


@triton.jit
def _count(COUNT, TOLD):
    number = tl.load(COUNT) + 1
    tl.debug_barrier()  # these stores, and those of kernels that have ended, come before the release
    tl.store(COUNT, number)
    if _INTERPRETED:
        tl.store(TOLD, number)
    else:
        tl.inline_asm_elementwise(
            _RELEASE, "=r,l,l", [TOLD, number], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _tell(COUNT, TOLD):
    after_predecessor()
    _count(COUNT, TOLD)


@triton.jit
def _publish(IDS, WEIGHTS, TO_IDS, TO_WEIGHTS, COUNT, TOLD, num, C: tl.constexpr):
    for start in range(0, num, C):
        i = start + tl.arange(0, C)
        tl.store(TO_IDS + i, tl.load(IDS + i, mask=i < num), mask=i < num)
        tl.store(TO_WEIGHTS + i, tl.load(WEIGHTS + i, mask=i < num), mask=i < num)
    _count(COUNT, TOLD)


def publish(
    ids: Tensor, weights: Tensor, to_ids: Tensor, to_weights: Tensor, count: Tensor, told: Tensor
) -> None:
    """Copy ids and weights to pinned memory, count a step, int64 [1], and then tell the number there, in `told`.

    A kernel, since a graph with copies to the host takes 8.3 us to launch, one of 100 kernels 5.2 (H100, 2026-11-26).
    """
    _publish[(1,)](ids, weights, to_ids, to_weights, count, told, ids.numel(), 1024, num_warps=8)
