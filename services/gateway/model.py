"""What the gateway knows of the served model: its limits, and its tokenizer and chat template where it has them."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers import decoders as tokenizer_decoders

from common.config import ClusterConfig
from common.errors import ModelError
from common.model.hf_config import read_json
from services.gateway.chat import ChatTemplate
from services.gateway.errors import invalid
from services.gateway.text import special_ids

# Characters from which encoding leaves the event loop: below it takes less than about a millisecond.
_ENCODE_INLINE = 4096


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Name and limits of the model; `context` bounds prompt plus new tokens."""

    name: str
    context: int
    vocab_size: int
    created: int  # Unix seconds, for /v1/models
    tokenizer: Tokenizer | None = None
    special_ids: frozenset[int] = frozenset()
    template: ChatTemplate | None = None
    bos_token_id: int | None = None  # put before every plain-text prompt, if the tokenizer does not

    async def encode(self, text: str, *, add_special_tokens: bool, param: str) -> tuple[int, ...]:
        """Token ids of a text. Raises ApiError 400 when the model has no tokenizer."""
        if self.tokenizer is None:
            raise invalid(
                f"the model {self.name!r} has no tokenizer: send the prompt as a list of token ids",
                param=param,
            )
        if len(text) < _ENCODE_INLINE:
            encoded = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        else:
            encoded = await asyncio.to_thread(
                self.tokenizer.encode, text, add_special_tokens=add_special_tokens
            )
        ids = tuple(encoded.ids)
        if add_special_tokens and self.bos_token_id is not None and ids[:1] != (self.bos_token_id,):
            ids = (self.bos_token_id, *ids)
        return ids

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """Text of a whole prompt, "" without a tokenizer."""
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def token_text(self, token_id: int) -> str:
        """One token on its own, for log-probabilities; bytes that are no text of their own as `bytes:\\xe4`."""
        if self.tokenizer is None:
            return f"token_id:{token_id}"
        text = str(self.tokenizer.decode([token_id], skip_special_tokens=False))
        if "\N{REPLACEMENT CHARACTER}" in text:
            raw = self.token_bytes(token_id)
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of a token, which may be part of a character."""
        if self.tokenizer is None:
            return b""
        token = self.tokenizer.id_to_token(token_id)
        text = str(self.tokenizer.decode([token_id], skip_special_tokens=False))
        if token is None or "\N{REPLACEMENT CHARACTER}" not in text:
            return text.encode()
        if token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:-1], 16)])
        if isinstance(self.tokenizer.decoder, tokenizer_decoders.ByteLevel):
            return bytes(_BYTE_OF[c] for c in token if c in _BYTE_OF)
        return text.encode()


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level tokenizers: visible Latin-1 as itself, the rest from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    alphabet = {chr(byte): byte for byte in visible}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(hidden)})
    return alphabet


_BYTE_OF = _byte_alphabet()


def load_model(config: ClusterConfig, *, created: int) -> ServedModel:
    """Read what the gateway needs from the model's directory. Raises ModelError naming the file."""
    directory = config.model.path
    document = read_json(directory / "config.json")
    tokenizer = _load_tokenizer(directory / "tokenizer.json")
    described = directory / "tokenizer_config.json"
    tokenizer_config = read_json(described) if described.exists() else {}
    bos = ChatTemplate.token_content(tokenizer_config.get("bos_token"))
    add_bos = tokenizer_config.get("add_bos_token") is True and tokenizer is not None and bos
    return ServedModel(
        name=config.served_name,
        context=_context(config, _positive(document, "max_position_embeddings", directory)),
        vocab_size=_positive(document, "vocab_size", directory),
        created=created,
        tokenizer=tokenizer,
        special_ids=special_ids(tokenizer) if tokenizer else frozenset(),
        template=ChatTemplate.load(directory, tokenizer_config) if tokenizer else None,
        bos_token_id=tokenizer.token_to_id(bos) if tokenizer and bos and add_bos else None,
    )


def _context(config: ClusterConfig, model_limit: int) -> int:
    """The smallest of what the model can, what the TOML allows and what one worker's cache holds."""
    attention = config.attention
    limits = [model_limit, attention.cache_tokens // attention.page_tokens * attention.page_tokens]
    if attention.max_context:
        limits.append(attention.max_context)
    return min(limits)


def _positive(document: dict[str, Any], key: str, directory: Path) -> int:
    value = document.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{directory}/config.json: {key} must be a positive number, not {value!r}")
    return value


def _load_tokenizer(path: Path) -> Tokenizer | None:
    if not path.exists():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as exc:  # the library raises plain Exception
        raise ModelError(f"{path} is no tokenizer: {exc}") from exc
