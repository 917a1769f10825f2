"""Sends a workload: closed loop (so many at a time) or Poisson arrivals (so many per second)."""

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from time import perf_counter  # uvloop's own clock counts milliseconds
from typing import Any

import aiohttp

from loadgen.client import send
from loadgen.stats import Record
from loadgen.workload import poisson_times


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go; `timeout_s` bounds each of them."""

    url: str
    path: str
    headers: dict[str, str]
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """How many, how fast. `concurrency` 0 means Poisson arrivals at `rate` per second; whichever bound is reached
    first, `requests` or `duration_s` (0: none), ends the sending."""

    requests: int
    duration_s: float
    concurrency: int
    rate: float
    seed: int


async def run_load(
    target: Target, plan: Plan, bodies: Iterator[dict[str, Any]], stop: asyncio.Event
) -> list[Record]:
    """Send everything and wait for the ends; `stop` cancels what is under way. Every sent request has a record."""
    records: list[Record] = []
    timeout = aiohttp.ClientTimeout(total=target.timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(
            target.url, headers=target.headers, timeout=timeout, connector=connector
        ) as session,
        asyncio.TaskGroup() as group,
    ):
        sender = _Sender(session, target.path, iter(bodies), plan, records)
        work = group.create_task(sender.closed() if plan.concurrency else sender.poisson())
        stopper = group.create_task(_cancel_when(stop, work))
        work.add_done_callback(lambda _: stopper.cancel())
    return records


async def _cancel_when(stop: asyncio.Event, work: asyncio.Task[None]) -> None:
    await stop.wait()
    work.cancel()


class _Sender:
    def __init__(
        self, session: aiohttp.ClientSession, path: str, bodies: Iterator[dict[str, Any]],
        plan: Plan, records: list[Record],
    ) -> None:  # fmt: skip
        self._session = session
        self._path = path
        self._bodies = bodies
        self._plan = plan
        self._records = records
        self._start = perf_counter()

    async def closed(self) -> None:
        """`concurrency` loops, each sending its next request when the last one ended."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._plan.concurrency):
                group.create_task(self._loop())

    async def _loop(self) -> None:
        while self._more():
            await self._send(lag_s=0.0)

    async def poisson(self) -> None:
        """Requests at random times, whatever became of the earlier ones."""
        async with asyncio.TaskGroup() as group:
            for when in poisson_times(self._plan.rate, self._plan.seed):
                await asyncio.sleep(self._start + when - perf_counter())
                if not self._more():
                    break
                group.create_task(self._send(lag_s=perf_counter() - self._start - when))

    def _more(self) -> bool:
        in_time = not self._plan.duration_s or perf_counter() - self._start < self._plan.duration_s
        return in_time and (not self._plan.requests or len(self._records) < self._plan.requests)

    def _send(self, *, lag_s: float) -> Coroutine[Any, Any, None]:
        """Takes its record at once, so that `_more` has counted it before the task runs."""
        record = Record(len(self._records), perf_counter(), lag_s=lag_s)
        self._records.append(record)
        return send(self._session, self._path, next(self._bodies), record)
