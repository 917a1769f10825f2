"""Where device work meets messages: UCX knows nothing of CUDA streams, so a send waits here for the kernels before it.

A `Fence` is a point in the device's stream; what was launched before it is done when it is. The transport's reactor
polls the fences while it progresses messages, and does not sleep while one is open: nothing blocks the loop. Without a
device every fence is passed at once, so that the same code runs everywhere.
"""

import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)


class Event(Protocol):
    """A CUDA event: recorded on the current stream, asked without waiting."""

    def record(self) -> None: ...

    def query(self) -> bool: ...


class Fence:
    """A point in the stream. `passed` turns True in `Seam.poll`, which then makes the calls in their order."""

    __slots__ = ("calls", "passed", "query")

    def __init__(self, *, passed: bool, query: Callable[[], bool] | None = None) -> None:
        self.passed = passed
        self.query = query  # until it is passed
        self.calls: list[Callable[[], None]] = []

    def reached(self) -> bool:
        """Whether the device is there, though nobody may have looked and made the calls yet."""
        return self.passed or (self.query is not None and self.query())

    def then(self, call: Callable[[], None]) -> None:
        """Make `call` once the fence is passed: now if it is."""
        if self.passed:
            call()
        else:
            self.calls.append(call)


WRITTEN = Fence(passed=True)  # of what the device has nothing to do with any more


class Seam:
    """The open fences of a process, all of one stream. `on_open` is called for each new one: somebody must poll."""

    def __init__(self, new_event: Callable[[], Event] | None = None) -> None:
        """`new_event` makes a CUDA event; None: there is no device and nothing to wait for."""
        self.on_open: Callable[[], None] | None = None
        self._new_event = new_event
        self._events: list[Event] = []
        self._open: deque[tuple[Event | None, Fence]] = deque()

    def __repr__(self) -> str:
        return f"<Seam [{len(self._open)} open fences]>"

    @property
    def is_open(self) -> bool:
        """True while a fence is."""
        return bool(self._open)

    def fence(self, query: Callable[[], bool] | None = None) -> Fence:
        """A fence behind everything launched so far on the current stream, or at what `query` tells of.

        That must lie in the same stream, behind every fence that is open.
        """
        if self._new_event is None:
            return WRITTEN
        event = None
        if query is None:
            event = self._events.pop() if self._events else self._new_event()
            event.record()
            query = event.query
        fence = Fence(passed=False, query=query)
        self._open.append((event, fence))
        if self.on_open is not None:
            self.on_open()
        return fence

    def poll(self) -> bool:
        """Look at the open fences, oldest first; True when one was passed.

        A call that raises is logged: others wait for their turn, and whoever looks has nothing to do with it.
        """
        passed = []
        # one stream: none is passed before those in front
        while self._open and self._open[0][1].reached():
            event, fence = self._open.popleft()
            passed.append(fence)
            if event is not None:
                self._events.append(event)
        if not passed:
            return False
        for fence in passed:
            fence.passed, fence.query = True, None
            for call in fence.calls:
                try:
                    call()
                except Exception:
                    log.exception("what waited for the device raised")
            fence.calls.clear()
        return True
