"""Traces of the real services in one process: every block found whole, with 1 to 4 micro-batches."""

import asyncio

import pytest

from common.ids import Role
from common.model.small import write_small_model
from common.request import Request, SamplingParams
from deploy.trace.blocks import ROUND_TRIP, blocks
from deploy.trace.report import make_report
from deploy.trace.spans import align, parse
from services.attention.scheduler import Slice
from services.attention.sequence import Sequence
from tests.inproc_cluster import inproc_cluster

STEPS = 3


async def decode(attention, lane):
    """A prompt, then STEPS + 1 tokens one by one."""
    sequence = Sequence(Request(str(lane), (1, 2, 3), SamplingParams()), [1, 2, 3], 0, 3)
    sequence.pages = attention.requests.scheduler.pages.acquire(sequence, 32)
    await attention._lanes[lane].forward([Slice(sequence, 0, 3)])
    sequence.num_computed = 3
    for position in range(3, 4 + STEPS):
        sequence.token_ids.append(7 + lane)
        await attention._lanes[lane].forward([Slice(sequence, position, 1)])
        sequence.num_computed += 1


@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
def test_every_block_is_found_whole(tmp_path, lanes):
    model = write_small_model(tmp_path / "model")

    async def run():
        async with inproc_cluster(
            model, tmp_path / "run", microbatches=lanes, trace_events=4096
        ) as c:
            (attention,) = c.of(Role.ATTENTION)
            await asyncio.gather(*(decode(attention, lane) for lane in range(lanes)))
            services = [
                s for role in (Role.ATTENTION, Role.ROUTER, Role.EXPERT) for s in c.of(role)
            ]
            layers = attention.resident.config.moe_layers
            return align([parse(s.trace.to_json()) for s in services]), layers

    processes, layers = asyncio.run(run())
    found = blocks(processes)
    assert len(found) == lanes * len(layers) * (STEPS + 2)
    assert {b.layer for b in found} == set(layers)
    for block in found:
        assert all(ns >= 0 for ns in block.parts.values()), block.parts
        assert sum(block.parts[p] for p in ROUND_TRIP) == block.answered - block.posted
    report = make_report(processes, steps=lanes * STEPS)
    (row,) = report.to_json()["overlap"]
    assert row["microbatches"] == lanes
    shares = row["busy_percent"] + row["experts_owe_percent"] + row["exposed_percent"]
    assert shares == pytest.approx(100, abs=0.2)
    assert (
        tmp_path / "run" / "trace" / "attention-0.json"
    ).exists()  # written when the services stopped


def test_nothing_is_recorded_by_default(tmp_path):
    async def run():
        async with inproc_cluster(write_small_model(tmp_path / "model"), tmp_path / "run") as c:
            assert all(s.trace is None for s in c.services.values())

    asyncio.run(run())
    assert not (tmp_path / "run" / "trace").exists()
