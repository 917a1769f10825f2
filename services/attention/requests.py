"""Requests of an attention worker from submission to their last event: bookkeeping between steps, no I/O, no clock.

Every method returns the events to send; a request that ended is forgotten here and in the scheduler at once, unless a
lane holds it in a step: then it is only marked and goes when the step is over.
"""

import itertools
from typing import Any

import torch

from common.errors import Rejected
from common.request import FinishReason, Request, TokenEvent
from common.transport.base import Link
from services.attention.sampler import Sampled, sample, token_logprobs
from services.attention.scheduler import Scheduler, Slice
from services.attention.sequence import Sequence

Event = tuple[Link, TokenEvent]


class Requests:
    """Open requests by gateway link and id. `eos_token_ids` end a request unless it says `ignore_eos`."""

    def __init__(
        self, scheduler: Scheduler, eos_token_ids: tuple[int, ...], vocab_size: int
    ) -> None:
        self.scheduler = scheduler
        self.eos_token_ids = frozenset(eos_token_ids)
        self.vocab_size = vocab_size
        self._open: dict[tuple[Link, str], Sequence] = {}
        self._links: dict[Sequence, Link] = {}
        self._prompt_logprobs: dict[Sequence, list[dict[str, Any] | None]] = {}
        self._in_step: set[Sequence] = set()

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def submit(self, link: Link, request: Request, now_ns: int) -> None:
        """Queue a request. Raises Rejected with one sentence when it cannot be served."""
        prompt = request.prompt_token_ids
        if not prompt:
            raise Rejected("the prompt is empty")
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise Rejected(f"a prompt token is outside the vocabulary of {self.vocab_size}")
        if (link, request.id) in self._open:
            raise Rejected(f"request {request.id} is open already")
        deadline_ns = now_ns + int(request.deadline_s * 1e9)
        sequence = Sequence(request, list(prompt), deadline_ns, len(prompt))
        self.scheduler.add(sequence)
        self._open[link, request.id] = sequence
        self._links[sequence] = link

    def begin(self, slices: list[Slice]) -> None:
        """These slices' sequences are in a step until `advance` or `failed`."""
        self._in_step.update(s.sequence for s in slices)

    def want_all_rows(self, slices: list[Slice]) -> bool:
        """True when a slice's request wants the log-probabilities of its prompt."""
        return any(s.sequence.request.echo_logprobs and s.sequence.in_prefill for s in slices)

    def advance(
        self, slices: list[Slice], logits: torch.Tensor, best: list[int], *, all_rows: bool
    ) -> list[Event]:
        """A step is over: logits fp32 [num slices or num tokens, vocab] and their best tokens.

        Returns one event per token made.
        """
        ends = (
            itertools.accumulate(s.count for s in slices) if all_rows else range(1, len(slices) + 1)
        )
        last = [end - 1 for end in ends]
        due = []
        for i, piece in enumerate(slices):
            sequence = piece.sequence
            if all_rows and sequence.request.echo_logprobs and sequence.in_prefill:
                end = last[i] + 1
                self._note_prompt_logprobs(piece, logits[end - piece.count : end])
            sequence.num_computed += piece.count
            if not sequence.in_prefill and sequence.finish is None:
                due.append(i)
        tokens = sample(
            logits,
            best,
            [last[i] for i in due],
            [slices[i].sequence.request.sampling for i in due],
            [len(slices[i].sequence.token_ids) for i in due],
        )
        events = [
            self._append(slices[i].sequence, token) for i, token in zip(due, tokens, strict=True)
        ]
        self._end_step(slices)
        return events

    def failed(self, slices: list[Slice], sentence: str) -> list[Event]:
        """A step got no answer: its sequences end with that sentence."""
        events = [
            self._finish_with_error(piece.sequence, sentence)
            for piece in slices
            if piece.sequence.finish is None
        ]
        self._end_step(slices)
        return events

    def expire(self, now_ns: int) -> list[Event]:
        """End the requests whose deadline passed."""
        late = [s for s in self._open.values() if s.deadline_ns <= now_ns]
        return [
            self._finish_with_error(s, f"not finished within {s.request.deadline_s:g} s")
            for s in late
        ]

    def cancel(self, link: Link, request_id: str) -> None:
        """The client is gone; unknown ids are requests that ended already."""
        sequence = self._open.get((link, request_id))
        if sequence is not None:
            self._close(sequence, FinishReason.CANCELLED)

    def gateway_lost(self, link: Link) -> None:
        """Nobody reads these requests any more."""
        for owner, request_id in [key for key in self._open if key[0] is link]:
            self.cancel(owner, request_id)

    def _append(self, sequence: Sequence, sampled: Sampled) -> Event:
        sampling, token = sequence.request.sampling, sampled.token_id
        sequence.token_ids.append(token)
        reason = None
        if token in sampling.stop_token_ids or (
            token in self.eos_token_ids and not sampling.ignore_eos
        ):
            reason = FinishReason.STOP
        elif sequence.num_generated >= sampling.max_tokens:
            reason = FinishReason.LENGTH
        event = TokenEvent(
            sequence.request.id,
            (token,),
            reason,
            logprobs=[] if sampling.logprobs is None else [_entry(sampled)],
            prompt_logprobs=self._prompt_logprobs.pop(sequence, None),
        )
        link = self._links[sequence]
        if reason is not None:
            self._close(sequence, reason)
        return link, event

    def _note_prompt_logprobs(self, piece: Slice, logits: torch.Tensor) -> None:
        """Row p of the prompt predicts token p + 1; the first token has no prediction."""
        sequence = piece.sequence
        entries = self._prompt_logprobs.setdefault(sequence, [None])
        following = sequence.token_ids[piece.start + 1 : piece.start + 1 + piece.count]
        following = following[: sequence.num_prompt - piece.start - 1]
        top = sequence.request.sampling.logprobs or 0
        for row, token in enumerate(following):
            entries.append(_entry(token_logprobs(logits[row], token, top)))

    def _finish_with_error(self, sequence: Sequence, sentence: str) -> Event:
        link = self._links[sequence]
        self._close(sequence, FinishReason.ERROR)
        return link, TokenEvent(
            sequence.request.id, finish_reason=FinishReason.ERROR, error=sentence, retryable=True
        )

    def _close(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish = reason
        link = self._links.pop(sequence)
        del self._open[link, sequence.request.id]
        self._prompt_logprobs.pop(sequence, None)
        if sequence not in self._in_step:
            self.scheduler.remove(sequence)

    def _end_step(self, slices: list[Slice]) -> None:
        for piece in slices:
            self._in_step.discard(piece.sequence)
            if piece.sequence.finish is not None:
                self.scheduler.remove(piece.sequence)


def _entry(sampled: Sampled) -> dict[str, Any]:
    top = [[token, logprob] for token, logprob in sampled.top]
    return {"logprob": sampled.logprob, "top": top}
