"""A request inside an attention worker: what was asked, what was made, how far the cache is. Counters, no behaviour."""

from dataclasses import dataclass

from common.request import FinishReason, Request


@dataclass(slots=True, eq=False)
class Sequence:
    """`num_computed` tokens have their latents in the cache; `token_ids` is the prompt and what was generated so far.

    `pages` is the sequence's page table, reserved for its whole possible length at admission, so that a running
    sequence never has to wait for memory.
    """

    request: Request
    token_ids: list[int]
    deadline_ns: int
    num_prompt: int
    num_computed: int = 0
    pages: tuple[int, ...] = ()
    lane: int = -1
    finish: FinishReason | None = None

    @property
    def num_generated(self) -> int:
        """Tokens made so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def max_tokens(self) -> int:
        """Tokens of prompt and longest possible continuation together."""
        return self.num_prompt + self.request.sampling.max_tokens

    @property
    def in_prefill(self) -> bool:
        """True while the prompt is not wholly in the cache."""
        return self.num_computed < self.num_prompt
