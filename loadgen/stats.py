"""Records of requests to figures. Pure: every time in a record is seconds on one clock.

TTFT is from sending a request to its first token; TPOT the mean time per token after the first, one figure per
request; ITL the gap between two arrivals, one figure per gap (a server that sends several tokens at once makes the
gaps fewer and longer, which is what a reader sees).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

QUANTILES = (50, 90, 99)


class State(StrEnum):
    """How a request ended. The last two are no end: the server owes an answer."""

    FINISHED = "finished"
    ERROR = "error"
    CANCELLED = "cancelled"
    TRUNCATED = "truncated"  # the connection ended without a finish reason and without an error
    TIMEOUT = "timeout"

    @property
    def is_terminal(self) -> bool:
        """Whether the server brought the request to an end."""
        return self not in (State.TRUNCATED, State.TIMEOUT)


@dataclass(slots=True)
class Record:
    """One request, cancelled unless it is sent. `arrivals` are the times of chunks with new tokens, `lag_s` how late
    it was sent."""

    index: int
    sent_at: float
    lag_s: float = 0.0
    state: State = State.CANCELLED
    detail: str = ""
    ended_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0

    def __post_init__(self) -> None:
        self.ended_at = max(self.ended_at, self.sent_at)

    @property
    def ttft_s(self) -> float | None:
        """Seconds to the first token."""
        return self.arrivals[0] - self.sent_at if self.arrivals else None

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first."""
        if self.state is not State.FINISHED or self.output_tokens < 2 or not self.arrivals:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between arrivals."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of one figure in seconds; `quantiles` maps 50, 90, 99 to values."""

    count: int
    mean: float
    quantiles: dict[int, float]
    maximum: float


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run comes to. Rates are over the time from the first send to the last end."""

    counts: dict[State, int]
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft_s: Distribution | None
    tpot_s: Distribution | None
    itl_s: Distribution | None
    latency_s: Distribution | None
    max_lag_s: float


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear interpolation between closest ranks of a sorted, non-empty sequence."""
    position = (len(ordered) - 1) * percent / 100.0
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def distribution(values: Sequence[float]) -> Distribution | None:
    """None when there is nothing to describe."""
    if not values:
        return None
    ordered = sorted(values)
    quantiles = {q: percentile(ordered, q) for q in QUANTILES}
    return Distribution(len(ordered), math.fsum(ordered) / len(ordered), quantiles, ordered[-1])


def summarize(records: Sequence[Record]) -> Summary:
    """All figures of a run. Requests per second counts finished ones only."""
    finished = [record for record in records if record.state is State.FINISHED]
    start = min((record.sent_at for record in records), default=0.0)
    duration = max((record.ended_at for record in records), default=0.0) - start
    tokens = sum(record.output_tokens for record in records)
    return Summary(
        counts={state: sum(r.state is state for r in records) for state in State},
        duration_s=duration,
        prompt_tokens=sum(record.prompt_tokens for record in records),
        output_tokens=tokens,
        requests_per_s=len(finished) / duration if duration > 0 else 0.0,
        output_tokens_per_s=tokens / duration if duration > 0 else 0.0,
        ttft_s=distribution([r.ttft_s for r in finished if r.ttft_s is not None]),
        tpot_s=distribution([r.tpot_s for r in finished if r.tpot_s is not None]),
        itl_s=distribution([gap for record in finished for gap in record.gaps_s]),
        latency_s=distribution([record.ended_at - record.sent_at for record in finished]),
        max_lag_s=max((record.lag_s for record in records), default=0.0),
    )


def not_terminal(records: Sequence[Record]) -> list[Record]:
    """The requests that the server left without an end."""
    return [record for record in records if not record.state.is_terminal]
