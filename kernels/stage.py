"""What passes between a captured graph and the outside: kernels, where the driver would copy or record an event.

A copy by the driver is three of its calls, and what is launched behind one waits for another engine of the card.
Floor: 2 x bytes moved / copy bandwidth, or the link's where rows lie on another card.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import PROGRAMMATIC, after_predecessor
from kernels.launch import Launcher
from kernels.pack import unit_of, units
from kernels.reference.stage import Picks

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


@triton.jit(do_not_specialize=["n", "first", "picks_at"])
def _stage(
    ROWS, SCALES, OUT, TO_ROWS, TO_SCALES, PLACES, PICKS, n, first, picks_at, size, scale_size, out_nbytes,
    UNIT: tl.constexpr, PICKED: tl.constexpr, C: tl.constexpr, CS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = row
    if PICKED:
        source = tl.load(units(PICKS + picks_at, 4) + row).to(tl.int64)
    to = first + row
    _copy_row(units(ROWS, UNIT), source, units(TO_ROWS, UNIT), to, size, C)
    _copy_row(units(SCALES, UNIT), source, units(TO_SCALES, UNIT), to, scale_size, CS)
    tl.store(PLACES + 1 + to, OUT.to(tl.int64) + row * out_nbytes)
    if row == 0:
        tl.store(PLACES, first + n)


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


_launch_stage = Launcher(_stage)


def stage(
    rows: Tensor, scales: Tensor, out: Tensor, to_rows: Tensor, to_scales: Tensor, places: Tensor,
    first: int = 0, picks: Picks | None = None,
) -> None:  # fmt: skip
    """Copy rows [n, width] of bytes and scales fp32 [n, blocks] to a graph's, from row `first` on, and note `out`.

    All contiguous; `places` int64 [1 + most] gets the number of rows so far and the address of each one's output, a
    multiple of 16, for `deliver`. The rows may be memory of another process. `picks`: only those rows, in that order.
    """
    n, row_nbytes = rows.shape[0], rows.shape[1] * rows.element_size()
    memory, picks_at = places, 0
    if picks is not None:
        memory, picks_at, n = picks
    scale_nbytes, out_nbytes = 4 * scales.shape[1], out.shape[1] * out.element_size()
    assert out.data_ptr() % 16 == out_nbytes % 16 == 0, "outputs that are not aligned"
    unit = unit_of(row_nbytes, scale_nbytes, rows.data_ptr(), scales.data_ptr())
    size, scale_size = row_nbytes // unit, scale_nbytes // unit

    def describe() -> tuple[tuple[object, ...], dict[str, object]]:
        columns = triton.next_power_of_2(size), triton.next_power_of_2(scale_size)
        return (unit, picks is not None, *columns), {"num_warps": 4}

    _launch_stage(
        (unit, picks is not None, size, scale_size, rows.dtype, out.dtype), (n, 1, 1),
        (rows, scales, out, to_rows, to_scales, places, memory),
        (n, first, picks_at, size, scale_size, out_nbytes), describe,
    )  # fmt: skip


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
def _publish(IDS, WEIGHTS, TO_IDS, TO_WEIGHTS, COUNT, TOLD, num, C: tl.constexpr):
    for start in range(0, num, C):
        i = start + tl.arange(0, C)
        tl.store(TO_IDS + i, tl.load(IDS + i, mask=i < num), mask=i < num)
        tl.store(TO_WEIGHTS + i, tl.load(WEIGHTS + i, mask=i < num), mask=i < num)
    number = tl.load(COUNT) + 1
    tl.debug_barrier()  # these stores, and those of kernels that have ended, come before the release
    tl.store(COUNT, number)
    if _INTERPRETED:
        tl.store(TOLD, number)
    else:
        tl.inline_asm_elementwise(
            _RELEASE, "=r,l,l", [TOLD, number], dtype=tl.int32, is_pure=False, pack=1
        )


def publish(
    ids: Tensor, weights: Tensor, to_ids: Tensor, to_weights: Tensor, count: Tensor, told: Tensor
) -> None:
    """Copy ids and weights to pinned memory, count a step, int64 [1], and then tell the number there, in `told`.

    A kernel, since a graph with copies to the host takes 8.3 us to launch, one of 100 kernels 5.2 (H100, 2026-11-26).
    """
    _publish[(1,)](ids, weights, to_ids, to_weights, count, told, ids.numel(), 1024, num_warps=8)
