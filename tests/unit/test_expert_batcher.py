"""The expert's batcher: everything of one layer together, nobody starves, every call exactly once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.expert.batcher import Batcher, Waiting


def drain(batcher):
    while len(batcher):
        yield batcher.next_batch()


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 50)), max_size=60), st.integers(1, 100))
def test_every_call_is_computed_once_within_the_limit(arrivals, max_rows):
    batcher = Batcher(max_rows)
    for number, (layer, rows) in enumerate(arrivals):
        batcher.add(layer, Waiting(rows, number, number))
    seen = []
    for layer, calls in drain(batcher):
        assert calls
        assert len(calls) == 1 or sum(c.num_rows for c in calls) <= max_rows
        assert [c.item for c in calls] == sorted(c.item for c in calls)
        assert all(arrivals[c.item][0] == layer for c in calls)
        seen += [c.item for c in calls]
    assert sorted(seen) == list(range(len(arrivals)))


def test_the_layer_that_waits_longest_goes_first_and_a_full_one_goes_to_the_back():
    batcher = Batcher(10)
    for number, layer in enumerate([7, 3, 7, 7]):
        batcher.add(layer, Waiting(6, number, number))
    order = [(layer, [c.item for c in calls]) for layer, calls in drain(batcher)]
    assert order == [(7, [0]), (3, [1]), (7, [2]), (7, [3])]


def test_an_empty_batcher_says_so():
    assert repr(Batcher(1)) == "<Batcher [0 waiting | 0 layers]>"
    with pytest.raises(IndexError, match="nothing waits"):
        Batcher(1).next_batch()
