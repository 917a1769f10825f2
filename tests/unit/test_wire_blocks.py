"""Payload layouts: sections are aligned, disjoint, in order, large enough, and of the size that is checked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import WireError
from common.wire.blocks import (
    DISPATCH_ROWS,
    EXPERT_OUT_ROWS,
    PARTIAL_ROWS,
    RowType,
    check_payload,
    dispatch_layout,
    num_scales,
    relay_layout,
    row_segment,
    wider_segment,
)
from common.wire.header import Wire

settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")

rows = st.integers(0, 5000)
widths = st.integers(1, 8000)
wires = st.sampled_from(Wire)


def assert_sections(sections, end):
    """`sections` are (offset, size) pairs."""
    at = 0
    for offset, nbytes in sections:
        assert offset % 16 == 0
        assert offset >= at, "sections overlap"
        at = offset + nbytes
    assert at <= end < at + 16
    assert end % 16 == 0


def row_sections(segment):
    return [
        (segment.rows_offset, segment.num_rows * segment.width * int(segment.row_type)),
        *(
            [(segment.scales_offset, segment.num_rows * num_scales(segment.width) * 4)]
            if segment.row_type is RowType.FP8
            else []
        ),
    ]


@given(rows, widths, st.sampled_from(RowType), st.integers(0, 100))
def test_row_segment(num_rows, width, row_type, start):
    segment = row_segment(num_rows, width, row_type, start * 16)
    assert segment.rows_offset == start * 16
    assert_sections(row_sections(segment), segment.end)
    if row_type is not RowType.FP8:
        assert segment.scales_offset == segment.end


@given(rows, widths, st.integers(1, 8), wires)
def test_dispatch(num_rows, width, top_k, wire):
    layout = dispatch_layout(num_rows, width, top_k, wire)
    nbytes = num_rows * top_k * 4
    assert layout.rows.row_type is DISPATCH_ROWS[wire]
    assert_sections(
        [*row_sections(layout.rows), (layout.experts, nbytes), (layout.weights, nbytes)],
        layout.nbytes,
    )


@given(rows, widths, st.integers(0, 40_000), wires)
def test_relay(num_rows, width, num_pairs, wire):
    layout = relay_layout(num_rows, width, num_pairs, wire)
    nbytes = num_pairs * 4
    assert_sections(
        [
            *row_sections(layout.rows),
            (layout.pair_rows, nbytes),
            (layout.experts, nbytes),
            (layout.weights, nbytes),
        ],
        layout.nbytes,
    )


@pytest.mark.parametrize(("width", "scales"), [(1, 1), (127, 1), (128, 1), (129, 2), (7168, 56)])
def test_a_short_last_block_has_a_scale(width, scales):
    assert num_scales(width) == scales


def test_the_exact_wire_sums_in_float64():
    assert PARTIAL_ROWS[Wire.FP32] is RowType.FP64
    assert EXPERT_OUT_ROWS[Wire.FP32] is RowType.FP32


@pytest.mark.parametrize("declared", [0, 99, 101])
def test_only_the_exact_size_passes(declared):
    check_payload("RELAY", 100, 100)
    with pytest.raises(WireError, match=f"RELAY payload has {declared} bytes, .* implies 100"):
        check_payload("RELAY", declared, 100)


@pytest.mark.parametrize("more", [-16, 8])
def test_rows_that_do_not_fit_their_segment_are_refused(more):
    segment = row_segment(4, 1216, RowType.FP8)
    with pytest.raises(WireError, match="bytes for 4 rows that take"):
        wider_segment(segment, segment.end + more)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 600))
def test_a_wider_segment_has_the_scales_of_more_rows(num_rows, idle, width):
    segment, whole = (row_segment(n, width, RowType.FP8) for n in (num_rows, num_rows + idle))
    gap = whole.scales_offset - segment.scales_offset
    wider = wider_segment(segment, segment.end + gap)
    assert (wider.scales_offset, wider.rows_offset) == (whole.scales_offset, 0)
    assert (wider.num_rows, wider.end) == (num_rows, segment.end + gap)


def test_only_fp8_rows_have_scales_elsewhere():
    segment = row_segment(4, 64, RowType.BF16)
    with pytest.raises(WireError, match="bytes for 4 rows"):
        wider_segment(segment, segment.end + 16)
