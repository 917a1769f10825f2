"""Rows into buffers of a captured graph and out of them: kernels on both sides of it, where the driver would copy.

A copy by the driver is three of its calls, and what is launched behind one waits for another engine of the card.
Floor: 2 x bytes moved / copy bandwidth, or the link's where rows lie on another card.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import PROGRAMMATIC, after_predecessor
from kernels.launch import Launcher
from kernels.pack import unit_of, units


@triton.jit
def _copy_row(SOURCE, OUT, row, size, C: tl.constexpr):
    at = tl.arange(0, C)
    value = tl.load(SOURCE + row * size + at, mask=at < size)
    tl.store(OUT + row * size + at, value, mask=at < size)


@triton.jit(do_not_specialize=["n"])
def _stage(
    ROWS, SCALES, OUT, TO_ROWS, TO_SCALES, PLACE, n, size, scale_size, UNIT: tl.constexpr,
    C: tl.constexpr, CS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    _copy_row(units(ROWS, UNIT), units(TO_ROWS, UNIT), row, size, C)
    _copy_row(units(SCALES, UNIT), units(TO_SCALES, UNIT), row, scale_size, CS)
    if row == 0:
        tl.store(PLACE, OUT.to(tl.int64))
        tl.store(PLACE + 1, n)


@triton.jit
def _deliver(STAGED, PLACE, size, C: tl.constexpr):
    after_predecessor()
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(PLACE + 1):
        out = tl.multiple_of(tl.load(PLACE), 16).to(tl.pointer_type(tl.int64))
        _copy_row(units(STAGED, 8), out, row, size, C)


_launch_stage = Launcher(_stage)


def stage(
    rows: Tensor, scales: Tensor, out: Tensor, to_rows: Tensor, to_scales: Tensor, place: Tensor
) -> None:
    """Copy rows [n, width] of bytes and scales fp32 [n, blocks] to the first n of a graph's, and note what `out` is.

    All contiguous; `place` int64 [2] gets the address of `out`, a multiple of 16, and n, for `deliver`. The rows may be
    memory of another process.
    """
    n, row_nbytes = rows.shape[0], rows.shape[1] * rows.element_size()
    scale_nbytes = 4 * scales.shape[1]
    assert out.data_ptr() % 16 == 0, "an output that is not aligned"
    unit = unit_of(row_nbytes, scale_nbytes, rows.data_ptr(), scales.data_ptr())
    size, scale_size = row_nbytes // unit, scale_nbytes // unit

    def describe() -> tuple[tuple[object, ...], dict[str, object]]:
        columns = triton.next_power_of_2(size), triton.next_power_of_2(scale_size)
        return (unit, *columns), {"num_warps": 4}

    _launch_stage(
        (unit, size, scale_size, rows.dtype), (n, 1, 1),
        (rows, scales, out, to_rows, to_scales, place), (n, size, scale_size), describe,
    )  # fmt: skip


def deliver(staged: Tensor, place: Tensor) -> None:
    """Copy the rows that `stage` brought, now outputs [most, width], to where they are wanted.

    A row has a multiple of 16 bytes.
    """
    most, size = staged.shape[0], staged.shape[1] * staged.element_size() // 8
    _deliver[(most,)](
        staged, place, size, triton.next_power_of_2(size), num_warps=4, **PROGRAMMATIC
    )
