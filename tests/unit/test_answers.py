"""Answers that are late, doubled or malformed: nothing that is owed is ever forgotten by a bad answer."""

import asyncio

import numpy as np
import pytest
import torch

from common.errors import DeadlineExceeded, LinkClosed, Overloaded, Retryable, WireError
from common.ids import ProcessId, Role
from common.placement.plan import column_plan
from common.tensors import numbers
from common.transport.base import Hello
from common.transport.buffers import BufferPool
from common.transport.device import DevicePool
from common.transport.outbox import Message, Outbox
from common.transport.seam import Seam
from common.wire.blocks import EXPERT_OUT_ROWS, RowType, dispatch_layout, row_segment
from common.wire.header import Header, Kind, Wire
from services.attention.moe_client import MoeClient
from services.router.dataflow import Dataflow

WIDTH, TOP_K, EXPERTS = 16, 2, 4


class RecordingLink:
    """A link that keeps what is posted; `error` is raised instead when set."""

    def __init__(self, role: Role, index: int = 0, node: int = 0) -> None:
        self.peer = Hello(ProcessId(role, index), node, 1, "m", 1, "fp32")
        self.posted = []
        self.error = None

    def take(self, volley, question) -> None:
        return None

    def post(self, header, payload=None, *, landing=None) -> None:
        if self.error is not None:
            raise self.error
        self.posted.append((header, None if payload is None else payload.array.copy()))


@pytest.fixture
def pool():
    pool = BufferPool()
    yield pool
    assert pool.outstanding == 0, "a buffer was not given back"


def flow_of(pool):
    """A router that holds every expert on four workers of its own node, all connected, and their links."""
    plan = column_plan(
        epoch=1,
        moe_layers=range(1, 3),
        num_experts=EXPERTS,
        experts_per_gpu=1,
        nodes=(0,) * EXPERTS,
    )
    outboxes = {w: Outbox(f"expert-{w}") for w in range(EXPERTS)}
    links = {w: RecordingLink(Role.EXPERT, w) for w in outboxes}
    for worker, outbox in outboxes.items():
        outbox.opened(links[worker])
    return Dataflow(0, plan, EXPERTS, pool, outboxes, {}), links


def dispatch(pool, *, num_rows=1, experts=((0, 3),), **changes):
    layout = dispatch_layout(num_rows, WIDTH, TOP_K, Wire.FP32)
    buffer = pool.acquire(layout.nbytes)
    buffer.array[:] = 0
    numbers(buffer, layout.experts, num_rows * TOP_K, np.int32)[:] = np.array(experts).ravel()
    fields = {
        "wire": Wire.FP32, "layer": 1, "epoch": 1, "width": WIDTH, "block": 7, "num_rows": num_rows,
        "num_pairs": num_rows * TOP_K, "payload_nbytes": layout.nbytes,
    }  # fmt: skip
    return Header(Kind.DISPATCH, **(fields | changes)), buffer


def answer(pool, request, *, nbytes=None):
    segment = row_segment(request.num_rows, WIDTH, EXPERT_OUT_ROWS[Wire.FP32])
    buffer = pool.acquire(segment.end if nbytes is None else nbytes)
    buffer.array[:] = 0
    fields = {
        "target": request.target,
        "num_rows": request.num_rows,
        "payload_nbytes": buffer.nbytes,
    }
    return request.derive(Kind.EXPERT_OUT, **fields), buffer


def test_a_malformed_answer_leaves_the_block_owed(pool):
    flow, links = flow_of(pool)
    origin = RecordingLink(Role.ATTENTION)
    flow.on_message(origin, *dispatch(pool))
    (request, _), *_ = links[0].posted
    with pytest.raises(WireError, match="EXPERT_OUT payload has 5 bytes"):
        flow.on_message(links[0], *answer(pool, request, nbytes=5))
    assert len(flow.experts[0]) == 1  # the link closes now, and its successor is asked again
    successor = RecordingLink(Role.EXPERT, 0)
    flow.experts[0].closed(links[0])
    flow.experts[0].opened(successor)
    (again, _), *_ = successor.posted
    assert again.attempt == 1
    flow.on_message(successor, *answer(pool, again))
    flow.on_message(links[3], *answer(pool, links[3].posted[0][0]))
    assert [header.kind for header, _ in origin.posted] == [Kind.COMBINED]
    assert flow.num_in_flight == 0


