"""A block's rows come back to where its attention worker wants them: who writes there, who holds it, who refuses."""

import asyncio

import numpy as np
import pytest
import torch

from common.errors import Overloaded, WireError
from common.ids import ProcessId, Role
from common.transport.base import Hello
from common.transport.device import DevicePool, DeviceRows, NeighbourBlock
from common.transport.outbox import Outbox
from common.transport.seam import Seam
from common.wire.blocks import RowType, row_segment
from common.wire.header import Header, Kind, Landed, Wire
from services.attention.moe_client import MoeClient
from tests.unit.test_landed_answers import ROWS, WIDTH, Router, answer_in_full, answer_shortly

NBYTES = row_segment(ROWS, WIDTH, RowType.BF16).end


class Asking(Router):
    """Blocks that say where their rows shall go."""

    def __init__(self, nodes, nbytes=NBYTES, **options):
        super().__init__(nodes, **options)
        self.back, self.places = [], []
        place = self.origin._place

        def with_landing(buffer, number, num_bytes):
            place(buffer, number, num_bytes)
            memory = torch.zeros(nbytes, dtype=torch.uint8)
            block = NeighbourBlock(self.origin, memory, self.back.append)
            buffer.landing = DeviceRows(block, 0, nbytes)

        self.origin._place = with_landing

    def _keep(self, buffer, landing):
        header = Header.unpack_from(buffer.view, max_payload_nbytes=1 << 30)
        self.places.append((buffer.rows.block, header.landed))
        super()._keep(buffer, landing)


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("answer", [answer_in_full, answer_shortly])
def test_a_router_sums_into_the_place_that_a_block_names(nodes, answer):
    found = []
    for router in (Router(nodes), Asking(nodes)):
        for seed in range(1, 4):
            for link, header, _ in list(router.ask(seed)):
                answer(router, link, header)
        assert router.flow.num_in_flight == router.pool.outstanding == 0
        assert router.pool.rows_outstanding == 0
        found.append(torch.stack(router.answered))
    assert torch.equal(*found)
    assert [landed for _, landed in router.places] == [1] * 3
    assert [block for block, _ in router.places] == router.back
    assert all(block.tensor.count_nonzero() > 0 for block in router.back)


class Slow:
    """An event that the device reaches when it is told to."""

    reached = True

    def record(self): ...

    def query(self):
        return self.reached


@pytest.mark.parametrize("nodes", [1, 4])
def test_the_question_is_held_until_the_sum_is_written(nodes, monkeypatch):
    """Its place can be reached that long: what the question's memory was mapped by may go with it."""
    router = Asking(nodes, seam=Seam(Slow))
    source = router.origin._rows = NeighbourBlock(
        router.origin, torch.zeros(1 << 20, dtype=torch.uint8), lambda _: None
    )
    source.offer, source._count = 1, 0
    monkeypatch.setattr(Slow, "reached", False)
    origin_arrives = router.origin.arrive

    def arrive(message):  # and what is gathered for others leaves
        origin_arrives(message)
        Slow.reached = True
        while router.flow.seam.poll():
            pass
        Slow.reached = False

    router.origin.arrive = arrive
    for link, header, _ in list(router.ask(1)):
        answer_shortly(router, link, header)
    assert router.flow.num_in_flight == 0
    assert source._count == 1, "its sum is launched, and not written"
    Slow.reached = True
    while router.flow.seam.poll():
        pass
    assert source._count == router.pool.outstanding == 0


@pytest.mark.parametrize("nodes", [1, 4])
def test_a_place_of_another_size_is_left_alone(nodes):
    router = Asking(nodes, NBYTES + 16)
    for link, header, _ in list(router.ask(1)):
        answer_shortly(router, link, header)
    assert [landed for _, landed in router.places] == [0]
    assert len(router.back) == 1
    assert router.back[0].tensor.count_nonzero() == 0


@pytest.mark.parametrize("nodes", [1, 4])
def test_the_place_of_a_block_that_nobody_waits_for_is_given_back(nodes):
    router = Asking(nodes)
    list(router.ask(1))
    assert not router.back
    router.flow.origin_closed(router.origin)
    assert len(router.back) == 1
    assert router.pool.outstanding == 0


class AskedLink:
    """A router's link that keeps what is posted."""

    def __init__(self):
        self.peer = Hello(ProcessId(Role.ROUTER, 0), 0, 1, "m", 1, "fp8")
        self.posted, self.error = [], None

    def post(self, header, payload=None, *, landing=None):
        if self.error is not None:
            raise self.error
        self.posted.append((header.block, landing))


