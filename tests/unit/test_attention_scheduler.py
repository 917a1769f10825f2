"""Continuous batching as a pure policy: bounds hold, order is kept, nothing is lost, pages come back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import Overloaded, Rejected
from common.request import FinishReason, Request, SamplingParams
from services.attention.pages import PageAllocator
from services.attention.scheduler import Scheduler
from services.attention.sequence import Sequence


def sequence(prompt=5, max_tokens=4, name="r"):
    request = Request(name, tuple(range(prompt)), SamplingParams(max_tokens=max_tokens))
    return Sequence(request, list(range(prompt)), deadline_ns=0, num_prompt=prompt)


def scheduler(**changes):
    limits = {
        "num_lanes": 2, "max_batch_tokens": 8, "max_requests": 4, "max_waiting": 100, "max_context": 64,
    } | changes  # fmt: skip
    return Scheduler(PageAllocator(10, 8), **limits)


def step(policy, lane):
    """Run a lane's step as the worker would; returns its slices."""
    slices = policy.schedule(lane)
    for piece in slices:
        one = piece.sequence
        one.num_computed += piece.count
        if not one.in_prefill:
            one.token_ids.append(0)
            if one.num_generated == one.request.sampling.max_tokens:
                one.finish = FinishReason.LENGTH
                policy.remove(one)
    return slices


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), max_size=20),
    st.integers(1, 3),
    st.integers(1, 16),
)
def test_all_requests_finish_within_the_bounds(requests, num_lanes, max_batch_tokens):
    policy = scheduler(num_lanes=num_lanes, max_batch_tokens=max_batch_tokens)
    open_sequences = [sequence(*shape) for shape in requests]
    for one in open_sequences:
        policy.add(one)
    admitted = []
    for _ in range(10_000):
        admitted += policy.admit()
        assert policy.num_running <= policy.max_requests
        slices = [piece for lane in range(num_lanes) for piece in step(policy, lane)]
        for lane in range(num_lanes):
            mine = [p.count for p in slices if p.sequence.lane == lane]
            assert sum(mine) <= max_batch_tokens
        if not slices and not policy.waiting:
            break
    assert admitted == open_sequences  # first come, first served
    assert all(one.num_generated == one.request.sampling.max_tokens for one in open_sequences)
    assert policy.pages.num_free == policy.pages.num_pages


def test_decodes_go_before_prefill_and_share_the_token_budget():
    policy = scheduler(num_lanes=1)
    first, second = sequence(2, name="a"), sequence(20, name="b")
    policy.add(first)
    policy.admit()
    step(policy, 0)
    policy.add(second)
    policy.admit()
    assert [(p.sequence, p.start, p.count) for p in policy.schedule(0)] == [
        (first, 2, 1),
        (second, 0, 7),
    ]


def test_sequences_spread_over_lanes():
    policy = scheduler()
    for name in "abc":
        policy.add(sequence(name=name))
    assert [one.lane for one in policy.admit()] == [0, 1, 0]
    assert repr(policy).startswith("<Scheduler [2 + 1 running | 0 waiting")


def test_nobody_overtakes_a_large_request_that_waits_for_pages():
    policy = scheduler(max_context=80)
    large, small = sequence(60, 20), sequence(1, 1)
    policy.add(sequence(8, 8))
    policy.admit()
    policy.add(large)
    policy.add(small)
    assert policy.admit() == []
    assert list(policy.waiting) == [large, small]


@pytest.mark.parametrize(
    ("one", "error", "sentence"),
    [
        (
            sequence(60, 5),
            Rejected,
            "prompt of 60 tokens plus max_tokens 5 exceeds the context of 64",
        ),
        (sequence(1, 1), Overloaded, "1 requests wait already"),
    ],
)
def test_what_can_never_run_is_refused_at_once(one, error, sentence):
    policy = scheduler(max_waiting=1)
    policy.add(sequence())
    with pytest.raises(error, match=sentence):
        policy.add(one)


def test_more_than_the_cache_holds_is_refused_at_once():
    with pytest.raises(Rejected, match="81 tokens do not fit the cache of 80 tokens"):
        scheduler(max_context=100).add(sequence(80, 1))
