"""What `tests.bench.gpu.hop` measures of rows that land: both of its sides in one process, on the CPU."""

import asyncio

import pytest

from common.transport.link import LinkLimits
from common.transport.seam import Seam
from common.transport.ucx_link import UcxLink
from common.waiting import poll_until
from tests.bench.gpu.hop import Side
from tests.bench.gpu.hop_landed import FLIGHTS, Asking, landed_figures
from tests.contract.harness import ROUTER, DeviceUcxNet, hello, run
from tests.contract.rows import ManualEvent, ReachingUcxNet, check_no_block_leaked

LIMITS = LinkLimits(window=64, max_queued=64, max_payload_nbytes=16 << 20)
NBYTES = 70_000
KEYS = {"landed_us"} | {
    f"landed_{figure}_{flight}" for figure in ("us_per_message", "gb_per_s") for flight in FLIGHTS
}


async def sides(net, **options):
    """The near side, with its questions to the far one."""
    dialler, listener = net.transport(LIMITS), net.transport(LIMITS, **options)
    near, far = Side(dialler), Side(listener)
    address = await listener.listen(net.address(), ROUTER, far)
    link = await dialler.connect(address, hello(), near, timeout_s=5)
    await far.opened.wait()
    near.asking = Asking(link, dialler.pool, NBYTES)
    return near, far


@pytest.mark.parametrize(
    ("kind", "shortly", "landed", "short"),
    [
        (ReachingUcxNet, True, 270, 270),
        (ReachingUcxNet, False, 270, 0),
        (DeviceUcxNet, True, 0, 0),
    ],
    ids=["without a payload", "with one", "out of reach"],
)
def test_figures_are_of_rows_that_landed(tmp_path, monkeypatch, kind, shortly, landed, short):
    net = kind(tmp_path)
    if not shortly:
        monkeypatch.setattr(UcxLink, "post_landed", lambda *_: False)

    async def main():
        near, far = await sides(net)
        asking = near.asking
        figures = await landed_figures(asking, NBYTES, 60, 70)
        assert figures.keys() == (KEYS if landed else set())
        assert all(figure > 0 for figure in figures.values())
        assert (asking.num_answers, asking.num_landed, asking.num_short) == (270, landed, short)
        asking.close()  # having looked at the rows
        far.answering.close()

    run(net, main)
    check_no_block_leaked(net)


def test_a_hop_lies_within_its_question_and_answer(tmp_path):
    net = ReachingUcxNet(tmp_path)

    async def main():
        near, far = await sides(net)
        hops, us = await near.asking.ask(100, 1)
        assert len(hops) == 100
        assert min(hops) > 0
        assert sum(hops) / 100 < us
        await near.asking.ask(100, 1)
        near.asking.close()
        far.answering.close()

    run(net, main)
    check_no_block_leaked(net)


class CountedSeam(Seam):
    """Of a device that stands still; `num` fences."""

    def __init__(self):
        super().__init__(ManualEvent)
        self.num = 0

    def fence(self, query=None):
        self.num += 1
        return super().fence(query)


def test_questions_that_come_while_the_device_writes_are_answered_behind_one_fence(tmp_path):
    net, seam = ReachingUcxNet(tmp_path), CountedSeam()

    async def main():
        ManualEvent.passed = False
        near, far = await sides(net, seam=seam)
        asking = asyncio.create_task(near.asking.ask(8, 8))
        await poll_until(lambda: seam.num == 2 and not far.answering._due)
        await asyncio.sleep(0.05)
        assert near.asking.num_answers == 0
        assert seam.num == 2, "the first at once, and seven that came together"
        ManualEvent.passed = True
        hops, _ = await asking
        assert min(hops) > 40_000, "from before the device stood still"
        await near.asking.ask(32, 1)  # so that all places have been asked for
        near.asking.close()
        far.answering.close()

    run(net, main)
    check_no_block_leaked(net)


def test_other_rows_than_the_far_sides_are_noticed(tmp_path):
    net = ReachingUcxNet(tmp_path)

    async def main():
        near, _ = await sides(net)
        await near.asking.ask(31, 8)
        with pytest.raises(AssertionError, match="other rows than were asked for"):
            near.asking.close()

    run(net, main, leak_free=False)
