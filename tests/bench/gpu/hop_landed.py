"""The second way in which rows travel, for `hop`: the answering side writes them where the asker wants them.

A question has a few bytes of rows and a place (`landing`) for those of its answer. The far side copies rows of its own
there, and once the device has done it a header alone says so. Questions that come while the device writes are answered
together, behind one fence, as an expert worker does; a lone one is at once.

The hop begins just before the far side launches the copy and ends when the near side is told that the rows are there.
Both read the clock of one host, and an answer brings the far side's moment along.
"""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from statistics import median

from common.transport.base import Link
from common.transport.buffers import Buffer
from common.transport.device import (
    DeviceBlock,
    DevicePool,
    DeviceRows,
    open_copy,
)
from common.transport.seam import Seam
from common.wire.header import Header, Kind, Landed, Wire
from tests.device import synchronise

LAND = 3  # layer of a header, beside those of `hop`
FLIGHTS = (1, 8, 32)
OWN = 0xA5  # every byte of the far side's rows
_QUESTION_NBYTES = 16
_WARM_UP = 50  # all places are known to the other side by then
_Answer = tuple[Link, Header, Buffer]  # and the question's payload


class Answering:
    """The far side."""

    def __init__(self, pool: DevicePool, seam: Seam) -> None:
        self._pool, self._seam = pool, seam
        self._copy = open_copy(pool.device)
        self._own: DeviceBlock | None = None
        self._due: list[_Answer] = []
        self._num_open = 0  # fences

    def add(self, link: Link, question: Header, payload: Buffer) -> None:
        """A question, whose payload is taken over."""
        own = self._rows(question.num_rows)
        began = time.monotonic_ns()
        if payload.landing is not None:
            self._copy(payload.landing.address, own.address, payload.landing.nbytes)
        header = question.derive(Kind.EXPERT_OUT, target=0, payload_nbytes=0)
        header.num_rows = question.num_rows
        # times of a service, which nobody else reads here: together they hold all 64 bits
        header.compute_us, header.queue_us = divmod(began, 1 << 32)
        self._due.append((link, header, payload))
        if self._num_open == 0:
            self._wait()
        elif len(self._due) == 1:  # what has arrived by now is handled before
            asyncio.get_running_loop().call_soon(self._wait)

    def close(self) -> None:
        """Nothing is asked any more."""
        if self._own is not None:
            self._own.release()
            self._own = None

    def _wait(self) -> None:
        """For the device: all copies so far are answered behind it."""
        due, self._due = self._due, []
        if due:  # else a later question found the device idle and took these along
            self._num_open += 1
            self._seam.fence().then(partial(self._written, due))

    def _written(self, answers: list[_Answer]) -> None:
        self._num_open -= 1
        for link, header, payload in answers:
            landing = payload.landing
            if landing is None or not link.post_landed(header, landing):
                self._post(link, header, landing)
            payload.release()

    def _post(self, link: Link, header: Header, landing: DeviceRows | None) -> None:
        """As a message with a payload. Without a landing in reach the rows travel as any others."""
        if landing is None:
            landing = self._rows(header.num_rows).rows(0, header.num_rows)
        else:
            landing.retain()
        header.combine_us = 1  # tells them from those of `post_landed`
        answer = self._pool.acquire_with(landing)
        link.post(header, answer)
        answer.release()

    def _rows(self, nbytes: int) -> DeviceBlock:
        """Rows of its own, the same for all questions of that size."""
        if self._own is None or self._own.capacity < nbytes:
            self.close()
            self._own = self._pool.take(nbytes)
            self._own.tensor.fill_(OWN)
        return self._own


class Asking:
    """The near side: questions for `nbytes` of rows, with enough places for all that are in flight."""

    def __init__(self, link: Link, pool: DevicePool, nbytes: int) -> None:
        self.num_landed = self.num_short = self.num_answers = 0  # short: by `post_landed`
        self._link, self._pool, self._nbytes = link, pool, nbytes
        self._moments: list[tuple[int, int]] = []  # an answer's rows: begun, there (ns)
        self._next: Callable[[], None] | None = None
        count = max(FLIGHTS)
        self._places = [pool.acquire_rows(nbytes) for _ in range(count)]
        self._questions = [
            pool.acquire(_QUESTION_NBYTES, rows_nbytes=_QUESTION_NBYTES) for _ in range(count)
        ]
        for place in self._places:
            place.tensor.zero_()
        synchronise(pool.device)  # before anybody else writes there

    def on_answer(self, answer: Header | Landed) -> None:
        """The rows of an answer are in their place."""
        there = time.monotonic_ns()
        self._moments.append((answer.compute_us << 32 | answer.queue_us, there))
        self.num_answers += 1
        has_landed = isinstance(answer, Landed) or bool(answer.landed)
        self.num_landed += has_landed
        self.num_short += has_landed and answer.combine_us == 0
        assert self._next is not None, "an answer to nothing"
        self._next()

    async def ask(self, num: int, flight: int) -> tuple[list[float], float]:
        """Ask `num` times, up to `flight` at a time: microseconds of each hop, and of all per answer."""
        free = deque(zip(self._places, self._questions, strict=True))
        self._moments = []
        left, done = num, asyncio.Event()

        def post() -> None:
            nonlocal left
            left -= 1
            free.rotate()  # to the one whose answer was longest ago
            place, question = free[0]
            header = Header(Kind.EXPERT_IN, Wire.FP8, LAND, 1, 1, num_rows=self._nbytes)
            self._link.post(header, question, landing=place)

        def answered() -> None:
            if left:
                post()
            elif len(self._moments) == num:
                done.set()

        self._next = answered
        began = time.monotonic_ns()
        for _ in range(min(flight, num)):
            post()
        async with asyncio.timeout(60):
            await done.wait()
        hops = [(there - begun) / 1e3 for begun, there in self._moments]
        return hops, (self._moments[-1][1] - began) / 1e3 / num

    def close(self) -> None:
        """Raises AssertionError when a place has something else than the far side's rows."""
        synchronise(self._pool.device)
        for place, question in zip(self._places, self._questions, strict=True):
            assert place.tensor.eq(OWN).all(), "other rows than were asked for"
            place.release()
            question.release()


async def landed_figures(asking: Asking, nbytes: int, rounds: int, num: int) -> dict[str, float]:
    """Figures for a row of the table; none where rows did not land, since they would be of another way."""
    hops, _ = await asking.ask(rounds, 1)
    found = {"landed_us": round(median(hops[_WARM_UP:]), 1)}
    for flight in FLIGHTS:
        _, us = await asking.ask(num, flight)
        found[f"landed_us_per_message_{flight}"] = round(us, 1)
        found[f"landed_gb_per_s_{flight}"] = round(nbytes / us / 1e3, 1)
    if asking.num_short < asking.num_answers:
        print(
            f"of {asking.num_answers} answers the rows of {asking.num_landed} were written where they were wanted, "
            f"{asking.num_short} of them without a payload",
            file=sys.stderr,
        )
    return found if asking.num_landed == asking.num_answers else {}