class Asker:
    """An attention worker's blocks, of one row each."""

    def __init__(self, **options):
        self.pool, self.link = DevicePool("cpu"), AskedLink()
        self.client = MoeClient(
            0, WIDTH, Wire.FP8, 1, self.pool, 30.0, combined=RowType.BF16, **options
        )
        for outbox in self.client.routers.values():
            outbox.opened(self.link)

    def ask(self, **where):
        experts = torch.tensor([[0, 1]], dtype=torch.int32)
        x = torch.zeros(1, WIDTH)
        future = self.client.dispatch(3, 0, x, experts, torch.ones(1, 2), **where)
        block, landing = self.link.posted[-1]
        if landing is not None:
            values = torch.full((1, WIDTH), float(len(self.link.posted)), dtype=torch.bfloat16)
            landing.tensor.copy_(values.view(torch.uint8).view(-1))
            landing.retain()  # the link's
        return future, block, landing

    def answer(self, block, landing, kind=Kind.COMBINED):
        nbytes = landing.nbytes
        answer = Landed(kind, 3, block, nbytes, 7, 30, 2, 1)
        try:
            self.client.on_landed(self.link, answer, landing)
        finally:
            landing.release()


def test_rows_that_have_landed_are_copied_or_kept():
    async def main():
        asker = Asker()
        assert np.prod(row_segment(1, WIDTH, RowType.BF16).end) == 2 * WIDTH
        future, block, landing = asker.ask()
        asker.answer(block, landing)
        assert torch.equal(await future, torch.full((1, WIDTH), 1.0, dtype=torch.bfloat16))
        out = torch.zeros(1, WIDTH, dtype=torch.bfloat16)
        future, block, landing = asker.ask(out=out)
        asker.answer(block, landing)
        assert await future is out
        assert out.unique().tolist() == [2.0]
        kept = []
        future, block, landing = asker.ask(out=out, keep=lambda rows: kept.append(rows.retain()))
        asker.answer(block, landing)
        assert await future is out
        assert out.unique().tolist() == [2.0]
        (rows,) = kept
        assert rows.tensor.view(torch.bfloat16).unique().tolist() == [3.0]
        assert asker.pool.rows_outstanding == 1
        rows.release()
        assert asker.client.times.blocks == 3
        assert asker.client.times.queue_us == 21
        assert asker.pool.outstanding == asker.pool.rows_outstanding == 0

    asyncio.run(main())


def test_rows_of_another_block_or_kind_are_refused_and_the_right_ones_taken():
    async def main():
        asker = Asker()
        (one, first, place), (two, second, other) = asker.ask(), asker.ask()
        for landing, kind in ((other, Kind.COMBINED), (place, Kind.PARTIAL)):
            with pytest.raises(WireError, match="rows of another"):
                asker.answer(first, landing.retain(), kind)
        assert not one.done()
        asker.answer(second, other)
        asker.answer(first, place)
        assert (await one).unique().tolist() == [1.0]
        assert (await two).unique().tolist() == [2.0]
        assert asker.pool.rows_outstanding == 0

    asyncio.run(main())


def test_an_answer_after_the_deadline_is_late_and_its_place_stays_until_then():
    async def main():
        asker = Asker()
        future, block, landing = asker.ask()
        asker.client.deadline_s = -1.0
        asker.client.expire()
        with pytest.raises(Exception, match="no answer from router-0"):
            await future
        assert asker.pool.rows_outstanding == 1
        asker.answer(block, landing)
        assert asker.client.times.late == 1
        assert asker.pool.outstanding == asker.pool.rows_outstanding == 0

    asyncio.run(main())


def test_a_block_that_a_full_queue_refuses_gives_its_place_back():
    async def main():
        asker = Asker()
        asker.link.error = Overloaded("4096 messages wait for router-0, the limit is 4096")
        experts = torch.tensor([[0, 1]], dtype=torch.int32)
        future = asker.client.dispatch(3, 0, torch.zeros(1, WIDTH), experts, torch.ones(1, 2))
        with pytest.raises(Overloaded, match="wait for router-0"):
            await future
        assert asker.pool.outstanding == asker.pool.rows_outstanding == 0

    asyncio.run(main())


def test_a_router_that_comes_back_is_asked_again_for_the_same_place():
    async def main():
        asker = Asker()
        future, block, landing = asker.ask()
        (outbox,) = asker.client.routers.values()
        outbox.closed(asker.link)  # which gives its reference up when the router is gone
        asker.link = AskedLink()
        outbox.opened(asker.link)
        assert asker.link.posted == [(block, landing)]
        landing.retain()
        asker.answer(block, landing)
        assert (await future).unique().tolist() == [1.0]
        assert asker.pool.rows_outstanding == 1, "the lost router may yet write there"
        landing.release()
        assert asker.pool.outstanding == asker.pool.rows_outstanding == 0

    asyncio.run(main())


def test_an_answer_that_a_cancelled_client_no_longer_awaits_gives_its_place_back():
    async def main():
        asker = Asker()
        future, block, landing = asker.ask()
        future.cancel()
        asker.answer(block, landing)
        assert asker.pool.outstanding == asker.pool.rows_outstanding == 0

    asyncio.run(main())


def test_nothing_lands_where_several_routers_answer_in_part():
    async def main():
        routers = {i: Outbox(f"router-{i}") for i in range(2)}
        asker = Asker(routers=routers)
        _, block, landing = asker.ask()
        assert landing is None
        asker.client._fail(block, WireError("enough"))
        assert asker.pool.outstanding == asker.pool.rows_outstanding == 0

    asyncio.run(main())
