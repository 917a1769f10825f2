"""Which request runs next, and on which attention worker. Pure: ids and times come in, decisions go out.

Requests wait in order of arrival in one bounded queue. A request is assigned to the ready worker with the fewest
outstanding tokens (prompt + max_tokens of everything running there), ties by index; a worker runs at most
`max_running`, so the queue is here and not in the workers. A request whose worker was lost goes back to its old place.

Invariants: nobody overtakes (whatever was assigned arrived before whatever waits); a worker that is not ready gets
nothing; while a ready worker has room nothing waits after `step`.
"""

import heapq
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from common.errors import Overloaded


@dataclass(frozen=True, slots=True)
class Offer:
    """One request: `tokens` it may occupy at most, and the absolute time `deadline` after which it has failed."""

    id: str
    tokens: int
    deadline: float


@dataclass(slots=True)
class Decisions:
    """What `step` decided: (request, worker) to submit; requests past their deadline; requests nobody can serve."""

    assigned: list[tuple[str, int]] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)
    unserved: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Ticket:
    offer: Offer
    arrival: int
    worker: int | None = None  # None: waiting


@dataclass(slots=True)
class _Worker:
    ready: bool = False
    running: set[str] = field(default_factory=set)
    tokens: int = 0


class Admission:
    """The queue and what runs where. `patience_s`: how long requests wait while no worker is ready at all."""

    def __init__(
        self, workers: Iterable[int], *, max_queued: int, max_running: int, now: float,
        patience_s: float = 60.0,
    ) -> None:  # fmt: skip
        self._workers = {index: _Worker() for index in sorted(workers)}
        self._max_queued = max_queued
        self._max_running = max_running
        self._patience_s = patience_s
        self._tickets: dict[str, _Ticket] = {}
        self._waiting: list[_Ticket] = []  # by arrival
        self._deadlines: list[tuple[float, str]] = []  # heap; finished requests are skipped lazily
        self._arrivals = 0
        self._unserved_since: float | None = now

    def __repr__(self) -> str:
        workers = " | ".join(
            f"{index}: {len(w.running)}/{self._max_running}, {w.tokens} tokens"
            + ("" if w.ready else ", not ready")
            for index, w in self._workers.items()
        )
        return f"<Admission [waiting {len(self._waiting)}/{self._max_queued} | {workers}]>"

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests assigned to a worker."""
        return len(self._tickets) - len(self._waiting)

    @property
    def any_ready(self) -> bool:
        """Whether any worker takes requests."""
        return self._unserved_since is None

    def outstanding(self) -> dict[int, int]:
        """Tokens assigned to each worker."""
        return {index: worker.tokens for index, worker in self._workers.items()}

    def offer(self, offers: Sequence[Offer]) -> None:
        """Queue requests, all or none. Raises Overloaded when they do not fit."""
        room = self._max_queued + self._free_slots() - len(self._waiting)
        if len(offers) > room:
            raise Overloaded(
                f"{len(self._waiting)} requests are waiting and at most {self._max_queued} may: try again later"
            )
        for offer in offers:
            assert offer.id not in self._tickets, f"request {offer.id} offered twice"
            ticket = _Ticket(offer, self._arrivals)
            self._arrivals += 1
            self._tickets[offer.id] = ticket
            self._waiting.append(ticket)
            heapq.heappush(self._deadlines, (offer.deadline, offer.id))

    def set_ready(self, worker: int, ready: bool, *, now: float) -> None:
        """A worker takes requests from now on, or takes none any more (what runs there goes on)."""
        self._workers[worker].ready = ready
        if any(w.ready for w in self._workers.values()):
            self._unserved_since = None
        elif self._unserved_since is None:
            self._unserved_since = now

    def running_on(self, worker: int) -> list[str]:
        """What is assigned to a worker, oldest first."""
        return sorted(self._workers[worker].running, key=lambda id_: self._tickets[id_].arrival)

    def requeue(self, request_id: str) -> None:
        """The assigned worker cannot finish it: back to its place in the queue, whatever the queue's bound."""
        ticket = self._tickets[request_id]
        assert ticket.worker is not None, f"request {request_id} is waiting already"
        self._leave_worker(ticket)
        insort(self._waiting, ticket, key=lambda t: t.arrival)

    def finish(self, request_id: str) -> None:
        """Forget a request wherever it is; idempotent."""
        ticket = self._tickets.pop(request_id, None)
        if ticket is None:
            return
        if ticket.worker is None:
            self._waiting.remove(ticket)
        else:
            self._leave_worker(ticket)

    def step(self, now: float) -> Decisions:
        """Decide what to do now. Expired and unserved requests are forgotten; assigned ones count as running."""
        decisions = Decisions()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            if request_id in self._tickets:
                decisions.expired.append(request_id)
                self.finish(request_id)
        if self._unserved_since is not None and now - self._unserved_since >= self._patience_s:
            decisions.unserved = [ticket.offer.id for ticket in self._waiting]
            for request_id in decisions.unserved:
                self.finish(request_id)
        while self._waiting and (index := self._best_worker()) is not None:
            ticket = self._waiting.pop(0)
            worker = self._workers[index]
            ticket.worker = index
            worker.running.add(ticket.offer.id)
            worker.tokens += ticket.offer.tokens
            decisions.assigned.append((ticket.offer.id, index))
        return decisions

    def next_wakeup(self) -> float | None:
        """When `step` has something to expire if nothing else happens; None when nothing is pending."""
        while self._deadlines and self._deadlines[0][1] not in self._tickets:
            heapq.heappop(self._deadlines)
        times = [self._deadlines[0][0]] if self._deadlines else []
        if self._waiting and self._unserved_since is not None:
            times.append(self._unserved_since + self._patience_s)
        return min(times, default=None)

    def _leave_worker(self, ticket: _Ticket) -> None:
        assert ticket.worker is not None, "leaving no worker"
        worker = self._workers[ticket.worker]
        worker.running.remove(ticket.offer.id)
        worker.tokens -= ticket.offer.tokens
        ticket.worker = None

    def _free_slots(self) -> int:
        return sum(
            self._max_running - len(w.running)
            for w in self._workers.values()
            if w.ready and len(w.running) < self._max_running
        )

    def _best_worker(self) -> int | None:
        """Fewest outstanding tokens among ready workers with a free slot, ties by index."""
        free = [
            (worker.tokens, index)
            for index, worker in self._workers.items()
            if worker.ready and len(worker.running) < self._max_running
        ]
        return min(free)[1] if free else None
