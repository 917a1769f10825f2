"""Pages of latent cache: who holds which. Pure.

Invariants: a page is free or held by exactly one sequence; a sequence's pages stay in the order in which it got them;
a reservation gives everything asked for or nothing.
"""

from collections.abc import Hashable

from common.errors import Overloaded


class PageAllocator:
    """Hands out `num_pages` pages of `page_tokens` tokens."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._free = list(
            range(num_pages - 1, -1, -1)
        )  # a stack: low pages first, recently used again soon
        self._held: dict[Hashable, list[int]] = {}

    def __repr__(self) -> str:
        return (
            f"<PageAllocator [{self.num_free}/{self.num_pages} free | {len(self._held)} sequences]>"
        )

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens need."""
        return -(-num_tokens // self.page_tokens)

    def held(self, sequence: Hashable) -> tuple[int, ...]:
        """Pages of a sequence, in order of its tokens; none when it is unknown."""
        return tuple(self._held.get(sequence, ()))

    def can_grow(self, sequence: Hashable, num_tokens: int) -> bool:
        """Whether `acquire` would succeed."""
        return self._missing(sequence, num_tokens) <= len(self._free)

    def acquire(self, sequence: Hashable, num_tokens: int) -> tuple[int, ...]:
        """Grow a sequence to `num_tokens` tokens and return all its pages.

        Raises Overloaded, with nothing changed, when there are too few free pages.
        """
        missing = self._missing(sequence, num_tokens)
        if missing > len(self._free):
            raise Overloaded(
                f"{num_tokens} tokens need {missing} more pages of {self.page_tokens} tokens, "
                f"{len(self._free)} of {self.num_pages} are free"
            )
        pages = self._held.setdefault(sequence, [])
        pages.extend(self._free.pop() for _ in range(missing))
        return tuple(pages)

    def release(self, sequence: Hashable) -> tuple[int, ...]:
        """Free every page of a sequence and return them; an unknown sequence holds none."""
        pages = self._held.pop(sequence, [])
        self._free.extend(reversed(pages))
        return tuple(pages)

    def _missing(self, sequence: Hashable, num_tokens: int) -> int:
        return max(0, self.pages_for(num_tokens) - len(self._held.get(sequence, ())))
