"""Answers that a router takes in short, their rows being where they are summed: the same sums, and nothing kept."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.errors import WireError
from common.ids import Role
from common.placement.plan import Plan
from common.transport.device import DevicePool
from common.transport.outbox import Outbox
from common.wire.blocks import RowType, row_segment
from common.wire.header import Kind, Landed
from services.router.dataflow import Dataflow
from tests.bench.router_python import LAYER, WIDTH, Handler, SilentLink, block

ROWS, EXPERTS = 5, 16


class Router:
    """The source's router of some nodes, one expert on each worker."""

    def __init__(self, nodes, **options):
        self.pool, handler = DevicePool("cpu"), Handler()
        homes = tuple(w * nodes // EXPERTS for w in range(EXPERTS))
        plan = Plan(1, {LAYER: tuple((w,) for w in range(EXPERTS))}, homes)
        experts = {w: Outbox(f"expert-{w}") for w, node in enumerate(homes) if node == 0}
        routers = {node: Outbox(f"router-{node}") for node in range(1, nodes)}
        self.flow = handler.flow = Dataflow(
            0, plan, EXPERTS, self.pool, experts, routers, answer_rows=RowType.BF16, **options
        )
        self.links = [SilentLink(Role.EXPERT, w, handler, self.pool) for w in experts]
        self.links += [SilentLink(Role.ROUTER, n, handler, self.pool, n) for n in routers]
        for outbox, link in zip([*experts.values(), *routers.values()], self.links, strict=True):
            outbox.opened(link)
        self.flow.calls.look()
        self.origin = SilentLink(Role.ATTENTION, 0, handler, self.pool)
        self.answered = []
        self.origin._transmit = self._keep

    def _keep(self, buffer, landing):
        rows = buffer.rows.block.matrix(torch.bfloat16, buffer.rows.offset, ROWS, WIDTH)
        self.answered.append(rows.clone())
        buffer.headroom_busy = False
        buffer.release()

    def ask(self, seed):
        """A block; the questions about it, with the rows that answer each in their places."""
        np.random.seed(seed)
        torch.manual_seed(seed)
        message = block(self.pool, ROWS, EXPERTS, seed)
        self.origin.arrive(message)
        for link in self.links:
            for header in link.requests():
                landing = link._landings[header.answer]
                segment = row_segment(header.num_rows, WIDTH, RowType.BF16)
                assert landing.nbytes == segment.end
                rows = torch.randn(header.num_rows, WIDTH).bfloat16()
                landing.tensor.copy_(rows.view(torch.uint8).view(-1))
                yield link, header, landing


def landed(header):
    kind = Kind.PARTIAL if header.kind is Kind.RELAY else Kind.EXPERT_OUT
    nbytes = row_segment(header.num_rows, WIDTH, RowType.BF16).end
    return Landed(kind, LAYER, header.block, nbytes, 7, 30, 2, header.answer)


def answer_in_full(router, link, header):
    """The same as any other message."""
    kind = Kind.PARTIAL if header.kind is Kind.RELAY else Kind.EXPERT_OUT
    nbytes = row_segment(header.num_rows, WIDTH, RowType.BF16).end
    reply = header.derive(kind, target=0, num_rows=header.num_rows, payload_nbytes=nbytes)
    reply.rows_nbytes = nbytes
    buffer = router.pool.acquire(0)
    reply.pack_into(buffer.view)
    link.arrive(buffer)


def answer_shortly(router, link, header):
    landing = link._landings.pop(header.answer)
    router.flow.on_landed(link, landed(header), landing)
    landing.release()


@pytest.mark.parametrize("nodes", [1, 4])
def test_sums_and_counts_are_those_of_answers_in_full(nodes):
    found = []
    for answer in (answer_in_full, answer_shortly):
        router = Router(nodes)
        for seed in range(1, 4):
            asked = list(router.ask(seed))
            for link, header, _ in reversed(asked):
                answer(router, link, header)
        counters = router.flow.counters.to_json()
        found.append((torch.stack(router.answered), counters["messages_in"], counters["operations"],
                      counters["bytes_in"], counters["links"]))  # fmt: skip
        assert router.flow.num_in_flight == router.pool.outstanding == 0
        assert router.pool.rows_outstanding == 0
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][0].count_nonzero() > 0
    assert found[0][1:] == found[1][1:]


def test_nobody_waits_for_a_second_answer():
    router = Router(1)
    asked = list(router.ask(1))
    (link, header, landing), *others = asked
    landing.retain()
    answer_shortly(router, link, header)
    router.flow.on_landed(link, landed(header), landing)
    assert router.flow.counters.late == 1
    landing.release()
    for link, header, _ in others:
        answer_shortly(router, link, header)
    assert len(router.answered) == 1
    assert router.pool.outstanding == router.pool.rows_outstanding == 0


def test_rows_of_another_answer_are_refused():
    router = Router(1)
    (link, header, _), (_, _, other), *_ = asked = list(router.ask(1))
    with pytest.raises(WireError, match="rows of another"):
        router.flow.on_landed(link, landed(header), other)
    for link, header, _ in asked:  # which still answers
        answer_shortly(router, link, header)
    assert len(router.answered) == 1


def test_a_trace_has_the_same_spans():
    spans = []
    for answer in (answer_in_full, answer_shortly):
        router = Router(2)
        router.flow.trace = SimpleNamespace(span=lambda *span: spans[-1].append(span))
        router.flow.clock_ns = lambda: 5
        spans.append([])
        for link, header, _ in list(router.ask(1)):
            answer(router, link, header)
    assert spans[0] == spans[1]
    assert {name for name, *_ in spans[0]} == {"dispatch", "expert_out", "partial"}


@pytest.mark.parametrize("nodes", [1, 4])
def test_nothing_is_kept_of_a_block_that_nobody_waits_for(nodes):
    router = Router(nodes)
    asked = list(router.ask(1))
    assert router.pool.outstanding > 0 or nodes > 1, (
        "the answer's buffer is there before the answers"
    )
    router.flow.origin_closed(router.origin)
    assert router.flow.num_in_flight == router.pool.outstanding == 0
    for link, header, _ in asked:
        answer_shortly(router, link, header)
    assert router.flow.counters.late == len(asked)
    assert router.answered == []
    assert router.pool.rows_outstanding == 0
