"""Token events of one continuation to pieces of an answer: text, stop strings, finish reason."""

import math
from dataclasses import dataclass, field
from typing import Any

from common.request import FinishReason, TokenEvent
from services.gateway.errors import ApiError, unavailable
from services.gateway.model import ServedModel
from services.gateway.prepare import Job
from services.gateway.text import Detokenizer, StopMatcher

_LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token with its log-probability (None for the first of a prompt) and the alternatives at its place."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def parse(cls, token_id: int, entry: dict[str, Any] | None) -> "TokenLogprob":
        """From a token event's entry."""
        if entry is None:
            return cls(token_id, None)
        top = tuple((int(i), _finite(value)) for i, value in entry["top"])
        return cls(token_id, _finite(entry["logprob"]), top)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LOWEST_LOGPROB


@dataclass(slots=True)
class Piece:
    """What one event adds to a choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def extend(self, other: "Piece") -> None:
        """Append what came later."""
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason


class Choice:
    """One continuation as the client sees it. `num_tokens` counts for `usage`."""

    def __init__(self, job: Job, index: int, model: ServedModel) -> None:
        self.index = index
        self.num_tokens = 0
        self.finished = False
        self._job = job
        self._echo = job.echo[index // job.num_choices] if job.echo else ""
        self._prompt = job.requests[index].prompt_token_ids
        self._detokenizer = Detokenizer(model.tokenizer, model.special_ids)
        self._stops = StopMatcher(job.stops)

    @property
    def stopped_by_string(self) -> bool:
        """Whether the worker goes on for nothing."""
        return self._stops.found

    def advance(self, event: TokenEvent) -> Piece:
        """Take an event. Raises ApiError if the worker failed."""
        if event.finish_reason is FinishReason.ERROR:
            self.finished = True
            raise _failure(event)
        piece = Piece(text=self._echo)
        self._echo = ""
        if event.prompt_logprobs is not None:
            entries = zip(self._prompt, event.prompt_logprobs, strict=True)
            piece.logprobs += [TokenLogprob.parse(token, entry) for token, entry in entries]
        if not self._job.discard_tokens:
            self._take_tokens(event, piece)
        if self._stops.found:
            piece.finish_reason = FinishReason.STOP.value
        elif event.finish_reason is not None:
            piece.text += self._stops.feed(self._detokenizer.flush())
            piece.text += self._stops.flush()
            by_string = self.stopped_by_string  # the very end may have completed one
            piece.finish_reason = "stop" if by_string else event.finish_reason.value
        self.finished = piece.finish_reason is not None
        return piece

    def _take_tokens(self, event: TokenEvent, piece: Piece) -> None:
        """Token by token, so that nothing behind a stop string is counted."""
        for i, token_id in enumerate(event.token_ids):
            self.num_tokens += 1
            piece.token_ids.append(token_id)
            if event.logprobs:
                piece.logprobs.append(TokenLogprob.parse(token_id, event.logprobs[i]))
            piece.text += self._stops.feed(self._detokenizer.add(token_id))
            if self._stops.found:
                return


def _failure(event: TokenEvent) -> ApiError:
    sentence = event.error or "the attention worker gave no reason"
    if event.retryable:
        return unavailable(sentence, code="worker_failed")
    return ApiError(500, sentence, kind="server_error", code="worker_failed")
