"""Times on the device for traces: CUDA events put into the stream, read in nanoseconds of the host's clock afterwards.

An event's time is known as the distance to another one, in fp32 milliseconds: half a microsecond is lost from 8 s on.
So every few seconds one event becomes the reference of the following. The first is tied to the host's clock, and so is
one made when times are first asked for: the device's clock goes its own way, by 1.2 ms in a minute (H100, 2026-11-25).
"""

import time
from typing import Any

import torch

_REFERENCE_NS = 4_000_000_000
_RATE_NS = (
    1e9  # less apart, the two ties say less of the clocks than of how long a wait takes to end
)


class DeviceClock:
    """Marks on the current stream of one thread; `ns` may be asked when the device has passed them."""

    def __init__(self) -> None:
        event, self._origin_ns = _tie()
        self._references = [event]
        self._times = [0.0]  # of the references, device ns since the first
        self._newest_ns = self._origin_ns
        self._rate = 0.0  # host ns per device ns, 0 until it is known

    def mark(self) -> tuple[int, Any]:
        """What the stream reaches after everything launched so far."""
        event = _new_event()
        event.record()
        mark = len(self._references) - 1, event
        now = time.monotonic_ns()
        if now - self._newest_ns > _REFERENCE_NS:
            self._references.append(event)
            self._newest_ns = now
        return mark

    def ns(self, mark: Any) -> int:  # noqa: ANN401  -- a mark, or nanoseconds
        """Nanoseconds of the monotonic clock. The device must have passed the mark; the first call waits for it."""
        if not isinstance(mark, tuple):
            return int(mark)
        if not self._rate:
            self._tie_again()
        reference, event = mark
        since = self._times[reference] + 1e6 * self._references[reference].elapsed_time(event)
        return int(self._origin_ns + self._rate * since)

    def _tie_again(self) -> None:
        event, now_ns = _tie()
        self._references.append(event)
        for before, after in zip(self._references, self._references[1:], strict=False):
            self._times.append(self._times[-1] + 1e6 * before.elapsed_time(after))
        host, device = now_ns - self._origin_ns, self._times[-1]
        self._rate = host / device if device > _RATE_NS else 1.0


def _tie() -> tuple[Any, int]:
    """An event that the device has passed, and when it had."""
    event = _new_event()
    event.record()
    event.synchronize()
    return event, time.monotonic_ns()


def _new_event() -> Any:  # noqa: ANN401
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
