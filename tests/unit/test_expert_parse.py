"""What an expert worker reads of a question: good ones whole, bad ones as one sentence that says what is wrong."""

import numpy as np
import pytest
import torch

from common.errors import WireError
from common.tensors import put_bytes, rows_of, scales_of
from common.transport.buffers import BufferPool
from common.transport.device import DevicePool
from common.wire.blocks import (
    DISPATCH_ROWS,
    expert_in_layout,
    expert_pick_layout,
    row_segment,
    wider_segment,
)
from common.wire.header import Header, Kind, Wire
from services.expert.bank import Bank
from services.expert.engine import parse

WIDTH, LAYER, ROWS = 32, 3, 6
BANK = Bank(WIDTH, "m", {(LAYER, 0): None, (LAYER, 5): None}, {})


def question(segments, *, rows=ROWS, width=WIDTH, layer=LAYER):
    """Its header and payload."""
    layout = expert_in_layout(rows, width, len(segments), Wire.FP32)
    payload = BufferPool().acquire(layout.nbytes)
    if rows:
        rows_of(payload, layout.rows).copy_(torch.arange(rows * width).view(rows, width))
    put_bytes(payload, layout.segments, np.array(segments, np.int32).reshape(-1))
    header = Header(Kind.EXPERT_IN, Wire.FP32, layer, width=width, num_rows=rows, num_pairs=len(segments),
                    payload_nbytes=layout.nbytes)  # fmt: skip
    return header, payload


@pytest.mark.parametrize("segments", [[(0, 6)], [(5, 6)], [(0, 1), (5, 5)]], ids=str)
def test_a_good_question_is_its_rows_and_segments(segments):
    call = parse(*question(segments), BANK)
    assert (call.segments, call.scales, call.out) == (segments, None, None)
    assert torch.equal(call.rows, torch.arange(ROWS * WIDTH).view(ROWS, WIDTH).float())


@pytest.mark.parametrize(
    "segments",
    [[(0, 5)], [(0, 7)], [(0, 0), (5, 6)], [(0, 6), (5, 0)], [(0, -1), (5, 7)], [(0, 7), (5, -1)]],
    ids=str,
)
def test_segments_that_are_not_the_rows_are_refused(segments):
    with pytest.raises(WireError, match="segments do not cover its 6 rows"):
        parse(*question(segments), BANK)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layer": 4}, "expert 0 of layer 4 is not resident here"),
        ({"width": 64}, "6 rows of width 64, the model has 32"),
        ({"rows": 0}, "0 rows of width 32"),
    ],
    ids=str,
)
def test_what_this_worker_does_not_compute_is_refused(changes, sentence):
    with pytest.raises(WireError, match=sentence):
        parse(*question([(0, 6)], **changes), BANK)


def pick(index, *, of_block=9, segments=((0, 4),), wider=0, wire=Wire.FP8, on_host=False):
    """An EXPERT_PICK from a block in the memory of a device; its rows are all their own number."""
    pool, table = DevicePool("cpu"), np.array([of_block, *index], np.int32)
    segment = row_segment(9, WIDTH, DISPATCH_ROWS[wire])
    if wider:
        segment = wider_segment(segment, segment.end + wider)
    layout = expert_pick_layout(segment.end, len(index), len(segments))
    payload = pool.acquire(layout.nbytes, rows_nbytes=segment.end)
    payload.rows.block.on_host = on_host
    rows_of(payload, segment).copy_(torch.arange(9)[:, None].expand(9, WIDTH))
    if wire is Wire.FP8:
        scales_of(payload, segment).copy_(torch.arange(9)[:, None])
    put_bytes(payload, layout.segments, np.array(segments, np.int32).reshape(-1))
    put_bytes(payload, layout.picks, table)
    header = Header(Kind.EXPERT_PICK, wire, LAYER, width=WIDTH, num_rows=len(index), num_pairs=len(segments),
                    payload_nbytes=layout.nbytes)  # fmt: skip
    return header, payload


@pytest.mark.parametrize(
    ("wire", "wider"), [(Wire.FP8, 0), (Wire.FP8, 64), (Wire.BF16, 0), (Wire.FP32, 0)]
)
def test_picked_rows_stay_where_they_are_until_they_are_wanted(wire, wider):
    header, payload = pick([8, 0, 3, 3], wire=wire, wider=wider)
    call = parse(header, payload, BANK)
    assert (call.num_rows, call.segments, call.out) == (4, [(0, 4)], None)
    assert call.rows.data_ptr() == payload.rows.address
    own = call.with_own_rows()
    assert own.rows[:, 0].tolist() == [8, 0, 3, 3]
    assert own.scales is None if wire is not Wire.FP8 else own.scales[:, 0].tolist() == [8, 0, 3, 3]
    payload.release()


@pytest.mark.parametrize(
    ("index", "changes", "sentence"),
    [
        ([8, 0, 9, 3], {}, "EXPERT_PICK of row 9 of a block of 9 rows"),
        ([8, 0, -1, 3], {}, "EXPERT_PICK of row 4294967295 of a block of 9 rows"),
        ([0, 0, 0, 0], {"of_block": 0}, "of a block of 0 rows"),
        ([0, 0, 0, 0], {"of_block": -5}, "of a block of -5 rows"),
        ([0, 0, 0, 0], {"of_block": 10}, "bytes for 10 rows"),
        ([0, 0, 0, 0], {"of_block": 1 << 30}, "bytes for 1073741824 rows"),
        ([0, 0, 0], {}, "segments do not cover its 3 rows"),
        ([0, 0, 0, 0], {"segments": [(1, 4)]}, "expert 1 of layer 3 is not resident here"),
        ([0, 0, 0, 0], {"on_host": True}, "without rows in device memory"),
    ],
    ids=str,
)
def test_picks_that_no_router_makes_are_refused(index, changes, sentence):
    header, payload = pick(index, **changes)
    with pytest.raises(WireError, match=sentence):
        parse(header, payload, BANK)
    payload.release()


def test_a_pick_of_another_size_than_its_header_says_is_refused():
    header, payload = pick([8, 0, 3, 3])
    header.payload_nbytes += 16
    with pytest.raises(WireError, match="EXPERT_PICK payload has"):
        parse(header, payload, BANK)


def test_an_expert_of_another_worker_and_a_short_payload_are_refused():
    with pytest.raises(WireError, match="expert 1 of layer 3 is not resident here"):
        parse(*question([(1, 6)]), BANK)
    header, payload = question([(0, 6)])
    header.payload_nbytes -= 8
    with pytest.raises(WireError, match="EXPERT_IN"):
        parse(header, payload, BANK)
