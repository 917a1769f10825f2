"""Fences in one stream of device work: by an event, or by whatever tells that the device has come so far."""

from common.transport.seam import Seam


class Stream:
    """Events that the test passes one by one, and how often each was recorded and asked."""

    def __init__(self):
        self.events = []

    def event(self):
        event = Event()
        self.events.append(event)
        return event


class Event:
    def __init__(self):
        self.recorded = self.asked = 0
        self.there = False

    def record(self):
        self.recorded += 1
        self.there = False

    def query(self):
        self.asked += 1
        return self.there


def test_a_fence_is_passed_when_its_query_says_so_and_needs_no_event():
    stream, opened, seen = Stream(), [], []
    seam, there = Seam(stream.event), []
    seam.on_open = lambda: opened.append(1)
    fence = seam.fence(lambda: bool(there))
    fence.then(lambda: seen.append("a"))
    fence.then(lambda: seen.append("b"))
    assert (seam.poll(), seam.is_open, seen, opened) == (False, True, [], [1])
    there.append(1)
    assert (seam.poll(), seam.is_open, seen, fence.passed) == (True, False, ["a", "b"], True)
    assert stream.events == []


def test_fences_of_both_kinds_are_passed_in_the_order_of_the_stream():
    stream, seen, there = Stream(), [], [True, False]
    seam = Seam(stream.event)
    for name, query in (("event", None), ("number", lambda: there[0]), ("last", lambda: there[1])):
        seam.fence(query).then(lambda name=name: seen.append(name))
    assert not seam.poll(), "the number is there, and what lies before it is not"
    (event,) = stream.events
    event.there = True
    assert seam.poll()
    assert seen == ["event", "number"]
    asked = event.asked
    assert not seam.poll()
    assert event.asked == asked, "a fence that is passed is not asked again"
    there[1] = True
    assert seam.poll()
    assert seen == ["event", "number", "last"]
    assert repr(seam) == "<Seam [0 open fences]>"


def test_events_are_used_again_and_numbers_are_not_taken_for_them():
    stream = Stream()
    seam = Seam(stream.event)
    for _ in range(3):
        seam.fence(lambda: True)
        seam.fence()
        stream.events[-1].there = True
        assert seam.poll()
    (event,) = stream.events
    assert event.recorded == 3


def test_a_call_that_raises_keeps_no_other_from_its_turn(caplog):
    stream, seen = Stream(), []
    seam = Seam(stream.event)
    first, second = seam.fence(lambda: True), seam.fence(lambda: True)
    first.then(lambda: 1 / 0)
    first.then(lambda: seen.append("of the same fence"))
    second.then(lambda: seen.append("of the next"))
    assert seam.poll()
    assert seen == ["of the same fence", "of the next"]
    assert (first.calls, second.calls, seam.is_open) == ([], [], False)
    assert "ZeroDivisionError" in caplog.text


def test_without_a_device_nothing_is_asked():
    fence = Seam().fence(lambda: 1 / 0)
    assert fence.passed


def test_a_fence_that_is_reached_makes_its_calls_when_somebody_polls():
    stream, seen = Stream(), []
    seam = Seam(stream.event)
    fence = seam.fence()
    fence.then(lambda: seen.append("call"))
    assert not fence.reached()
    stream.events[0].there = True
    assert (fence.reached(), fence.passed, seen) == (True, False, [])
    assert seam.poll()
    assert (fence.passed, seen) == (True, ["call"])
    seam.fence()  # the event is used again
    assert fence.reached()
