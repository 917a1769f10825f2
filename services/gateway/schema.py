"""The request bodies: OpenAI's fields, three of our own, and clear words for what is not supported.

Own fields: `top_k`, `ignore_eos`, `return_token_ids`. Unknown fields are ignored, as clients send many. Types are
strict: "5" is no number. Ranges of sampling values are checked by `common.request.SamplingParams`.
"""

from typing import Any, Literal, Self, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from services.gateway.errors import ApiError, invalid

_Body = TypeVar("_Body", bound=BaseModel)

_MAX_CHOICES = 128
_MAX_PROMPTS = 1024
_MAX_STOPS = 4


class StreamOptions(BaseModel):
    """Only with `stream`."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class _Common(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(strict=True, protected_namespaces=())

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = Field(default=None, ge=1, le=_MAX_CHOICES)
    stop: str | list[str] | None = None
    seed: int | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False
    # accepted at the value that changes nothing
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and len(stop) > _MAX_STOPS:
            raise ValueError(f"at most {_MAX_STOPS} stop strings are allowed, not {len(stop)}")
        if isinstance(stop, list) and "" in stop:
            raise ValueError("a stop string must not be empty")
        return stop

    @model_validator(mode="after")
    def _check_supported(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; an empty string alone means none."""
        if isinstance(self.stop, str):
            return (self.stop,) if self.stop else ()
        return tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Common):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = None
    suffix: str | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _check_prompt(cls, prompt: object) -> object:
        """One sentence instead of one complaint per member of the union."""
        if isinstance(prompt, list) and prompt:
            first = prompt[0]
            inner = first if isinstance(first, list) else prompt
            kind: type = int if isinstance(first, list) else type(first)
            if (isinstance(first, list) and not all(isinstance(p, list) for p in prompt)) or (
                kind not in (int, str) or any(type(item) is not kind for item in inner)
            ):
                raise ValueError(_PROMPT_SHAPES)
        elif not isinstance(prompt, str):
            raise ValueError(_PROMPT_SHAPES)
        return prompt

    @model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported unless it equals n")
        if self.suffix:
            raise ValueError("suffix is not supported")
        if len(self.prompts) > _MAX_PROMPTS:
            raise ValueError(f"at most {_MAX_PROMPTS} prompts are allowed in one request")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One element per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


_PROMPT_SHAPES = "must be a string, a list of strings, a list of token ids or a list of such lists, and not empty"


class ChatMessage(BaseModel):
    """One message; `content` may be text or a list of text parts."""

    model_config = ConfigDict(strict=True, extra="allow")  # templates know more fields than we do

    role: str
    content: str | list[dict[str, Any]] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message with its text joined. Raises ApiError 400 for parts that are no text."""
        message = self.model_dump(exclude_unset=True)
        if isinstance(self.content, list):
            texts = []
            for part in self.content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise invalid(
                        f"content parts of type {part.get('type')!r} are not supported, only text",
                        param="messages",
                    )
                texts.append(part["text"])
            message["content"] = "".join(texts)
        return message


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if (self.tools and self.tool_choice != "none") or self.functions:
            raise ValueError("tools are not supported")
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise ValueError("response_format is not supported, only text")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self


class RebalanceRequest(BaseModel):
    """POST /rebalance: look for a plan (with so many `replicas` per layer, else as many as now) or take this one.

    `dry_run`: answer the plan, carry nothing out.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    plan: dict[str, Any] | None = None
    replicas: int | None = Field(None, ge=0, le=4096)
    dry_run: bool = False


def parse_body(schema: type[_Body], body: bytes) -> _Body:
    """Check a body. Raises ApiError 400 with the first thing that is wrong, by field."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise invalid(f"the body is not valid JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise invalid("the body must be a JSON object")
    try:
        return schema.model_validate(document)
    except ValidationError as exc:
        raise _explain(exc) from exc


def _explain(error: ValidationError) -> ApiError:
    """The first complaint as one sentence that names the field."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if not where:
        return invalid(message, param=message.split()[0] if message else None)
    return invalid(f"{where}: {message[:1].lower()}{message[1:]}", param=str(first["loc"][0]))
