"""When an expert worker computes what has come: a device that idles at once, else all that came by then together."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.config import ClusterConfig, ModelSection, Node
from common.errors import WireError
from common.transport.buffers import BufferPool
from common.transport.device import DevicePool
from common.transport.seam import Seam
from common.wire.header import Header, Kind, Wire
from services.expert import worker as module
from services.expert.worker import ExpertWorker

WIDTH = 128
CONFIG = ClusterConfig(
    model=ModelSection(path=Path("model")), nodes=(Node(attention=1, experts=1),)
)


class Stream:
    """What was launched, and how much of it is done."""

    def __init__(self):
        self.launched, self.done = [], 0

    def event(self):
        return Event(self)


class Event:
    """There when all is done that was launched before it was recorded."""

    def __init__(self, stream):
        self.stream = stream

    def record(self):
        self.number = len(self.stream.launched)

    def query(self):
        return self.stream.done >= self.number


class Asker:
    """A link: keeps the blocks that are answered."""

    def __init__(self):
        self.answered, self.refused = [], []

    def post(self, header, payload):
        if header.kind is Kind.FAILED:
            self.refused.append((header.block, payload.array.tobytes().decode()))
            return
        assert header.kind is Kind.EXPERT_OUT
        self.answered.append(header.block)


@pytest.fixture
def expert(monkeypatch):
    def new(*, on_device):
        stream, pool = Stream(), BufferPool()
        pool.polled = on_device

        def compute(bank, layer, calls):
            stream.launched.append([call.block for call in calls])
            return [torch.zeros(call.num_rows, WIDTH) for call in calls]

        monkeypatch.setattr(module, "compute", compute)

        def parse(header, payload, bank):
            if header.block >= 100:
                raise WireError(f"block {header.block} is malformed")
            return header

        monkeypatch.setattr(module, "parse", parse)
        seam = Seam(stream.event if on_device else None)
        worker = ExpertWorker(CONFIG, 0, SimpleNamespace(pool=pool, seam=seam))
        worker.bank = SimpleNamespace(written=lambda: None)
        worker.loop = asyncio.get_running_loop()
        worker.batcher.max_rows = 100
        return worker, stream, seam

    return new


def ask(worker, link, *blocks):
    for block in blocks:
        header = Header(Kind.EXPERT_IN, Wire.FP32, layer=1, width=WIDTH, num_rows=1, block=block)
        payload = worker.transport.pool.acquire(8)
        worker.on_message(link, header, payload)


def test_a_device_that_idles_begins_with_the_first_and_goes_on_with_all_that_came(expert):
    async def main():
        worker, stream, seam = expert(on_device=True)
        link = Asker()
        ask(worker, link, 1, 2, 3)
        assert stream.launched == [[1]], "at once"
        await asyncio.sleep(0)
        assert stream.launched == [[1], [2, 3]]
        ask(worker, link, 4, 5)
        await asyncio.sleep(0)
        assert len(stream.launched) == module.MAX_BATCHES, "no more at a time"
        stream.done = 1
        assert seam.poll()
        await asyncio.sleep(0)
        assert (link.answered, stream.launched[2:]) == ([1], [[4, 5]])
        stream.done = 3
        seam.poll()
        assert link.answered == [1, 2, 3, 4, 5]
        ask(worker, link, 6)
        assert stream.launched[3:] == [[6]], "it idles again"
        stream.done = 4
        seam.poll()
        assert worker.transport.pool.outstanding == 0

    asyncio.run(main())


def test_a_batch_that_was_launched_early_waits_for_the_device(expert, monkeypatch):
    now = [0]
    monkeypatch.setattr(module.time, "monotonic_ns", lambda: now[0])

    async def main():
        worker, stream, seam = expert(on_device=True)
        link, spans = Asker(), []
        worker.trace = SimpleNamespace(span=lambda name, *rest: spans.append((name, *rest[3:5])))
        now[0] = 1000
        ask(worker, link, 1)
        now[0] = 2000
        ask(worker, link, 2)
        await asyncio.sleep(0)
        for stream.done, now[0] in ((1, 9000), (2, 12000)):
            assert seam.poll()
        assert len(link.answered) == 2
        now[0] = 20000
        ask(worker, link, 3)
        stream.done, now[0] = 3, 26000
        assert seam.poll()
        assert spans == [
            ("queue", 1000, 1000), ("compute", 1000, 9000), ("queue", 2000, 9000), ("compute", 9000, 12000),
            ("queue", 20000, 20000), ("compute", 20000, 26000),
        ]  # fmt: skip
        assert worker.counters["compute_us"] == 8 + 3 + 6
        assert worker.counters["queue_us"] == 7

    asyncio.run(main())


def test_without_a_device_all_that_came_is_computed_together(expert):
    async def main():
        worker, stream, _ = expert(on_device=False)
        link = Asker()
        ask(worker, link, 1, 2, 3)
        assert stream.launched == []
        await asyncio.sleep(0)
        assert (stream.launched, link.answered) == ([[1, 2, 3]], [1, 2, 3])
        assert worker.transport.pool.outstanding == 0

    asyncio.run(main())


@pytest.mark.parametrize("on_device", [True, False])
def test_a_batch_that_is_malformed_launches_nothing_and_others_go_on(expert, on_device, caplog):
    async def main():
        worker, stream, seam = expert(on_device=on_device)
        link = Asker()
        ask(worker, link, 100)
        await asyncio.sleep(0)
        ask(worker, link, 1)
        await asyncio.sleep(0)
        ask(worker, link, 2, 101)
        await asyncio.sleep(0)
        stream.done = 2
        seam.poll()
        await asyncio.sleep(0)
        assert stream.launched == [[1], [2]]
        assert link.answered == [1, 2]
        assert link.refused == [(b, f"block {b} is malformed") for b in (100, 101)]
        assert worker.counters["failed"] == 2
        assert worker.transport.pool.outstanding == 0

    asyncio.run(main())
    assert not caplog.records


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_rows_that_are_where_they_are_wanted_need_no_payload(expert, monkeypatch, taken, there):
    """Unless the link does not take them so; rows that are elsewhere are sent."""

    class Wanting(Asker):
        def post_landed(self, header, rows):
            self.landed.append((header.block, header.num_rows, header.queue_us >= 0, rows))
            return taken

        def post(self, header, payload):
            super().post(header, payload)
            self.posted.append(payload.rows.block)

    async def main():
        worker, *_ = expert(on_device=False)
        pool = worker.transport.pool = DevicePool("cpu")
        link, landing = Wanting(), pool.acquire_rows(2 * WIDTH)
        link.landed, link.posted = [], []
        out = landing.block.matrix(torch.bfloat16, 0, 1, WIDTH)
        rows = out if there else torch.zeros(1, WIDTH, dtype=torch.bfloat16)
        monkeypatch.setattr(module, "compute", lambda bank, layer, calls: [rows])
        header = Header(Kind.EXPERT_IN, Wire.FP8, layer=1, width=WIDTH, num_rows=1, block=7)
        payload = pool.acquire(8)
        payload.landing = landing.retain()
        worker.on_message(link, header, payload)
        await asyncio.sleep(0)
        assert link.landed == ([(7, 1, True, landing)] if there else [])
        assert link.answered == ([] if there and taken else [7])
        assert [block is landing.block for block in link.posted] == [there] * len(link.answered)
        landing.release()
        assert pool.outstanding == pool.rows_outstanding == 0

    asyncio.run(main())
