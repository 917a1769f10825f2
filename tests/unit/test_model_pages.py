"""The page allocator: no page twice, all or nothing, order kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Overloaded
from services.attention.pages import PageAllocator

steps = st.lists(
    st.tuples(st.sampled_from(["acquire", "release"]), st.integers(0, 5), st.integers(0, 300)),
    max_size=60,
)


@given(num_pages=st.integers(0, 12), steps=steps)
def test_pages_are_never_shared_nor_lost(num_pages: int, steps: list[tuple[str, int, int]]) -> None:
    pages = PageAllocator(num_pages, 64)
    held: dict[int, tuple[int, ...]] = {}
    for action, sequence, num_tokens in steps:
        before = held.get(sequence, ())
        if action == "release":
            assert pages.release(sequence) == before
            held.pop(sequence, None)
        elif pages.can_grow(sequence, num_tokens):
            now = pages.acquire(sequence, num_tokens)
            assert now[: len(before)] == before
            assert len(now) == max(len(before), -(-num_tokens // 64))
            held[sequence] = now
        else:
            free = pages.num_free
            with pytest.raises(Overloaded, match="more pages of 64 tokens"):
                pages.acquire(sequence, num_tokens)
            assert (pages.num_free, pages.held(sequence)) == (free, before)
        everything = [page for mine in held.values() for page in mine]
        assert len(set(everything)) == len(everything)
        assert set(everything) <= set(range(num_pages))
        assert pages.num_free == num_pages - len(everything)


def test_repr_says_what_is_free() -> None:
    pages = PageAllocator(4, 64)
    pages.acquire("a", 65)
    assert repr(pages) == "<PageAllocator [2/4 free | 1 sequences]>"
