"""Gather rows into send blocks and scatter them back on the GPU: one program copies one or two rows and their scales.

Rows are copied as the widest integers that all sizes and offsets allow. Floor: 2 x bytes moved / copy bandwidth.
An index outside its buffer is the caller's error: it is not checked on the device.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent import PROGRAMMATIC, after_predecessor
from kernels.launch import Launcher
from kernels.reference.pack import route as route_reference

_REST_STEP = 256  # numbers of tables that a program copies at once
_STEP = tl.constexpr(_REST_STEP)
_UNITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@triton.jit
def _move(SOURCE, OUT, source_row, out_row, ok, size, C: tl.constexpr):
    """Copy rows of `size` elements, [R] of them; all loads of a step are in flight together."""
    STEP: tl.constexpr = min(C, 2048)
    for start in tl.static_range(0, C, STEP):
        at = start + tl.arange(0, STEP)[None, :]
        inside = ok[:, None] & (at < size)
        value = tl.load(SOURCE + source_row[:, None] * size + at, mask=inside)
        tl.store(OUT + out_row[:, None] * size + at, value, mask=inside)


@triton.jit
def _copy_rows(
    SOURCE, OUT, SOURCE_SCALES, OUT_SCALES, INDEX, n, size, scale_size, SCATTER: tl.constexpr,
    SCALED: tl.constexpr, C: tl.constexpr, CS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    after_predecessor()
    i = tl.program_id(0) * R + tl.arange(0, R)
    ok = i < n
    j = tl.load(INDEX + i, mask=ok, other=0).to(tl.int64)
    source_row, out_row = j, i.to(tl.int64)
    if SCATTER:
        source_row, out_row = i.to(tl.int64), j
    _move(SOURCE, OUT, source_row, out_row, ok, size, C)
    if SCALED:
        _move(SOURCE_SCALES, OUT_SCALES, source_row, out_row, ok, scale_size, CS)


@triton.jit
def _copy_blocks(
    SOURCE, OUT, SOURCE_SCALES, ROWS, COUNTS, n, size, scale_size, block_size, align,
    SCALED: tl.constexpr, C: tl.constexpr, CS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) + tl.arange(0, 1)
    d = tl.program_id(1)
    count = tl.load(COUNTS + d)
    if tl.program_id(0) < count:
        j = tl.load(ROWS + d * n + i).to(tl.int64)
        block = OUT + d.to(tl.int64) * block_size
        _move(SOURCE, block, j, i.to(tl.int64), i < count, size, C)
        if SCALED:
            scales = tl.cdiv(count * size, align) * align
            _move(SOURCE_SCALES, block + scales, j, i.to(tl.int64), i < count, scale_size, CS)


def unit_of(*sizes: int) -> int:
    """The widest integer, in bytes, that divides every size and offset."""
    return math.gcd(8, *sizes)


def _view(buffer: Tensor, offset: int, unit: int) -> Tensor:
    """The rest of a buffer from `offset` on, as integers of `unit` bytes."""
    usable = (buffer.numel() - offset) // unit * unit
    return buffer.narrow(0, offset, usable).view(_UNITS[unit])


def _check_room(buffer: Tensor, offset: int, num_rows: int, row_nbytes: int) -> None:
    if offset + num_rows * row_nbytes > buffer.numel():
        raise RuntimeError(
            f"{num_rows} rows of {row_nbytes} bytes at {offset} do not fit {buffer.numel()} bytes"
        )


def _pack(
    source: Tensor, out: Tensor, index: Tensor, rows: tuple[int, int, int],
    scales: tuple[int, int, int], *, scatter: bool,
) -> None:  # fmt: skip
    """Copy `rows` and `scales`, each (bytes of a row, source offset, out offset), by `index`."""
    n = index.numel()
    if n == 0:
        return
    for nbytes, source_offset, out_offset in (rows, scales):
        block = (source, source_offset) if scatter else (out, out_offset)
        _check_room(block[0], block[1], n, nbytes)
    unit = unit_of(*rows, *scales, source.data_ptr(), out.data_ptr())
    size, scale_size = rows[0] // unit, scales[0] // unit
    together = 2 if n >= 1024 else 1
    _copy_rows[(triton.cdiv(n, together),)](
        _view(source, rows[1], unit), _view(out, rows[2], unit),
        _view(source, scales[1], unit), _view(out, scales[2], unit), index, n, size, scale_size,
        scatter, scale_size > 0, triton.next_power_of_2(size),
        triton.next_power_of_2(max(1, scale_size)), together, num_warps=4, **PROGRAMMATIC,
    )  # fmt: skip


def pack(
    source: Tensor, out: Tensor, index: Tensor, *, row_nbytes: int, source_offset: int,
    out_offset: int, scale_nbytes: int = 0, source_scales: int = 0, out_scales: int = 0,
) -> None:  # fmt: skip
    """Gather: row i of the block at `out_offset` becomes row index[i] of `source`; FP8 scales likewise.

    Raises RuntimeError when the block does not fit `out`.
    """
    rows = (row_nbytes, source_offset, out_offset)
    scales = (scale_nbytes, source_scales, out_scales)
    _pack(source, out, index, rows, scales, scatter=False)


def unpack(
    source: Tensor, out: Tensor, index: Tensor, *, row_nbytes: int, source_offset: int,
    out_offset: int, scale_nbytes: int = 0, source_scales: int = 0, out_scales: int = 0,
) -> None:  # fmt: skip
    """Scatter, the reverse of `pack`: row index[i] at `out_offset` becomes row i of the block in `source`.

    Indexes must be distinct. Raises RuntimeError when the block does not lie in `source`.
    """
    rows = (row_nbytes, source_offset, out_offset)
    scales = (scale_nbytes, source_scales, out_scales)
    _pack(source, out, index, rows, scales, scatter=True)


@triton.jit
def _route(EXPERTS, DESTINATIONS, ROWS, COUNTS, n, K: tl.constexpr, R: tl.constexpr):
    d = tl.program_id(0)
    count = 0
    for start in range(0, n, R):
        row = start + tl.arange(0, R)
        wanted = tl.zeros((R,), tl.int32)
        for k in tl.static_range(K):
            expert = tl.load(EXPERTS + row * K + k, mask=row < n, other=0)
            there = tl.load(DESTINATIONS + expert, mask=row < n, other=-1)
            wanted = wanted | (there == d).to(tl.int32)
        place = count + tl.cumsum(wanted, 0) - wanted
        tl.store(ROWS + d * n + place, row, mask=wanted != 0)
        count += tl.sum(wanted, 0)
    tl.store(COUNTS + d, count)
    for start in range(0, n, R):
        rest = start + tl.arange(0, R)
        tl.store(ROWS + d * n + rest, -1, mask=(rest >= count) & (rest < n))


def route(experts: Tensor, destinations: Tensor, num_destinations: int) -> tuple[Tensor, Tensor]:
    """Which rows go to which destination (a node or an expert); a row goes to a destination at most once.

    experts [n, top_k] int32, destinations [num_experts] int32 maps an expert to its destination (-1: none).
    Returns rows [num_destinations, n] int32, ascending, padded with -1, and counts [num_destinations] int32.
    """
    n, top_k = experts.shape
    if n == 0:
        return route_reference(experts, destinations, num_destinations)
    rows = torch.empty(num_destinations, n, dtype=torch.int32, device=experts.device)
    counts = torch.empty(num_destinations, dtype=torch.int32, device=experts.device)
    block = min(1024, triton.next_power_of_2(n))
    _route[(num_destinations,)](experts, destinations, rows, counts, n, top_k, block)
    return rows, counts


def pack_blocks(
    source: Tensor, out: Tensor, rows: Tensor, counts: Tensor, *, row_nbytes: int,
    source_offset: int, block_nbytes: int, scale_nbytes: int = 0, source_scales: int = 0,
    align: int = 16,
) -> None:  # fmt: skip
    """Gather the rows of every destination, as `route` returned them, into one block each, in one launch.

    Block d starts at byte d * block_nbytes of `out`: counts[d] rows, then (FP8) their scales from the next multiple
    of `align` bytes. Raises RuntimeError when a block could not hold all n rows: counts stay on the device.
    """
    num_destinations, n = rows.shape
    worst = -(-n * row_nbytes // align) * align + n * scale_nbytes
    if worst > block_nbytes or num_destinations * block_nbytes > out.numel():
        raise RuntimeError(f"{n} rows do not fit a block of {block_nbytes} bytes")
    if n == 0:
        return
    unit = unit_of(
        row_nbytes, source_offset, block_nbytes, scale_nbytes, source_scales, align,
        source.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    size, scale_size = row_nbytes // unit, scale_nbytes // unit
    _copy_blocks[(n, num_destinations)](
        _view(source, source_offset, unit), _view(out, 0, unit),
        _view(source, source_scales, unit), rows, counts, n, size, scale_size,
        block_nbytes // unit, align // unit, scale_size > 0, triton.next_power_of_2(size),
        triton.next_power_of_2(max(1, scale_size)), num_warps=4,
    )  # fmt: skip


@triton.jit
def units(BYTES, UNIT: tl.constexpr):
    """Memory as integers of UNIT bytes."""
    typed = BYTES.to(tl.pointer_type(tl.uint8))
    if UNIT == 8:
        typed = BYTES.to(tl.pointer_type(tl.int64))
    elif UNIT == 4:
        typed = BYTES.to(tl.pointer_type(tl.int32))
    elif UNIT == 2:
        typed = BYTES.to(tl.pointer_type(tl.int16))
    return typed


@triton.jit(do_not_specialize=["index_at", "pieces_at", "rest_from", "rest_at", "rest_size"])
def _copy_pieces(
    SOURCE, OUT, TABLES, REST, index_at, pieces_at, rest_from, rest_at, rest_size, first, first_scales,
    size, scale_size, UNIT: tl.constexpr, SCALED: tl.constexpr, C: tl.constexpr, CS: tl.constexpr,
):  # fmt: skip
    SOURCE = units(SOURCE, UNIT)
    OUT = units(OUT, UNIT)
    i = tl.program_id(0)
    if tl.program_id(1) == tl.num_programs(1) - 1:  # behind the pieces: the rest of the tables
        for start in range(i * _STEP, rest_size, tl.num_programs(0) * _STEP):
            at = start + tl.arange(0, _STEP)
            inside = at < rest_size
            value = tl.load(units(TABLES + rest_from, 4) + at, mask=inside)
            tl.store(units(REST + rest_at, 4) + at, value, mask=inside)
    else:
        piece = units(TABLES + pieces_at, 8) + tl.program_id(1) * 4
        if i < tl.load(piece + 1):
            j = tl.load(units(TABLES + index_at, 4) + tl.load(piece) + i).to(tl.int64)
            one = tl.zeros((1,), tl.int64)
            ok = one == 0
            out = OUT + tl.multiple_of(tl.load(piece + 2) // UNIT, 16 // UNIT)
            _move(SOURCE + first, out, one + j, one + i, ok, size, C)
            if SCALED:
                scales = OUT + tl.multiple_of(tl.load(piece + 3) // UNIT, 16 // UNIT)
                _move(SOURCE + first_scales, scales, one + j, one + i, ok, scale_size, CS)


_launch_pieces = Launcher(_copy_pieces)


def gather_pieces(
    source: Tensor, out: Tensor, tables: Tensor, rest: Tensor | None = None, *, index_offset: int,
    pieces_offset: int, num_pieces: int, max_rows: int, row_nbytes: int, source_offset: int,
    scale_nbytes: int = 0, source_scales: int = 0, rest_from: int = 0, rest_at: int = 0,
    rest_nbytes: int = 0,
) -> None:  # fmt: skip
    """Gather rows into several blocks of one buffer, in one launch.

    In `tables` (uint8) are, from these byte offsets on, index int32 and pieces int64 [num_pieces, 4]: first place in
    `index`, number of rows (at most `max_rows`), byte offset of the rows in `out`, byte offset of their scales. Offsets
    are multiples of 16. Pieces are not checked: the device reads them. `tables` may be pinned host memory, which
    kernels read over PCIe sooner than a driver copies it. `rest_nbytes` of it, from `rest_from` on, go to byte
    `rest_at` of `rest`, for kernels that read them often; all three are multiples of 4.
    """
    unit = unit_of(
        row_nbytes, source_offset, scale_nbytes, source_scales, source.data_ptr(), out.data_ptr()
    )
    size, scale_size = row_nbytes // unit, scale_nbytes // unit
    first, first_scales, rest_size = source_offset // unit, source_scales // unit, rest_nbytes // 4

    def describe() -> tuple[tuple[object, ...], dict[str, object]]:
        columns = triton.next_power_of_2(size), triton.next_power_of_2(max(1, scale_size))
        return (unit, scale_size > 0, *columns), {"num_warps": 4}

    _launch_pieces(
        (unit, size, scale_size, *[n if n == 1 else n & 15 == 0 for n in (first, first_scales)]),
        (max(max_rows, -(-rest_size // _REST_STEP), 1), num_pieces + 1, 1),
        (source, out, tables, tables if rest is None else rest),
        (index_offset, pieces_offset, rest_from, rest_at, rest_size, first, first_scales, size, scale_size),
        describe,
    )  # fmt: skip
