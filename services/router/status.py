"""Status of a node: the router's own entry and its experts', asked for when somebody wants to know.

Asking costs one frame per expert and only when /cluster or /metrics is read, so an idle cluster stays idle. An expert
that does not answer in time is reported with its last known entry; one that is not connected, as lost.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from common.errors import LinkClosed
from common.status import status_frame
from common.transport.base import Link, tell

Entry = dict[str, Any]


class StatusGather:
    """Open questions to experts. `entries` returns what is known now, own entry first."""

    def __init__(self, entries: Callable[[], list[Entry]], *, wait_s: float) -> None:
        self._entries = entries
        self._wait_s = wait_s
        self._next_id = 0
        self._open: dict[int, tuple[set[Link], Callable[[], None]]] = {}

    def ask(self, asker: Link, request_id: int | None, experts: list[Link]) -> None:
        """Answer `asker` when every expert has answered, or when the time is up."""
        self._next_id += 1
        own_id = self._next_id

        def finish() -> None:
            if self._open.pop(own_id, None) is not None:
                timer.cancel()
                tell([asker], status_frame(request_id, self._entries()))

        timer = asyncio.get_running_loop().call_later(self._wait_s, finish)
        waiting: set[Link] = set()
        self._open[own_id] = (waiting, finish)
        for link in experts:
            try:
                link.send_control({"type": "status_request", "id": own_id})
                waiting.add(link)
            except LinkClosed:
                continue  # its on_close is on the way
        if not waiting:
            finish()

    def answered(self, link: Link, own_id: int | None) -> None:
        """An expert answered (its entry is stored already)."""
        waiting, finish = self._open.get(own_id or 0, (set(), None))
        waiting.discard(link)
        if finish is not None and not waiting:
            finish()
