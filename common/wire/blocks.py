"""Layouts of the payloads: where rows, scales, expert ids and weights lie in one contiguous buffer. Pure arithmetic.

A *row segment* holds `num_rows` rows of `width` elements in a row type. For FP8 the e4m3 bytes come first, then one
fp32 scale per 1x128 block of columns (the last block may be short), starting at the next multiple of 16 bytes. Every
payload begins with its row segment, which alone lies in device memory where rows do; the tables stay in host memory.
There a DISPATCH is sent from where it was written, maybe with room for more rows between its rows and their scales.

    DISPATCH   rows | expert ids int32 [num_rows, top_k] | gate weights fp32 [num_rows, top_k]
    RELAY      rows | pairs: row index int32 [num_pairs] | expert ids int32 [num_pairs] | weights fp32 [num_pairs]
               (pairs sorted by row, then ascending expert id)
    EXPERT_IN  rows, sorted by expert | segments int32 [num_pairs, 2]: (expert id, number of its rows), ascending
    EXPERT_PICK rows of a whole DISPATCH or RELAY | segments, as above | int32 [1 + num_rows]: how many rows that has,
               and which of them are asked about, in the order of an EXPERT_IN
    EXPERT_OUT rows in the order of the EXPERT_IN (bf16; fp32 on the fp32 wire)
    PARTIAL    rows (bf16; float64 on the fp32 wire)
    COMBINED   rows in the compute dtype of the device; one rail of several answers the rows that it knows of (float64
               on the fp32 wire) | their indices in the DISPATCH int32 [num_pairs], ascending
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache

from common.errors import WireError
from common.wire.header import Wire

SCALE_BLOCK = 128
SECTION = 16  # every section of a payload begins at a multiple of it


class RowType(IntEnum):
    """Element type of a row segment; the value is the element's size in bytes, with FP8 apart."""

    FP8 = 1
    BF16 = 2
    FP32 = 4
    FP64 = 8


DISPATCH_ROWS = {Wire.FP8: RowType.FP8, Wire.BF16: RowType.BF16, Wire.FP32: RowType.FP32}
EXPERT_OUT_ROWS = {Wire.FP8: RowType.BF16, Wire.BF16: RowType.BF16, Wire.FP32: RowType.FP32}
# float64 because regrouping fp32 terms by node changes the last bit of more than half of the results
PARTIAL_ROWS = {Wire.FP8: RowType.BF16, Wire.BF16: RowType.BF16, Wire.FP32: RowType.FP64}


def combined_rows(wire: Wire, device: str) -> RowType:
    """Row type of COMBINED: the compute dtype of the attention workers' device."""
    return RowType.FP32 if device == "cpu" or wire is Wire.FP32 else RowType.BF16


