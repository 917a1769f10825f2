"""What an expert worker reads of a question: good ones whole, bad ones as one sentence that says what is wrong."""

import numpy as np
import pytest
import torch

from common.errors import WireError
from common.tensors import put_bytes, rows_of
from common.transport.buffers import BufferPool
from common.wire.blocks import expert_in_layout
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


def test_an_expert_of_another_worker_and_a_short_payload_are_refused():
    with pytest.raises(WireError, match="expert 1 of layer 3 is not resident here"):
        parse(*question([(1, 6)]), BANK)
    header, payload = question([(0, 6)])
    header.payload_nbytes -= 8
    with pytest.raises(WireError, match="EXPERT_IN"):
        parse(header, payload, BANK)
