"""Requests on their way: from admission to an attention worker, their tokens back to whoever waits for them.

A `Batch` is what one HTTP call wants: one continuation per prompt and choice. Its events are read by one handler; no
task exists per continuation. A continuation whose worker is lost before its first token is submitted again, to
whichever worker is free first, within its deadline; after the first token it fails with a sentence that says so.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.errors import Fatal, LinkClosed
from common.request import FinishReason, Request, TokenEvent
from services.gateway.admission import Admission, Offer
from services.gateway.backends import Backends
from services.gateway.errors import unavailable
from services.gateway.metrics import GatewayMetrics

log = logging.getLogger(__name__)

# A request that was on so many workers when they died is suspected of killing them.
_MAX_ATTEMPTS = 5
_POLL_S = 1.0  # how often workers are asked for their state while requests wait and none is ready


@dataclass(slots=True)
class _Continuation:
    batch: "Batch"
    index: int
    request: Request
    arrived_at: float  # perf_counter, which is finer than uvloop's millisecond clock
    deadline: float  # on the loop's clock
    attempts: int = 0
    worker: int | None = None
    wire_id: str = ""
    num_tokens: int = 0
    first_token_at: float = 0.0


class Batch:
    """The continuations of one HTTP call. One reader; `close` in its `finally` cancels what still runs."""

    def __init__(self, dispatcher: "Dispatcher", deadline: float) -> None:
        self._dispatcher = dispatcher
        self._inbox: deque[tuple[int, TokenEvent]] = deque()  # bounded by the sum of max_tokens
        self._wake = asyncio.Event()
        self.deadline = deadline
        self.live: dict[int, str] = {}  # index -> request id of what has not ended

    async def events(self) -> list[tuple[int, TokenEvent]]:
        """Everything that arrived since the last call, at least one event. Ends by the requests' own deadline."""
        while not self._inbox:
            self._wake.clear()
            await self._wake.wait()
        events = list(self._inbox)
        self._inbox.clear()
        return events

    def stop(self, index: int) -> None:
        """The reader needs no more tokens of this continuation (a stop string was found)."""
        request_id = self.live.pop(index, None)
        if request_id is not None:
            self._dispatcher.drop(request_id, outcome="stopped")

    def close(self) -> None:
        """Cancel whatever still runs; idempotent."""
        for request_id in list(self.live.values()):
            self._dispatcher.drop(request_id, outcome="cancelled")
        self.live.clear()

    def put(self, index: int, event: TokenEvent) -> None:
        """For the dispatcher."""
        self._inbox.append((index, event))
        self._wake.set()


