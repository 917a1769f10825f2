"""Waiting for a condition that has no event of its own."""

import asyncio
from collections.abc import Callable


async def poll_until(condition: Callable[[], bool], *, every_s: float = 0.01) -> None:
    """Return once `condition()` holds. For draining, which is rare: an event would be kept current on every message."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(every_s)
