"""The bodies of answers, whole and in chunks, for completions and for chat."""

from collections.abc import Sequence
from typing import Any

from services.gateway.choices import Choice, Piece, TokenLogprob
from services.gateway.model import ServedModel
from services.gateway.prepare import Job


class Format:
    """What both endpoints share; each has a class of its own below."""

    kind_whole = ""
    kind_chunk = ""

    def __init__(self, job: Job, model: ServedModel, *, created: int) -> None:
        self._job = job
        self._model = model
        self._created = created

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._job.id,
            "object": kind,
            "created": self._created,
            "model": self._model.name,
            "choices": choices,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = self._envelope(self.kind_chunk, choices)
        if self._job.include_usage:
            chunk["usage"] = None  # on every chunk but the last
        return chunk

    def _usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        completion = sum(choice.num_tokens for choice in choices)
        return {
            "prompt_tokens": self._job.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self._job.prompt_tokens + completion,
        }

    def first_chunks(self, index: int) -> list[dict[str, Any]]:
        """Chunks of a choice before its first piece."""
        return []

    def chunk(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """One piece as a chunk of a stream."""
        return self._chunk([self._whole_choice(choice, piece)])

    def usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The last chunk, if the client wants one."""
        return {**self._envelope(self.kind_chunk, []), "usage": self._usage(choices)}

    def whole(self, choices: Sequence[Choice], pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer that is not streamed."""
        bodies = [self._whole_choice(c, p) for c, p in zip(choices, pieces, strict=True)]
        return {**self._envelope(self.kind_whole, bodies), "usage": self._usage(choices)}

    def _choice(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        body: dict[str, Any] = {
            "index": choice.index,
            "logprobs": self._logprobs(choice, piece.logprobs) if self._job.logprobs else None,
            "finish_reason": piece.finish_reason,
        }
        if self._job.return_token_ids:
            body["token_ids"] = piece.token_ids
        return body

    def _whole_choice(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, choice: Choice, entries: list[TokenLogprob]) -> dict[str, Any]:
        raise NotImplementedError


class CompletionFormat(Format):
    """`text_completion`: text, and log-probabilities as parallel lists."""

    kind_whole = kind_chunk = "text_completion"

    def __init__(self, job: Job, model: ServedModel, *, created: int) -> None:
        super().__init__(job, model, created=created)
        self._offsets = [0] * len(job.requests)  # characters of text before the next token

    def _whole_choice(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text, **self._choice(choice, piece)}

    def _logprobs(self, choice: Choice, entries: list[TokenLogprob]) -> dict[str, Any]:
        text = self._model.token_text
        tokens, offsets = [], []
        for entry in entries:
            tokens.append(text(entry.token_id))
            offsets.append(self._offsets[choice.index])
            self._offsets[choice.index] += len(tokens[-1])
        return {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [
                None
                if entry.logprob is None
                else {text(token): value for token, value in entry.top}
                for entry in entries
            ],
            "text_offset": offsets,
        }


class ChatFormat(Format):
    """`chat.completion`: a message or deltas of one."""

    kind_whole = "chat.completion"
    kind_chunk = "chat.completion.chunk"

    def first_chunks(self, index: int) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return [self._chunk([choice])]

    def chunk(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text}
        return self._chunk([{**self._choice(choice, piece), "delta": delta}])

    def _whole_choice(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {**self._choice(choice, piece), "message": message}

    def _logprobs(self, choice: Choice, entries: list[TokenLogprob]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._token(entry.token_id, entry.logprob),
                    "top_logprobs": [self._token(token, value) for token, value in entry.top],
                }
                for entry in entries
            ],
            "refusal": None,
        }

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = self._model.token_bytes(token_id)
        return {"token": self._model.token_text(token_id), "logprob": logprob, "bytes": list(raw)}