def align(offset: int) -> int:
    """The next multiple of 16 at or after `offset`, so that every section can be viewed with its own dtype."""
    return -(-offset // SECTION) * SECTION


def num_scales(width: int) -> int:
    """Scales per FP8 row of `width` columns."""
    return -(-width // SCALE_BLOCK)


@dataclass(frozen=True, slots=True)
class RowSegment:
    """Where a row segment lies in a payload; all offsets and sizes in bytes from the payload's start."""

    num_rows: int
    width: int
    row_type: RowType
    rows_offset: int
    scales_offset: int  # equal to `end` unless FP8
    end: int


@lru_cache(maxsize=4096)
def row_segment(num_rows: int, width: int, row_type: RowType, offset: int = 0) -> RowSegment:
    """Lay out `num_rows` rows of `width` elements from `offset` on."""
    rows_end = align(offset + num_rows * width * int(row_type))
    if row_type is not RowType.FP8:
        return RowSegment(num_rows, width, row_type, offset, rows_end, rows_end)
    scales_end = align(rows_end + num_rows * num_scales(width) * 4)
    return RowSegment(num_rows, width, row_type, offset, rows_end, scales_end)


@lru_cache(maxsize=4096)
def wider_segment(segment: RowSegment, nbytes: int) -> RowSegment:
    """The same FP8 rows in a segment of `nbytes`, whose scales are at its end: written for more rows than are sent.

    Raises WireError when they do not fit, or nothing would be aligned.
    """
    scales = segment.end - segment.scales_offset
    if nbytes < segment.end or nbytes % SECTION or segment.row_type is not RowType.FP8:
        raise WireError(f"{nbytes} bytes for {segment.num_rows} rows that take {segment.end}")
    return replace(segment, scales_offset=nbytes - scales, end=nbytes)


@dataclass(frozen=True, slots=True)
class DispatchLayout:
    """DISPATCH payload: `experts` and `weights` are byte offsets of [num_rows, top_k] arrays (int32, fp32)."""

    rows: RowSegment
    experts: int
    weights: int
    nbytes: int


@lru_cache(maxsize=4096)
def dispatch_layout(num_rows: int, width: int, top_k: int, wire: Wire) -> DispatchLayout:
    """Lay out a DISPATCH payload."""
    rows = row_segment(num_rows, width, DISPATCH_ROWS[wire])
    weights = align(rows.end + num_rows * top_k * 4)
    return DispatchLayout(rows, rows.end, weights, align(weights + num_rows * top_k * 4))


@dataclass(frozen=True, slots=True)
class RelayLayout:
    """RELAY payload: `pair_rows`, `experts`, `weights` are byte offsets of [num_pairs] arrays (int32, int32, fp32)."""

    rows: RowSegment
    pair_rows: int
    experts: int
    weights: int
    nbytes: int


@lru_cache(maxsize=4096)
def relay_layout(num_rows: int, width: int, num_pairs: int, wire: Wire) -> RelayLayout:
    """Lay out a RELAY payload."""
    rows = row_segment(num_rows, width, DISPATCH_ROWS[wire])
    experts = align(rows.end + num_pairs * 4)
    weights = align(experts + num_pairs * 4)
    return RelayLayout(rows, rows.end, experts, weights, align(weights + num_pairs * 4))


@dataclass(frozen=True, slots=True)
class ExpertInLayout:
    """EXPERT_IN payload: `segments` is the byte offset of an int32 [num_segments, 2] array."""

    rows: RowSegment
    segments: int
    nbytes: int


@lru_cache(maxsize=4096)
def expert_in_layout(num_rows: int, width: int, num_segments: int, wire: Wire) -> ExpertInLayout:
    """Lay out an EXPERT_IN payload."""
    rows = row_segment(num_rows, width, DISPATCH_ROWS[wire])
    return ExpertInLayout(rows, rows.end, align(rows.end + num_segments * 8))


@dataclass(frozen=True, slots=True)
class ExpertPickLayout:
    """EXPERT_PICK payload: byte offsets of `segments`, as in an EXPERT_IN, and of what says which rows."""

    segments: int
    picks: int
    nbytes: int


@lru_cache(maxsize=4096)
def expert_pick_layout(rows_nbytes: int, num_rows: int, num_segments: int) -> ExpertPickLayout:
    """Lay out an EXPERT_PICK payload behind `rows_nbytes` of a block."""
    picks = align(rows_nbytes + num_segments * 8)
    return ExpertPickLayout(rows_nbytes, picks, align(picks + (1 + num_rows) * 4))


@dataclass(frozen=True, slots=True)
class AnswerLayout:
    """PARTIAL or COMBINED payload: `ids` is the byte offset of an int32 [num_ids] array."""

    rows: RowSegment
    ids: int
    nbytes: int


@lru_cache(maxsize=4096)
def answer_layout(num_rows: int, width: int, row_type: RowType, num_ids: int = 0) -> AnswerLayout:
    """Lay out an answer: rows, and which rows of the question they are when not all are answered."""
    rows = row_segment(num_rows, width, row_type)
    return AnswerLayout(rows, rows.end, align(rows.end + num_ids * 4))


def check_payload(what: str, declared_nbytes: int, expected_nbytes: int) -> None:
    """Raise WireError unless a payload has exactly the size that its header's counts imply."""
    if declared_nbytes != expected_nbytes:
        raise WireError(
            f"{what} payload has {declared_nbytes} bytes, its header implies {expected_nbytes}"
        )