def test_a_doubled_answer_is_dropped_and_counted(pool):
    flow, links = flow_of(pool)
    origin = RecordingLink(Role.ATTENTION)
    flow.on_message(origin, *dispatch(pool))
    requests = {w: links[w].posted[0][0] for w in (0, 3)}
    for worker in (0, 0, 3, 3):
        flow.on_message(links[worker], *answer(pool, requests[worker]))
    assert len(origin.posted) == 1
    assert flow.counters.late == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epoch": 2}, "epoch 2, this router serves epoch 1"),
        ({"layer": 0}, "layer 0 has no experts"),
        ({"num_rows": 0}, "DISPATCH without rows"),
        ({"num_rows": 2}, "2 pairs for 2 rows|DISPATCH payload has"),
        ({"num_pairs": 0}, "DISPATCH payload has|0 pairs for 1 rows"),
        ({"width": 32}, "DISPATCH payload has"),
    ],
)
def test_a_bad_request_is_answered_with_one_sentence(pool, changes, sentence):
    flow, links = flow_of(pool)
    origin = RecordingLink(Role.ATTENTION)
    header, payload = dispatch(pool)
    for name, value in changes.items():
        setattr(header, name, value)
    flow.on_message(origin, header, payload)
    ((reply, text),) = origin.posted
    assert reply.kind is Kind.FAILED
    assert any(part in text.tobytes().decode() for part in sentence.split("|"))
    assert flow.num_in_flight == 0
    assert not any(link.posted for link in links.values())


@pytest.mark.parametrize("expert", [9, -1, -(1 << 31)])
@pytest.mark.parametrize("slices", [1, 2])
def test_an_unknown_expert_is_refused(pool, expert, slices):
    flow, _ = flow_of(pool)
    flow.slices = slices  # 32 bits must not come round to an expert that is there
    origin = RecordingLink(Role.ATTENTION)
    flow.on_message(origin, *dispatch(pool, experts=((0, expert),)))
    assert b"expert id outside" in origin.posted[0][1].tobytes()


def test_a_full_queue_fails_the_block_and_keeps_nothing(pool):
    flow, links = flow_of(pool)
    links[3].error = Overloaded("4096 messages wait for expert-3, the limit is 4096")
    origin = RecordingLink(Role.ATTENTION)
    flow.on_message(origin, *dispatch(pool))
    assert b"4096 messages wait for expert-3" in origin.posted[0][1].tobytes()
    assert not any(len(outbox) for outbox in flow.experts.values())


def test_a_link_that_closed_unnoticed_keeps_the_message(pool):
    outbox, link = Outbox("expert-0"), RecordingLink(Role.EXPERT)
    outbox.opened(link)
    link.error = LinkClosed("gone")
    outbox.send(Message(Header(Kind.EXPERT_IN, block=1), pool.acquire(4), 0))
    assert repr(outbox) == "<Outbox to expert-0 [1 owed | waiting for the link]>"
    assert outbox.settle(1) is not None
    assert outbox.settle(1) is None


def test_a_malformed_combined_leaves_the_micro_batch_waiting_for_the_next_link(pool):
    async def main() -> None:
        client = MoeClient(0, WIDTH, Wire.FP32, 1, pool, 30.0)
        link = RecordingLink(Role.ROUTER)
        client.routers[0].opened(link)
        experts = torch.tensor([[0, 1]], dtype=torch.int32)
        future = client.dispatch(1, 0, torch.zeros(1, WIDTH), experts, torch.ones(1, 2))
        request = link.posted[0][0]
        bad = request.derive(Kind.COMBINED, target=0, num_rows=1, payload_nbytes=3)
        with pytest.raises(WireError, match="COMBINED payload has 3 bytes"):
            client.on_message(link, bad, pool.acquire(3))
        assert not future.done()
        successor = RecordingLink(Role.ROUTER)
        client.routers[0].closed(link)
        client.routers[0].opened(successor)
        assert successor.posted[0][0].attempt == 1
        segment = row_segment(1, WIDTH, RowType.FP32)
        buffer = pool.acquire(segment.end)
        buffer.array[:] = 0
        good = request.derive(Kind.COMBINED, target=0, num_rows=1, payload_nbytes=segment.end)
        client.on_message(successor, good, buffer)
        assert torch.equal(await future, torch.zeros(1, WIDTH))

    asyncio.run(main())


