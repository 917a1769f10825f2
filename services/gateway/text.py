"""Token ids to text, one token at a time, and the search for stop strings in it.

Invariants: the pieces of a `Detokenizer` joined equal decoding all tokens at once; no piece ends inside a UTF-8
character. A `StopMatcher` gives the same result however its text is cut into pieces, and never lets out a character
that may still turn out to belong to a stop string.
"""

import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from tokenizers import Tokenizer

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")

# Decoding a window costs time in proportion to its length, so it is cut back to its tail when it gets long. The tail
# stays as context because a decoder may treat the first token of a text in its own way (strip a leading space).
_WINDOW = 16
_TAIL = 4


class Detokenizer:
    """The text of a growing list of tokens. Those in `special_ids` have no text."""

    def __init__(self, tokenizer: Tokenizer | None, special_ids: AbstractSet[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that are out

    def add(self, token_id: int) -> str:
        """The text that this token makes certain, often its own, "" while a character is incomplete."""
        if self._tokenizer is None or token_id in self._special_ids:
            return ""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:  # a vocabulary padded beyond the tokenizer's
            return ""
        self._window.append(token_id)
        # A run of byte tokens decodes as a whole, to nothing but replacement characters if any byte is wrong.
        if _BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._decode(self._window)
        certain = len(text.rstrip(_REPLACEMENT))
        piece = text[self._emitted : certain]
        self._emitted = max(self._emitted, certain)
        if len(self._window) >= _WINDOW and certain == len(text):
            self._cut()
        return piece

    def flush(self) -> str:
        """What was held back: no more tokens will come."""
        if self._tokenizer is None:
            return ""
        text = self._decode(self._window)
        piece, self._emitted = text[self._emitted :], len(text)
        return piece

    def _cut(self) -> None:
        tail = self._window[-_TAIL:]
        text = self._decode(tail)
        if text and not text.endswith(_REPLACEMENT):
            self._window, self._emitted = tail, len(text)

    def _decode(self, token_ids: Sequence[int]) -> str:
        assert self._tokenizer is not None, "decoding without a tokenizer"
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that decoding leaves out."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)


class StopMatcher:
    """Finds the stop string that is complete first; the text before it is all that gets out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """More text; returns what may be shown. After a match (`found`) nothing is shown any more."""
        if self.found:
            return ""
        text = self._held + piece
        if not self._stops:
            return text
        matches = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if matches:
            self.found, self._held = True, ""
            return text[: min(matches)[1]]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The held text: no more will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
