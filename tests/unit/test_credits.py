"""Credits under any interleaving: never negative, never lost, never stuck."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.errors import WireError
from common.transport.credits import Credits

settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")

A, B = 0, 1


class TwoEnds(RuleBasedStateMachine):
    """Both ends of a link and the wires between them, driven in any order."""

    def __init__(self):
        super().__init__()
        self.windows = (3, 8)  # of A and B: odd and even, small
        self.ends = [
            Credits(self.windows[B], self.windows[A]),
            Credits(self.windows[A], self.windows[B]),
        ]
        self.wires = [deque(), deque()]  # towards A, towards B: (is data, credits)
        self.held = [0, 0]
        self.wanted = [0, 0]  # messages that the application wants to send

    def send(self, end):
        if self.wanted[end] and self.ends[end].take():
            self.wanted[end] -= 1
            self.wires[1 - end].append((True, self.ends[end].collect()))

    @rule(end=st.sampled_from([A, B]), count=st.integers(1, 5))
    def want(self, end, count):
        self.wanted[end] += count
        self.send(end)

    @rule(end=st.sampled_from([A, B]))
    def transmit(self, end):
        self.send(end)

    @precondition(lambda self: any(self.wires))
    @rule(end=st.sampled_from([A, B]))
    def receive(self, end):
        if self.wires[end]:
            is_data, credits = self.wires[end].popleft()
            self.ends[end].granted(credits)
            if is_data:
                self.ends[end].arrived()
                self.held[end] += 1

    @precondition(lambda self: any(self.held))
    @rule(end=st.sampled_from([A, B]))
    def free(self, end):
        if self.held[end]:
            self.held[end] -= 1
            if self.ends[end].freed():
                self.wires[1 - end].append((False, self.ends[end].collect()))

    @invariant()
    def every_credit_is_somewhere(self):
        for end in (A, B):
            sender, receiver = self.ends[end], self.ends[1 - end]
            assert sender.available >= 0
            in_flight = sum(is_data for is_data, _ in self.wires[1 - end])
            returning = sum(credits for _, credits in self.wires[end])
            total = sender.available + in_flight + self.held[1 - end] + receiver.owed + returning
            assert total == self.windows[1 - end]

    def teardown(self):
        """Whatever happened before: once receivers free what they hold, everything wanted gets through."""
        for _ in range(10_000):
            if not (any(self.wanted) or any(self.wires) or any(self.held)):
                return
            for end in (A, B):
                self.receive(end)
                self.free(end)
                self.send(end)
        raise AssertionError(f"deadlock: {self.ends} want {self.wanted}")


TestTwoEnds = TwoEnds.TestCase


@given(st.integers(1, 200))
def test_a_full_window_comes_back_without_other_traffic(window):
    sender, receiver = Credits(window, 1), Credits(1, window)
    for _ in range(3 * window):
        if not sender.take():
            raise AssertionError("stuck")
        receiver.arrived()
        if receiver.freed():
            sender.granted(receiver.collect())


def test_no_credit_no_message():
    credits = Credits(2, 2)
    assert [credits.take() for _ in range(3)] == [True, True, False]
    assert repr(credits) == "<Credits [0/2 available | 0 owed]>"


def test_a_peer_that_returns_too_much_is_an_error():
    credits = Credits(2, 2)
    assert credits.take()
    with pytest.raises(WireError, match="1 more credits"):
        credits.granted(2)


def test_a_peer_that_overruns_its_window_is_an_error():
    credits = Credits(2, 2)
    credits.arrived()
    credits.arrived()
    with pytest.raises(WireError, match="window of 2"):
        credits.arrived()


@pytest.mark.parametrize("windows", [(0, 1), (1, 0), (-1, 5)])
def test_a_window_has_at_least_one_message(windows):
    with pytest.raises(ValueError, match="at least 1"):
        Credits(*windows)
