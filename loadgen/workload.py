"""What is sent, and when: reproducible from one seed."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


class UsageError(Exception):
    """An argument is wrong; the message is the sentence for the user."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of whole numbers: `64`, `16-128` (uniform) or `~100` (exponential with that mean, at least 1)."""

    low: int
    high: int
    exponential: bool = False

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Raises UsageError."""
        body = text.removeprefix("~")
        try:
            numbers = [int(part) for part in body.split("-")]
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= 2 or numbers[0] < 1 or numbers[0] > numbers[-1]:
            raise UsageError(f"{text!r} is no length: use 64, 16-128 or ~100")
        if body != text and len(numbers) != 1:
            raise UsageError(f"{text!r} is no length: ~ takes one number, the mean")
        return cls(numbers[0], numbers[-1], exponential=body != text)

    def draw(self, rng: random.Random) -> int:
        """One length."""
        if self.exponential:
            return max(1, round(rng.expovariate(1.0 / self.low)))
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Workload:
    """How requests are made. Prompts are random token ids of `token_range`, or pieces of `text` counted in words."""

    model: str
    chat: bool
    prompt_lengths: Lengths
    output_lengths: Lengths
    token_range: tuple[int, int] = (10, 99)
    text: str | None = None
    temperature: float = 0.0
    ignore_eos: bool = False

    def bodies(self, seed: int) -> Iterator[dict[str, Any]]:
        """Request bodies without end; the n-th is the same for the same seed."""
        words = None if self.text is None else self.text.split()
        for index in itertools.count():
            rng = random.Random(f"{seed}/{index}")
            length = self.prompt_lengths.draw(rng)
            body: dict[str, Any] = {
                "model": self.model,
                "max_tokens": self.output_lengths.draw(rng),
                "temperature": self.temperature,
                "seed": index,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            if self.ignore_eos:
                body["ignore_eos"] = True
            prompt = (
                [rng.randint(*self.token_range) for _ in range(length)]
                if words is None
                else _piece(words, length, rng)
            )
            if self.chat:
                body["messages"] = [{"role": "user", "content": prompt}]
            else:
                body["prompt"] = prompt
            yield body


def _piece(words: list[str], length: int, rng: random.Random) -> str:
    """`length` words in a row from a random place, going round at the end."""
    start = rng.randrange(len(words))
    return " ".join(words[(start + i) % len(words)] for i in range(length))


def poisson_times(rate: float, seed: int) -> Iterator[float]:
    """Arrival times in seconds from the start, `rate` per second on average."""
    rng = random.Random(f"{seed}/arrivals")
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now