@pytest.mark.parametrize("full", [1, 2, 3])
@pytest.mark.parametrize("new_pool", [BufferPool, lambda: DevicePool("cpu")])
def test_a_full_queue_to_a_router_fails_the_block_and_keeps_nothing(new_pool, full):
    """Whichever of the routers is asked first, those asked after it cost nothing, those before it are late."""
    pool = new_pool()
    plan = column_plan(
        epoch=1, moe_layers=range(1, 3), num_experts=EXPERTS, experts_per_gpu=1, nodes=tuple(range(EXPERTS))
    )  # fmt: skip
    experts = {0: Outbox("expert-0")}
    routers = {node: Outbox(f"router-{node}") for node in range(1, EXPERTS)}
    links = {0: RecordingLink(Role.EXPERT, 0)}
    links |= {node: RecordingLink(Role.ROUTER, node, node) for node in routers}
    for node, outbox in {**experts, **routers}.items():
        outbox.opened(links[node])
    flow = Dataflow(0, plan, EXPERTS, pool, experts, routers)
    links[full].error = Overloaded(f"4096 messages wait for router-{full}, the limit is 4096")
    origin = RecordingLink(Role.ATTENTION)
    layout = dispatch_layout(2, WIDTH, TOP_K, Wire.FP32)
    payload = pool.acquire(layout.nbytes, rows_nbytes=layout.rows.end)
    payload.array[:] = 0
    experts_of_rows = np.array([0, 1, 2, 3], np.int32)
    numbers(payload, layout.experts, 4, np.int32)[:] = experts_of_rows
    header = Header(
        Kind.DISPATCH, Wire.FP32, 1, 1, WIDTH, block=7, num_rows=2, num_pairs=4, payload_nbytes=layout.nbytes
    )  # fmt: skip
    flow.on_message(origin, header, payload)
    assert [reply.kind for reply, _ in origin.posted] == [Kind.FAILED]
    assert [len(links[node].posted) for node in routers] == [int(n < full) for n in routers]
    assert flow.num_in_flight == 0
    assert not any(len(outbox) for outbox in routers.values())
    assert pool.outstanding == 0
    assert getattr(pool, "rows_outstanding", 0) == 0


class Never:
    """An event that the device does not reach."""

    def record(self): ...

    def query(self):
        return False


@pytest.mark.parametrize("failed", [False, True])
def test_rows_that_a_graph_wrote_leave_when_it_tells_and_not_when_it_ends(failed):
    async def main():
        pool, told = DevicePool("cpu"), []
        seam = Seam(Never)  # as while the shared expert runs, in the same graph
        moe = MoeClient(0, WIDTH, Wire.FP8, 1, pool, 1.0, seam=seam)
        link = RecordingLink(Role.ROUTER)
        moe.routers[0].opened(link)
        segment = row_segment(2, WIDTH, RowType.FP8)
        block = pool.take(segment.end)
        experts, weights = torch.zeros(2, TOP_K, dtype=torch.int32), torch.ones(2, TOP_K)
        number = moe.next_block
        future = moe.dispatch(
            1, 0, block.rows(0, segment.end), experts, weights, written=lambda: bool(told)
        )
        assert not seam.poll()
        assert link.posted == []
        experts[:] = 3  # the device writes them last of all
        if failed:
            moe._fail(number, Retryable("somebody failed it"))
            assert isinstance(future.exception(), Retryable)
        told.append(1)
        assert seam.poll()
        if failed:
            assert link.posted == [], "nobody waits for it any more"
        else:
            ((header, tables),) = link.posted
            assert (header.block, header.num_rows) == (number, 2)
            assert tables[: 2 * TOP_K * 4].view(np.int32).tolist() == [3] * 2 * TOP_K
            moe._settle(number)
        block.release()
        assert (pool.outstanding, pool.rows_outstanding) == (0, 0)

    asyncio.run(main())


def test_rows_that_the_device_never_writes_fail_at_the_deadline_and_are_not_sent():
    async def main():
        now, told = [0], []
        pool, seam, link = DevicePool("cpu"), Seam(Never), RecordingLink(Role.ROUTER)
        moe = MoeClient(0, WIDTH, Wire.FP8, 1, pool, 1.0, seam=seam, clock_ns=lambda: now[0])
        moe.routers[0].opened(link)
        block = pool.take(4096)
        experts, weights = torch.zeros(2, TOP_K, dtype=torch.int32), torch.ones(2, TOP_K)
        rows = block.rows(0, row_segment(2, WIDTH, RowType.FP8).end)
        future = moe.dispatch(1, 0, rows, experts, weights, written=lambda: bool(told))
        moe.expire()
        assert not future.done()
        now[0] = 1_000_000_001
        moe.expire()
        assert isinstance(future.exception(), DeadlineExceeded)
        sentence = "the device has not written a block within 1 s (layer 1, micro-batch 0)"
        assert str(future.exception()) == sentence
        told.append(1)
        assert seam.poll()
        assert link.posted == []
        block.release()
        assert (pool.outstanding, pool.rows_outstanding) == (0, 0)

    asyncio.run(main())


def test_rows_that_are_copied_after_the_graph_wait_for_the_copy_whatever_it_tells():
    async def main():
        pool, seam = DevicePool("cpu"), Seam(Never)
        moe = MoeClient(0, WIDTH, Wire.BF16, 1, pool, 1.0, seam=seam)
        link = RecordingLink(Role.ROUTER)
        moe.routers[0].opened(link)
        experts, weights = torch.zeros(2, TOP_K, dtype=torch.int32), torch.ones(2, TOP_K)
        rows = torch.ones(2, WIDTH, dtype=torch.bfloat16)
        moe.dispatch(1, 0, rows, experts, weights, written=lambda: True)
        assert not seam.poll()
        assert link.posted == []

    asyncio.run(main())