class Dispatcher:
    """Owns every continuation between submission and its last event."""

    def __init__(self, admission: Admission, backends: Backends, metrics: GatewayMetrics) -> None:
        self._admission = admission
        self._backends = backends
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._live: dict[str, _Continuation] = {}  # by request id
        self._on_wire: dict[str, _Continuation] = {}  # by the id of the current attempt
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False
        backends.listener = self
        metrics.watch(
            running=lambda: admission.num_running,
            queued=lambda: admission.num_waiting,
            outstanding=admission.outstanding,
        )

    def __repr__(self) -> str:
        draining = " | draining" if self.draining else ""
        return f"<Dispatcher [live {len(self._live)}{draining}] {self._admission!r}>"

    def submit(self, requests: Sequence[Request]) -> Batch:
        """Queue continuations, all or none. Raises Overloaded; ApiError 503 while draining."""
        if self.draining:
            raise unavailable("the gateway is shutting down", code="draining")
        now, arrived_at = self._loop.time(), time.perf_counter()
        batch = Batch(self, now + max(request.deadline_s for request in requests))
        self._admission.offer(
            [
                Offer(r.id, len(r.prompt_token_ids) + r.sampling.max_tokens, now + r.deadline_s)
                for r in requests
            ]
        )
        for index, request in enumerate(requests):
            deadline = now + request.deadline_s
            self._live[request.id] = _Continuation(batch, index, request, arrived_at, deadline)
            batch.live[index] = request.id
            self._metrics.prompt_tokens.inc(len(request.prompt_token_ids))
        self._idle.clear()
        self._pump()
        return batch

    def drop(self, request_id: str, *, outcome: str) -> None:
        """The client wants no more of it: cancel it at its worker."""
        continuation = self._live.get(request_id)
        if continuation is not None:
            self._cancel_at_worker(continuation)
            self._end(continuation, outcome)
            self._pump()

    async def drain(self) -> None:
        """Take no new requests and return when none is left. May be cancelled: `close` fails what still runs."""
        self.draining = True
        await self._idle.wait()

    def close(self) -> None:
        """Fail whatever is left and take nothing new; idempotent."""
        self.draining = True
        if self._live:
            log.warning("%d requests were cut off by the end of the gateway", len(self._live))
        for continuation in list(self._live.values()):
            self._cancel_at_worker(continuation)
            self._fail(continuation, "the gateway is shutting down")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- Listener ------------------------------------------------------------------------------------------------

    def on_tokens(self, worker: int, event: TokenEvent) -> None:
        """Hand tokens to the batch; events of earlier attempts and dropped requests are nobody's."""
        continuation = self._on_wire.get(event.id)
        if continuation is None or continuation.worker != worker:
            return
        if event.token_ids:
            self._count_tokens(continuation, len(event.token_ids))
        if event.finish_reason is FinishReason.ERROR and self._may_resubmit(continuation, event):
            self._resubmit(continuation, event.error or "no reason given")
        elif continuation.num_tokens > continuation.request.sampling.max_tokens:
            self._cancel_at_worker(continuation)
            self._fail(continuation, f"attention-{worker} sent more tokens than were asked for")
            self._pump()
        else:
            if event.finish_reason is FinishReason.CANCELLED:  # not on our request
                event = replace(
                    event,
                    finish_reason=FinishReason.ERROR,
                    error=f"attention-{worker} cancelled the request",
                    retryable=True,
                )
            continuation.batch.put(continuation.index, event)
            if event.finish_reason is not None:
                failed = event.finish_reason is FinishReason.ERROR
                self._end(continuation, "failed" if failed else "finished")
        if event.finish_reason is not None:
            self._pump()  # not for every token: only an end makes room

    def on_worker(self, worker: int, ready: bool) -> None:
        """Admission may use it, or may not any more."""
        self._admission.set_ready(worker, ready, now=self._loop.time())
        self._pump()

    def on_worker_lost(self, worker: int, reason: str) -> None:
        """Queue again what had no token yet, fail the rest."""
        self._admission.set_ready(worker, False, now=self._loop.time())
        lost = self._admission.running_on(worker)
        level = logging.WARNING if lost else logging.INFO
        log.log(level, "attention-%d was lost with %d requests: %s", worker, len(lost), reason)
        for request_id in lost:
            continuation = self._live[request_id]
            sentence = f"attention-{worker} was lost after {continuation.num_tokens} tokens"
            if self._may_resubmit(continuation, None):
                self._resubmit(continuation, sentence)
            else:
                self._fail(continuation, f"{sentence}: send the request again")
        self._pump()

    # --- internals -----------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Do what admission decides, until it decides nothing."""
        while True:
            decisions = self._admission.step(self._loop.time())
            for request_id in decisions.expired:
                continuation = self._live[request_id]
                self._cancel_at_worker(continuation)
                deadline_s = continuation.request.deadline_s
                self._fail(continuation, f"the request's deadline of {deadline_s:g} s passed")
            for request_id in decisions.unserved:
                self._fail(self._live[request_id], "no attention worker is ready")
            for request_id, worker in decisions.assigned:
                self._submit_to(self._live[request_id], worker)
            if not decisions.assigned:
                break
        self._set_timer()

    def _submit_to(self, continuation: _Continuation, worker: int) -> None:
        continuation.worker = worker
        continuation.attempts += 1
        continuation.wire_id = f"{continuation.request.id}-{continuation.attempts}"
        self._on_wire[continuation.wire_id] = continuation
        # Above zero: what has expired by now expires in the next step.
        deadline_s = max(continuation.deadline - self._loop.time(), 0.001)
        request = replace(continuation.request, id=continuation.wire_id, deadline_s=deadline_s)
        try:
            self._backends.send(worker, request.to_json())
        except (
            LinkClosed
        ) as exc:  # on_worker_lost may come later; until then nothing more goes there
            self._admission.set_ready(worker, False, now=self._loop.time())
            self._resubmit(continuation, str(exc))
        except Fatal as exc:  # a frame beyond the transport's limits: no worker can be sent it
            self._fail(continuation, str(exc), retryable=False)

    def _may_resubmit(self, continuation: _Continuation, event: TokenEvent | None) -> bool:
        return (
            continuation.num_tokens == 0
            and continuation.attempts < _MAX_ATTEMPTS
            and (event is None or event.retryable)
        )

    def _resubmit(self, continuation: _Continuation, reason: str) -> None:
        log.info("request %s goes back to the queue: %s", continuation.request.id, reason)
        self._on_wire.pop(continuation.wire_id, None)
        continuation.worker = None
        self._admission.requeue(continuation.request.id)
        self._metrics.resubmitted.inc()

    def _cancel_at_worker(self, continuation: _Continuation) -> None:
        if continuation.worker is None:
            return
        try:
            self._backends.send(continuation.worker, {"type": "cancel", "id": continuation.wire_id})
        except LinkClosed:
            return  # the worker cancels what belongs to a closed link

    def _fail(self, continuation: _Continuation, sentence: str, *, retryable: bool = True) -> None:
        continuation.batch.put(
            continuation.index,
            TokenEvent(
                continuation.request.id,
                finish_reason=FinishReason.ERROR,
                error=sentence,
                retryable=retryable,
            ),
        )
        self._end(continuation, "failed")

    def _end(self, continuation: _Continuation, outcome: str) -> None:
        """Forget a continuation; its batch may still have events to read."""
        self._admission.finish(continuation.request.id)
        self._on_wire.pop(continuation.wire_id, None)
        self._live.pop(continuation.request.id, None)
        continuation.batch.live.pop(continuation.index, None)
        self._metrics.requests.labels(outcome).inc()
        if continuation.num_tokens > 1:
            elapsed = time.perf_counter() - continuation.first_token_at
            self._metrics.tpot.observe(elapsed / (continuation.num_tokens - 1))
        if not self._live:
            self._idle.set()

    def _count_tokens(self, continuation: _Continuation, num_tokens: int) -> None:
        if continuation.num_tokens == 0:
            continuation.first_token_at = time.perf_counter()
            self._metrics.ttft.observe(continuation.first_token_at - continuation.arrived_at)
        continuation.num_tokens += num_tokens
        self._metrics.generated_tokens.inc(num_tokens)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        when = self._admission.next_wakeup()
        starving = self._admission.num_waiting > 0 and not self._admission.any_ready
        if starving:
            poll = self._loop.time() + _POLL_S
            when = poll if when is None else min(when, poll)
        if when is not None:
            self._timer = self._loop.call_at(when, self._on_timer, starving)

    def _on_timer(self, starving: bool) -> None:
        self._timer = None
        if starving:
            self._backends.ask()
        self._pump()
