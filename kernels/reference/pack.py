"""Gather rows into contiguous send blocks and scatter them back; rows are bytes, whatever their element type.

A row is `row_nbytes` bytes, and for FP8 also `scale_nbytes` bytes of scales kept apart from it (0 for other types).
Offsets are bytes from the start of a uint8 buffer. Indexes are int32 or int64.
"""

import torch
from torch import Tensor


def _rows(buffer: Tensor, offset: int, num_rows: int, row_nbytes: int) -> Tensor:
    return buffer.narrow(0, offset, num_rows * row_nbytes).view(num_rows, row_nbytes)


def _rows_from(buffer: Tensor, offset: int, row_nbytes: int) -> Tensor:
    """All whole rows from `offset` on: the index decides which of them are read."""
    return _rows(buffer, offset, (buffer.numel() - offset) // row_nbytes, row_nbytes)


def pack(
    source: Tensor, out: Tensor, index: Tensor, *, row_nbytes: int, source_offset: int,
    out_offset: int, scale_nbytes: int = 0, source_scales: int = 0, out_scales: int = 0,
) -> None:  # fmt: skip
    """Gather: row i of the block at `out_offset` becomes row index[i] of `source`; FP8 scales likewise.

    Raises IndexError or RuntimeError when a row lies outside its buffer.
    """
    n = index.numel()
    parts = [(row_nbytes, source_offset, out_offset), (scale_nbytes, source_scales, out_scales)]
    for nbytes, start, out_start in parts[: 2 if scale_nbytes else 1]:
        rows = _rows_from(source, start, nbytes)
        torch.index_select(rows, 0, index, out=_rows(out, out_start, n, nbytes))


def unpack(
    source: Tensor, out: Tensor, index: Tensor, *, row_nbytes: int, source_offset: int,
    out_offset: int, scale_nbytes: int = 0, source_scales: int = 0, out_scales: int = 0,
) -> None:  # fmt: skip
    """Scatter, the reverse of `pack`: row index[i] at `out_offset` becomes row i of the block in `source`.

    Indexes must be distinct. Raises IndexError or RuntimeError when a row lies outside its buffer.
    """
    n = index.numel()
    parts = [(row_nbytes, source_offset, out_offset), (scale_nbytes, source_scales, out_scales)]
    for nbytes, start, out_start in parts[: 2 if scale_nbytes else 1]:
        rows = _rows(source, start, n, nbytes)
        _rows_from(out, out_start, nbytes).index_copy_(0, index.long(), rows)


def route(experts: Tensor, destinations: Tensor, num_destinations: int) -> tuple[Tensor, Tensor]:
    """Which rows go to which destination (a node or an expert); a row goes to a destination at most once.

    experts [n, top_k] int32, destinations [num_experts] int32 maps an expert to its destination (-1: none).
    Returns rows [num_destinations, n] int32, ascending, padded with -1, and counts [num_destinations] int32.
    """
    n = experts.shape[0]
    wanted = destinations[experts.long()]  # [n, top_k]
    ids = torch.arange(num_destinations, device=experts.device, dtype=wanted.dtype)
    hit = (wanted.unsqueeze(0) == ids.view(-1, 1, 1)).any(-1)  # [num_destinations, n]
    counts = hit.sum(1, dtype=torch.int32)
    place = torch.where(hit, hit.cumsum(1) - 1, n)  # rows not wanted go to a spare column
    rows = torch.full((num_destinations, n + 1), -1, dtype=torch.int32, device=experts.device)
    numbers = torch.arange(n, dtype=torch.int32, device=experts.device).expand_as(place)
    rows.scatter_(1, place, numbers)
    return rows[:, :n].contiguous(), counts


def pack_blocks(
    source: Tensor, out: Tensor, rows: Tensor, counts: Tensor, *, row_nbytes: int,
    source_offset: int, block_nbytes: int, scale_nbytes: int = 0, source_scales: int = 0,
    align: int = 16,
) -> None:  # fmt: skip
    """Gather the rows of every destination, as `route` returned them, into one block each.

    Block d starts at byte d * block_nbytes of `out`: counts[d] rows, then (FP8) their scales from the next multiple
    of `align` bytes. Raises RuntimeError when a block does not fit.
    """
    for d, count in enumerate(counts.tolist()):
        start = d * block_nbytes
        scales = -(-count * row_nbytes // align) * align
        if scales + count * scale_nbytes > block_nbytes:
            raise RuntimeError(f"{count} rows do not fit a block of {block_nbytes} bytes")
        pack(
            source,
            out,
            rows[d, :count],
            row_nbytes=row_nbytes,
            source_offset=source_offset,
            out_offset=start,
            scale_nbytes=scale_nbytes,
            source_scales=source_scales,
            out_scales=start + scales,
        )


def gather_pieces(
    source: Tensor, out: Tensor, tables: Tensor, rest: Tensor | None = None, *, index_offset: int,
    pieces_offset: int, num_pieces: int, max_rows: int, row_nbytes: int, source_offset: int,
    scale_nbytes: int = 0, source_scales: int = 0, rest_from: int = 0, rest_at: int = 0,
    rest_nbytes: int = 0,
) -> None:  # fmt: skip
    """Gather rows into several blocks of one buffer: `pack` for each of the pieces, whose numbers lie on the device.

    In `tables` (uint8) are, from these byte offsets on, index int32 and pieces int64 [num_pieces, 4]: first place in
    `index`, number of rows (at most `max_rows`), byte offset of the rows in `out`, byte offset of their scales. Offsets
    are multiples of 16. `rest_nbytes` of the tables, from `rest_from` on, go to byte `rest_at` of `rest`.
    """
    if rest is not None:
        rest[rest_at : rest_at + rest_nbytes] = tables[rest_from : rest_from + rest_nbytes]
    pieces = tables[pieces_offset : pieces_offset + num_pieces * 32].view(torch.int64).view(-1, 4)
    index = tables[index_offset : tables.numel() // 4 * 4].view(torch.int32)
    for start, count, rows_at, scales_at in pieces.tolist():
        pack(
            source,
            out,
            index[start : start + count],
            row_nbytes=row_nbytes,
            source_offset=source_offset,
            out_offset=rows_at,
            scale_nbytes=scale_nbytes,
            source_scales=source_scales,
            out_scales=scales_at,
        )
