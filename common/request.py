"""What travels between gateway and attention worker on the control link: a request there, token events back. Pure.

Frames (JSON objects, `type` says which):

    gateway -> attention   {"type": "submit", ...Request}    {"type": "cancel", "id": ...}
    attention -> gateway   {"type": "tokens", "events": [TokenEvent, ...]}  one frame per step, one event per request;
                           its last one has `finish_reason`
    anyone -> anyone       {"type": "status_request", "id": n}  ->  {"type": "status", "id": n, "processes": [...]}
                           {"type": "status", "id": null, ...} is pushed when a process's state changes

A process in `processes` is {"role", "index", "node", "pid", "state", "counters": {...}}; state is one of
`starting`, `ready`, `draining`, `lost`.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from common.errors import Rejected


class FinishReason(StrEnum):
    """Why a request ended; `ERROR` and `CANCELLED` never reach a client as a finish_reason."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. Temperature 0 is greedy. `seed` makes sampling reproducible whatever the batch."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    seed: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # top alternatives per token to report; None: no log-probabilities

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise Rejected(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not 0.0 <= self.temperature <= 2.0:
            raise Rejected(f"temperature must be between 0 and 2, not {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise Rejected(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise Rejected(f"top_k must be at least 0, not {self.top_k}")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise Rejected(f"logprobs must be between 0 and 20, not {self.logprobs}")


@dataclass(frozen=True, slots=True)
class Request:
    """One continuation to make. `deadline_s` is seconds from submission; the worker fails the request after it."""

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    deadline_s: float = 600.0
    echo_logprobs: bool = (
        False  # also report the log-probability of each prompt token given those before it
    )

    def to_json(self) -> dict[str, Any]:
        """The `submit` frame."""
        return {"type": "submit", **asdict(self)}

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> "Request":
        """Parse a `submit` frame. Raises Rejected on values out of range."""
        sampling = dict(message["sampling"])
        sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
        return cls(
            id=message["id"],
            prompt_token_ids=tuple(message["prompt_token_ids"]),
            sampling=SamplingParams(**sampling),
            deadline_s=message["deadline_s"],
            echo_logprobs=message["echo_logprobs"],
        )


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one request. `error` is a sentence, with `finish_reason` ERROR.

    `logprobs` has one entry per token, {"logprob": x, "top": [[token_id, logprob], ...]}, when asked for;
    `prompt_logprobs` the same for prompt tokens (the first is null), once, in the first event.
    """

    id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    retryable: bool = False
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    prompt_logprobs: list[dict[str, Any] | None] | None = None

    def to_json(self) -> dict[str, Any]:
        """One of the events of a `tokens` frame: what has its default is left out."""
        # a literal: dataclasses.asdict, paid per token, was the largest single item of a profile
        message: dict[str, Any] = {"id": self.id, "token_ids": self.token_ids}
        if self.finish_reason is not None:
            message["finish_reason"] = self.finish_reason
        if self.error is not None:
            message |= {"error": self.error, "retryable": self.retryable}
        if self.logprobs:
            message["logprobs"] = self.logprobs
        if self.prompt_logprobs is not None:
            message["prompt_logprobs"] = self.prompt_logprobs
        return message

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> "TokenEvent":
        """Parse an event of a `tokens` frame."""
        get = message.get
        reason = get("finish_reason")
        return cls(
            id=message["id"],
            token_ids=tuple(message["token_ids"]),
            finish_reason=None if reason is None else FinishReason(reason),
            error=get("error"),
            retryable=get("retryable", False),
            logprobs=get("logprobs", []),
            prompt_logprobs=get("prompt_logprobs"),
        )


def tokens_frame(events: Iterable[TokenEvent]) -> dict[str, Any]:
    """The `tokens` frame: what a step of a lane made, for all of a gateway's requests in it."""
    return {"type": "tokens", "events": [event.to_json() for event in events]}


def tokens_of(message: dict[str, Any]) -> list[TokenEvent]:
    """The events of a `tokens` frame."""
    return [TokenEvent.from_json(event) for event in message["events"]]
