"""A router that hands rows of a neighbour on: what it asks for, and what it sends where that does not go."""

import numpy as np
import pytest
import torch

from common.errors import Overloaded
from common.tensors import scales_of
from common.wire.blocks import DISPATCH_ROWS, RowType, expert_pick_layout, row_segment
from common.wire.header import Header, Kind, Wire
from tests.bench.router_python import WIDTH
from tests.unit.test_landed_answers import ROWS, Router, answer_shortly

SEGMENT = row_segment(ROWS, WIDTH, DISPATCH_ROWS[Wire.FP8])


def asked(router, seed):
    """The questions about a block of random bytes, and the parts that outboxes keep of them."""
    message = list(router.ask(seed))
    return message, [call for o in router.flow.experts.values() for call in o._calls.values()]


@pytest.fixture
def router():
    return Router(1)


def test_experts_are_told_where_the_block_is_and_which_rows_they_are_asked_about(router):
    message, parts = asked(router, 1)
    block = router.origin._rows
    assert len(message) == len(parts) > 4
    for part in parts:
        volley = part.volley
        assert (volley.kind, volley.block) == (Kind.EXPERT_PICK, block)
        assert (part.place, part.nbytes) == (0, SEGMENT.end)
        layout = expert_pick_layout(SEGMENT.end, part.num_rows, part.num_pairs)
        assert len(part.tail) == layout.nbytes - SEGMENT.end
        picks = np.frombuffer(part.tail, np.int32, 1 + part.num_rows, layout.picks - SEGMENT.end)
        assert picks[0] == ROWS
        assert ((picks[1:] >= 0) & (picks[1:] < ROWS)).all()
    assert router.pool.rows_outstanding == 2, "outputs and the sum: no rows are gathered"
    assert not block.take_again(), "its owner has it back when all have answered"
    for link, header, _ in message:
        answer_shortly(router, link, header)
    assert block.take_again()
    assert router.pool.outstanding == router.pool.rows_outstanding == 0


def test_one_that_goes_by_itself_has_the_same_rows_with_it(router):
    message, parts = asked(router, 2)
    block = router.origin._rows
    block.tensor.copy_(torch.randint(0, 256, block.tensor.shape, dtype=torch.uint8))
    rows = block.matrix(torch.uint8, 0, ROWS, WIDTH)
    scales = block.matrix(torch.int32, SEGMENT.scales_offset, ROWS, WIDTH // 128)
    for part in parts:
        header, payload = part.header, part.payload
        assert (header.kind, header.num_rows, header.block) == (
            Kind.EXPERT_IN,
            part.num_rows,
            part.number,
        )
        end = payload.nbytes
        assert bytes(payload.array) == part.tail[:end]
        index = np.frombuffer(part.tail, np.int32, part.num_rows, end + 4).tolist()
        mine = row_segment(part.num_rows, WIDTH, RowType.FP8)
        assert payload.rows.nbytes == mine.end
        got = payload.rows.block.matrix(torch.uint8, 0, part.num_rows, WIDTH)
        assert torch.equal(got, rows[index])
        assert torch.equal(scales_of(payload, mine).view(torch.int32), scales[index])
    for link, header, _ in message:
        answer_shortly(router, link, header)
    assert router.pool.outstanding == router.pool.rows_outstanding == 0


def test_where_a_reader_could_not_read_them_rows_are_gathered_for_all_at_once(router):
    router.pool.hands_on = False
    message, parts = asked(router, 3)
    assert {part.volley.kind for part in parts} == {Kind.EXPERT_IN}
    assert router.origin._rows.take_again(), "its owner has it back when it is gathered"
    for link, header, _ in message:
        answer_shortly(router, link, header)
    assert router.pool.outstanding == router.pool.rows_outstanding == 0


def test_a_refusal_in_the_middle_fails_the_block_and_leaves_nothing(router, monkeypatch):
    full = router.links[7]
    monkeypatch.setattr(full, "take", lambda *_: None)
    monkeypatch.setattr(full, "post", lambda *_, **__: (_ for _ in ()).throw(Overloaded("full")))
    refused = []

    def failed(buffer, landing):
        refused.append(
            (Header.unpack_from(buffer.view, max_payload_nbytes=99).kind, bytes(buffer.array))
        )
        buffer.headroom_busy = False
        buffer.release()

    router.origin._transmit = failed
    assert list(router.ask(4)), "others were asked"
    assert refused == [(Kind.FAILED, b"full")]
    flow = router.flow
    assert flow.num_in_flight == 0
    assert not flow.calls.works
    assert not any(len(outbox) for outbox in flow.experts.values())
    assert not any(flow.calls.fleet.outstanding)
    assert router.origin._rows.take_again()
    for link in router.links:  # no answer will find its landing wanted
        for landing in link._landings.values():
            landing.release()
    assert router.pool.outstanding == router.pool.rows_outstanding == 0
