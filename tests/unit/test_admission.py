"""Admission: order, choice of worker, bounds and deadlines; and its invariants under any sequence of calls."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from common.errors import Overloaded
from services.gateway.admission import Admission, Offer


def admission(*, workers=2, max_queued=4, max_running=2, ready=True, patience_s=60.0):
    made = Admission(
        range(workers),
        max_queued=max_queued,
        max_running=max_running,
        now=0.0,
        patience_s=patience_s,
    )
    for index in range(workers if ready else 0):
        made.set_ready(index, True, now=0.0)
    return made


def offer(made, *ids, tokens=10, deadline=1000.0):
    made.offer([Offer(id_, tokens, deadline) for id_ in ids])


def test_the_worker_with_the_fewest_outstanding_tokens_ties_by_index():
    made = admission()
    offer(made, "a", tokens=30)
    offer(made, "b", tokens=10)
    offer(made, "c", tokens=10)
    assert made.step(0.0).assigned == [("a", 0), ("b", 1), ("c", 1)]
    assert made.outstanding() == {0: 30, 1: 20}
    made.finish("a")
    offer(made, "d")
    assert made.step(0.0).assigned == [("d", 0)]
    assert repr(made) == "<Admission [waiting 0/4 | 0: 1/2, 10 tokens | 1: 2/2, 20 tokens]>"


def test_nobody_overtakes_and_workers_stay_within_their_limit():
    made = admission(workers=1)
    offer(made, "a", "b", "c", "d")
    assert made.step(0.0).assigned == [("a", 0), ("b", 0)]
    made.finish("b")
    assert made.step(0.0).assigned == [("c", 0)]


def test_offers_are_taken_all_or_none():
    made = admission(workers=1, max_queued=1)
    with pytest.raises(Overloaded, match="0 requests are waiting and at most 1 may"):
        offer(made, "a", "b", "c", "d")
    assert made.num_waiting == 0
    offer(made, "a", "b", "c")  # two will run at once
    made.step(0.0)
    assert (made.num_running, made.num_waiting) == (2, 1)
    with pytest.raises(Overloaded):
        offer(made, "e")


def test_a_requeued_request_gets_its_place_back():
    made = admission(workers=1, max_running=1)
    offer(made, "a", "b", "c")
    assert made.step(0.0).assigned == [("a", 0)]
    assert made.running_on(0) == ["a"]
    made.set_ready(0, False, now=1.0)
    made.requeue("a")
    assert made.step(1.0).assigned == []
    made.set_ready(0, True, now=2.0)
    assert made.step(2.0).assigned == [("a", 0)]


def test_deadlines_expire_waiting_and_running_requests():
    made = admission(workers=1, max_running=1)
    offer(made, "a", deadline=5.0)
    offer(made, "b", deadline=3.0)
    offer(made, "c", deadline=9.0)
    made.step(0.0)
    assert made.next_wakeup() == 3.0
    assert made.step(2.9).expired == []
    assert made.step(3.0).expired == ["b"]
    decisions = made.step(6.0)
    assert (decisions.expired, decisions.assigned) == (["a"], [("c", 0)])


def test_without_any_ready_worker_patience_ends():
    made = admission(ready=False, patience_s=10.0)
    offer(made, "a")
    assert not made.any_ready
    assert made.next_wakeup() == 10.0
    assert made.step(9.9).unserved == []
    assert made.step(10.0).unserved == ["a"]
    made.set_ready(1, True, now=11.0)
    offer(made, "b")
    assert made.step(11.0).assigned == [("b", 1)]


@settings(max_examples=60, stateful_step_count=40, deadline=None)
class AdmissionMachine(RuleBasedStateMachine):
    """Any order of calls keeps order, limits and the books."""

    @initialize(workers=st.integers(1, 3), running=st.integers(1, 3), queued=st.integers(0, 5))
    def start(self, workers, running, queued):
        self.limits = (running, queued)
        self.made = admission(
            workers=workers, max_running=running, max_queued=queued, ready=False, patience_s=7.0
        )
        self.workers = workers
        self.ready = set()
        self.now = 0.0
        self.count = 0
        self.waiting = {}  # id -> (arrival, tokens, deadline)
        self.running = {}  # id -> (worker, arrival, tokens, deadline)

    @rule(tokens=st.lists(st.integers(1, 50), min_size=1, max_size=4), ttl=st.integers(1, 30))
    def offer(self, tokens, ttl):
        offers = [Offer(f"r{self.count + i}", t, self.now + ttl) for i, t in enumerate(tokens)]
        free = sum(
            self.limits[0] - sum(r[0] == w for r in self.running.values()) for w in self.ready
        )
        if len(self.waiting) + len(offers) > self.limits[1] + free:
            with pytest.raises(Overloaded):
                self.made.offer(offers)
            return
        self.made.offer(offers)
        for o in offers:
            self.waiting[o.id] = (self.count, o.tokens, o.deadline)
            self.count += 1

    @rule(data=st.data())
    def flip(self, data):
        worker = data.draw(st.integers(0, self.workers - 1))
        ready = worker not in self.ready
        (self.ready.add if ready else self.ready.discard)(worker)
        self.made.set_ready(worker, ready, now=self.now)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), requeue=st.booleans())
    def leave(self, data, requeue):
        id_ = data.draw(st.sampled_from(sorted(self.running)))
        _, *rest = self.running.pop(id_)
        if requeue:
            self.made.requeue(id_)
            self.waiting[id_] = tuple(rest)
        else:
            self.made.finish(id_)
            self.made.finish(id_)

    @rule(by=st.integers(0, 5))
    def step(self, by):
        self.now += by
        decisions = self.made.step(self.now)
        everything = {**self.waiting, **{k: v[1:] for k, v in self.running.items()}}
        assert set(decisions.expired) == {k for k, v in everything.items() if v[2] <= self.now}
        for id_ in [*decisions.expired, *decisions.unserved]:
            self.waiting.pop(id_, None)
            self.running.pop(id_, None)
        for id_, worker in decisions.assigned:
            assert worker in self.ready
            assert id_ == min(self.waiting, key=lambda k: self.waiting[k][0]), "overtaken"
            self.running[id_] = (worker, *self.waiting.pop(id_))
        full = [
            w for w in self.ready if sum(r[0] == w for r in self.running.values()) == self.limits[0]
        ]
        assert not self.waiting or len(full) == len(self.ready), "room left unused"

    @invariant()
    def books(self):
        assert self.made.num_waiting == len(self.waiting)
        assert self.made.num_running == len(self.running)
        tokens = dict.fromkeys(range(self.workers), 0)
        for worker, _, cost, _ in self.running.values():
            tokens[worker] += cost
        assert self.made.outstanding() == tokens
        for worker in range(self.workers):
            assert sum(r[0] == worker for r in self.running.values()) <= self.limits[0]


TestAdmissionMachine = AdmissionMachine.TestCase
