"""Links are counted in rows and bytes as sent, and as unicast would have sent them."""

import pytest

from common.ids import Role
from common.placement.plan import column_plan
from common.transport.buffers import BufferPool
from common.transport.outbox import Outbox
from common.wire.blocks import row_segment
from common.wire.header import Header, Kind
from services.gateway.metrics import process_metrics
from services.router.counters import Counters
from services.router.dataflow import Dataflow
from tests.unit.test_answers import EXPERTS, WIDTH, RecordingLink, dispatch

ROW_NBYTES = 4 * WIDTH


@pytest.fixture
def two_nodes():
    """Routers of two nodes with two experts each, joined by recording links: (flow, link to its peer) per node."""
    pool = BufferPool()
    plan = column_plan(
        epoch=1, moe_layers=[1], num_experts=EXPERTS, experts_per_gpu=1, nodes=(0, 0, 1, 1)
    )
    flows = []
    for node in (0, 1):
        experts = {w: Outbox(f"expert-{w}") for w in range(EXPERTS) if plan.nodes[w] == node}
        for worker, outbox in experts.items():
            outbox.opened(RecordingLink(Role.EXPERT, worker, node))
        peer = Outbox(f"router-{1 - node}")
        peer.opened(RecordingLink(Role.ROUTER, 1 - node, 1 - node))
        flows.append(Dataflow(node, plan, EXPERTS, pool, experts, {1 - node: peer}))
    yield pool, flows
    for flow in flows:
        for outbox in (*flow.experts.values(), *flow.routers.values()):
            outbox.clear()
    assert pool.outstanding == 0


def deliver(pool, flow, link, posted):
    header, payload = posted
    buffer = pool.acquire(len(payload))
    buffer.array[:] = payload
    flow.on_message(link, header, buffer)


def answer_experts(pool, flow):
    """Every expert of a router answers what it was asked: zeros."""
    for worker, outbox in flow.experts.items():
        for asked, _ in outbox.link.posted:
            nbytes = row_segment(asked.num_rows, WIDTH, 4).end
            out = asked.derive(
                Kind.EXPERT_OUT, target=worker, num_rows=asked.num_rows, payload_nbytes=nbytes
            )
            flow.on_message(RecordingLink(Role.EXPERT, worker), out, pool.acquire(nbytes))


def test_rows_cross_once_and_come_back_once(two_nodes):
    pool, (source, other) = two_nodes
    # row 0 wants experts 2 and 3 of node 1, row 1 wants 0 of node 0 and 3
    header, payload = dispatch(pool, num_rows=2, experts=((2, 3), (0, 3)))
    source.on_message(RecordingLink(Role.ATTENTION), header, payload)
    (relay,) = source.routers[1].link.posted
    deliver(pool, other, RecordingLink(Role.ROUTER, 0, 0), relay)
    origin = next(iter(other._works.values())).origin
    answer_experts(pool, other)
    deliver(pool, source, RecordingLink(Role.ROUTER, 1, 1), origin.posted[0])
    out, back = source.counters.links[1]
    assert (out.messages, out.rows, out.unicast_rows) == (1, 2, 3)
    assert (back.messages, back.rows, back.unicast_rows) == (1, 2, 3)
    assert out.bytes == relay[0].payload_nbytes
    assert out.unicast_bytes == back.unicast_bytes == 3 * ROW_NBYTES
    assert back.bytes == 2 * 2 * ROW_NBYTES, "exact partials are float64"
    sent, received = other.counters.links[0]
    assert (sent.rows, sent.bytes) == (back.rows, back.bytes), "both ends count alike"
    assert (received.rows, received.bytes) == (out.rows, out.bytes)
    # DISPATCH, RELAY, EXPERT_IN and PARTIAL; COMBINED waits for the local expert
    assert source.counters.operations == {1: 4}
    assert other.counters.operations == {1: 6}, "RELAY, two EXPERT_IN, two EXPERT_OUT, PARTIAL"


def test_links_are_metrics_of_their_own():
    counters = Counters()
    header = Header(Kind.RELAY, width=WIDTH, layer=3, num_rows=4, payload_nbytes=100)
    counters.crossed(7, header.kind, header, 4, 9, 100, inward=False)
    document = counters.to_json()
    process = {"role": "router", "index": 2, "state": "ready", "counters": document}
    samples = {
        (s.name, s.labels["peer"], s.labels["direction"]): s.value
        for metric in process_metrics([process])
        for s in metric.samples
        if s.name.startswith("atoll_link")
    }
    assert samples["atoll_link_rows", "7", "out"] == 4
    assert samples["atoll_link_unicast_rows", "7", "out"] == 9
    assert samples["atoll_link_bytes", "7", "out"] == 100
    assert samples["atoll_link_rows", "7", "in"] == 0


@pytest.mark.parametrize(
    "links", ["seven", {"1": 2}, {"1": {"out": [1]}}, {"1": {"out": {"a b": 1}}}]
)
def test_a_malformed_table_of_links_breaks_no_page(links):
    process = {"role": "router", "index": 2, "state": "ready", "counters": {"links": links}}
    names = {s.name for metric in process_metrics([process]) for s in metric.samples}
    assert names == {"atoll_process_ready"}
