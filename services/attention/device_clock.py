"""Times on the device for traces: CUDA events put into the stream, read in nanoseconds of the host's clock afterwards.

An event's time is known as the distance to another one, in fp32 milliseconds: half a microsecond is lost from 8 s on.
So every few seconds one event becomes the reference of the following; the first is tied to the host's clock.
"""

import time
from typing import Any

import torch

_REFERENCE_NS = 4_000_000_000


class DeviceClock:
    """Marks on the current stream of one thread; `ns` may be asked when the device has passed them."""

    def __init__(self) -> None:
        self._references = [_new_event()]
        self._times = [0.0]  # of the references, ns, as far as they were asked for
        self._references[0].record()
        self._references[0].synchronize()
        self._times[0] = self._newest_ns = float(time.monotonic_ns())

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
        """Nanoseconds of the host's monotonic clock. The device must have passed the mark."""
        if not isinstance(mark, tuple):
            return int(mark)
        reference, event = mark
        while len(self._times) <= reference:
            k = len(self._times)
            apart = self._references[k - 1].elapsed_time(self._references[k])
            self._times.append(self._times[-1] + 1e6 * apart)
        return int(self._times[reference] + 1e6 * self._references[reference].elapsed_time(event))


def _new_event() -> Any:  # noqa: ANN401
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
