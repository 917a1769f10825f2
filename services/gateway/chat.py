"""Messages to one prompt text, by the Jinja template that came with the checkpoint.

The environment is what template authors test against: blocks trimmed, `raise_exception`, `strftime_now`, `tojson`
without HTML escapes, loop controls. Templates come from a download, so they run in Jinja's immutable sandbox.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.errors import ModelError
from services.gateway.errors import invalid

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """A compiled template with the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, where: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as exc:
            raise ModelError(f"{where}: the chat template does not compile: {exc}") from exc
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt, ready for the assistant's answer. Raises ApiError 400 when the template refuses."""
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )
        except TemplateError as exc:
            raise invalid(
                f"the chat template refused the messages: {exc}", param="messages"
            ) from exc
        except (TypeError, ValueError, KeyError, AttributeError) as exc:
            raise invalid(
                f"the chat template failed on these messages: {exc}", param="messages"
            ) from exc

    @classmethod
    def load(cls, directory: Path, tokenizer_config: dict[str, Any]) -> "ChatTemplate | None":
        """The template of a checkpoint: chat_template.jinja, else the one in tokenizer_config.json, else None."""
        tokens = {
            name: content
            for name in _SPECIAL
            if (content := cls.token_content(tokenizer_config.get(name)))
        }
        path = directory / "chat_template.jinja"
        if path.exists():
            return cls(path.read_text(encoding="utf-8"), tokens, where=str(path))
        source = tokenizer_config.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            return None
        return cls(source, tokens, where=str(directory / "tokenizer_config.json"))

    @staticmethod
    def token_content(token: object) -> str | None:
        """A special token's text, which tokenizer_config.json has plain or as an object with `content`."""
        if isinstance(token, dict):
            token = token.get("content")
        return token if isinstance(token, str) else None


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012  -- the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # local time, as template authors expect
