"""Continuous batching over micro-batch lanes: who runs, in which lane, how many tokens this step. Pure.

A *lane* is one micro-batch that goes through the layers on its own, step after step; while its rows are at the experts
another lane computes. A sequence stays in the lane it was admitted to. Within a step every running sequence decodes one
token, and what is left of the token budget prefills prompts in chunks, first come first served.
"""

from collections import deque
from dataclasses import dataclass

from common.errors import Overloaded, Rejected
from services.attention.pages import PageAllocator
from services.attention.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Slice:
    """`count` tokens of one sequence from position `start` on."""

    sequence: Sequence
    start: int
    count: int


class Scheduler:
    """Waiting and running sequences of one attention worker."""

    def __init__(
        self, pages: PageAllocator, *, num_lanes: int, max_batch_tokens: int, max_requests: int,
        max_waiting: int, max_context: int,
    ) -> None:  # fmt: skip
        self.pages = pages
        self.max_batch_tokens = max_batch_tokens
        self.max_requests = max_requests
        self.max_waiting = max_waiting
        self.max_context = max_context
        self.waiting: deque[Sequence] = deque()
        self.lanes: list[list[Sequence]] = [[] for _ in range(num_lanes)]

    def __repr__(self) -> str:
        running = " + ".join(str(len(lane)) for lane in self.lanes)
        return f"<Scheduler [{running} running | {len(self.waiting)} waiting | {self.pages}]>"

    @property
    def num_running(self) -> int:
        """Sequences in lanes."""
        return sum(map(len, self.lanes))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises Rejected when it can never run, Overloaded when too many wait."""
        if sequence.max_tokens > self.max_context:
            raise Rejected(
                f"prompt of {sequence.num_prompt} tokens plus max_tokens {sequence.request.sampling.max_tokens} "
                f"exceeds the context of {self.max_context}"
            )
        if self.pages.pages_for(sequence.max_tokens) > self.pages.num_pages:
            room = self.pages.num_pages * self.pages.page_tokens
            raise Rejected(f"{sequence.max_tokens} tokens do not fit the cache of {room} tokens")
        if len(self.waiting) >= self.max_waiting:
            raise Overloaded(f"{self.max_waiting} requests wait already")
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and free its pages; no step may hold it any more."""
        if sequence.lane >= 0:
            self.lanes[sequence.lane].remove(sequence)
            sequence.lane = -1
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.pages.release(sequence)
        sequence.pages = ()

    def admit(self) -> list[Sequence]:
        """Move waiting sequences into the emptiest lanes while pages and `max_requests` last; returns them."""
        admitted: list[Sequence] = []
        while self.waiting and self.num_running < self.max_requests:
            sequence = self.waiting[0]
            if not self.pages.can_grow(sequence, sequence.max_tokens):
                break  # first come first served: nobody overtakes a large request
            self.waiting.popleft()
            sequence.pages = self.pages.acquire(sequence, sequence.max_tokens)
            sequence.lane = min(range(len(self.lanes)), key=lambda i: (len(self.lanes[i]), i))
            self.lanes[sequence.lane].append(sequence)
            admitted.append(sequence)
        return admitted

    def schedule(self, lane: int) -> list[Slice]:
        """The next step of a lane; empty when it has nothing to do."""
        slices = [
            Slice(s, s.num_computed, 1)
            for s in self.lanes[lane]
            if not s.in_prefill and s.finish is None
        ][: self.max_batch_tokens]
        budget = self.max_batch_tokens - len(slices)
        for sequence in self.lanes[lane]:
            if sequence.in_prefill and sequence.finish is None and budget > 0:
                count = min(budget, sequence.num_prompt - sequence.num_computed)
                slices.append(Slice(sequence, sequence.num_computed, count))
                budget -= count
        return slices
