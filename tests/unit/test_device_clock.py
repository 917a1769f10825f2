"""Times of a device whose clock goes wrong, as the host's."""

import pytest

from services.attention import device_clock
from services.attention.device_clock import DeviceClock

START_NS, DRIFT = 5_000_000_000, 1 + 2e-5  # 1.2 ms in a minute


class Host:
    """A clock, and events that see it drift."""

    def __init__(self):
        self.ns = START_NS

    def event(self):
        host = self

        class Event:
            def record(self):
                self.device_ms = host.ns / 1e6 * DRIFT

            def synchronize(self): ...

            def elapsed_time(self, other):
                return other.device_ms - self.device_ms

        return Event()


@pytest.fixture
def host(monkeypatch):
    host = Host()
    monkeypatch.setattr(device_clock, "_new_event", host.event)
    monkeypatch.setattr("time.monotonic_ns", lambda: host.ns)
    return host


@pytest.mark.parametrize("seconds", [2, 60])
def test_marks_are_read_on_the_hosts_clock(host, seconds):
    clock = DeviceClock()
    marks = []
    for _ in range(seconds * 10):
        host.ns += 100_000_000
        marks.append((host.ns, clock.mark()))
    for expected, mark in marks:
        assert abs(clock.ns(mark) - expected) < 2000
    assert clock.ns(17) == 17


def test_a_short_run_says_nothing_of_the_rate(host):
    clock = DeviceClock()
    host.ns += 1_000_000
    mark = clock.mark()
    host.ns += 500_000  # the wait ends late
    assert abs(clock.ns(mark) - START_NS - 1_000_000) < 1000
