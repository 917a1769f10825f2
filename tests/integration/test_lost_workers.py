"""The gateway knows which expert workers are gone, and that they are back, without asking: a plan goes by it."""

import asyncio

import pytest

from common.ids import ProcessId, Role
from tests.inproc_cluster import inproc_cluster
from tests.integration.test_rebalance import LAYOUT, Gateway, until
from tests.oracle.configs import CONFIGS
from tests.oracle.reference import build_checkpoint

SPARE = 17  # of 18 workers for 16 experts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_checkpoint(tmp_path_factory.getbasetemp() / "lost-workers", CONFIGS[0])


def lost(gateway):
    return gateway.backends._lost_workers()


@pytest.mark.parametrize("victims", [(5,), (SPARE,), (0, 1, 2, 3, 4, 5)], ids=str)
def test_who_is_gone_and_who_is_back(model, tmp_path, victims):
    async def main():
        async with inproc_cluster(model, tmp_path, **LAYOUT) as cluster:
            gateway = await Gateway(cluster).settled()
            await until(lambda: not lost(gateway), "all have come")
            for worker in victims:
                cluster.crash(ProcessId(Role.EXPERT, worker))
            await until(lambda: lost(gateway) == set(victims), f"{victims} are gone")
            for worker in victims:
                await cluster.start(ProcessId(Role.EXPERT, worker))
            await until(lambda: not lost(gateway), f"{victims} are back")
            gateway.stop()

    asyncio.run(main())


def test_a_rail_that_is_gone_says_nothing_of_the_other_ones_workers(model, tmp_path):
    async def main():
        async with inproc_cluster(model, tmp_path, routers=2, **LAYOUT) as cluster:
            gateway = await Gateway(cluster).settled()
            router = cluster.services[ProcessId(Role.ROUTER, 0)]
            await until(lambda: not lost(gateway), "all have come")
            gateway.backends._links[ProcessId(Role.ROUTER, 0)].close("a cable was pulled")
            async with asyncio.timeout(20):
                while not lost(gateway):  # noqa: ASYNC110  -- at once: the dialler is about to be back
                    await asyncio.sleep(0)
            assert lost(gateway) == set(router.reported)
            await until(lambda: not lost(gateway), "it is back")
            gateway.stop()

    asyncio.run(main())
