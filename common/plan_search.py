"""A search for a plan in a process of its own: it takes seconds of a core, which an event loop does not have.

`python -m common.plan_search` reads a pickled `Search` on stdin and writes a pickled `Found` on stdout. Both come over
a pipe from the process that started it.
"""

import asyncio
import os
import pickle
import sys
from dataclasses import dataclass

from common.errors import AtollError, DeadlineExceeded, Fatal
from common.placement.links import build_links
from common.placement.optimise import Options, moves, optimise
from common.placement.plan import Plan
from common.placement.routing_trace import RoutingTrace
from common.placement.score import Score, score
from common.placement.topology import Topology


@dataclass(frozen=True, slots=True)
class Search:
    """Find a plan of `epoch` to follow `previous`."""

    trace: RoutingTrace
    topology: Topology
    options: Options
    previous: Plan
    epoch: int


@dataclass(frozen=True, slots=True)
class Found:
    """Scores of the previous plan and of this one, on rows that the search has not seen."""

    plan: Plan
    before: Score
    after: Score
    num_moves: int  # experts that workers must load


def search(wanted: Search) -> Found:
    """Fitted on the first half of the trace, scored on the second. Raises ConfigError when there is no such plan."""
    fit, rest = wanted.trace.halves()
    plan = optimise(
        fit, wanted.topology, wanted.options, previous=wanted.previous, epoch=wanted.epoch
    )
    links = build_links(wanted.topology, wanted.options.row)
    before, after = score(wanted.previous, rest, links), score(plan, rest, links)
    return Found(plan, before, after, len(moves(wanted.previous, plan)))


async def search_apart(wanted: Search, *, deadline_s: float) -> Found:
    """`search` in a child of low priority. Raises what it raises, and DeadlineExceeded."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "common.plan_search", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )  # fmt: skip
    try:
        async with asyncio.timeout(deadline_s):
            answer, _ = await child.communicate(pickle.dumps(wanted))
    except TimeoutError as exc:
        raise DeadlineExceeded(f"no plan was found within {deadline_s:g} s") from exc
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        raise Fatal(f"the search for a plan ended with exit code {child.returncode}")
    found = pickle.loads(answer)
    if isinstance(found, AtollError):
        raise found
    assert isinstance(found, Found)
    return found


def _main() -> None:
    os.nice(10)
    try:
        answer: Found | AtollError = search(pickle.load(sys.stdin.buffer))
    except AtollError as exc:
        answer = exc
    sys.stdout.buffer.write(pickle.dumps(answer))


if __name__ == "__main__":
    # not this module's own classes, which a pickle from here would call __main__'s
    from common import plan_search

    plan_search._main()
