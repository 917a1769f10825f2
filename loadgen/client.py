"""One streamed request against an OpenAI-style server, to a record of what came when."""

import asyncio
import json
from collections.abc import AsyncIterator
from time import perf_counter  # uvloop's own clock counts milliseconds
from typing import Any

import aiohttp

from loadgen.stats import Record, State

_MAX_EVENT_NBYTES = 16 << 20


class _ServerError(Exception):
    """The server said that the request failed."""


async def send(
    session: aiohttp.ClientSession, path: str, body: dict[str, Any], record: Record
) -> None:
    """Send a request and follow its stream into `record`; never raises but for cancellation."""
    record.state = State.TRUNCATED  # until there is an end
    try:
        async with session.post(path, json=body) as response:
            if response.status != 200:
                raise _ServerError(f"HTTP {response.status}: {await _error_message(response)}")
            ended = await _follow(response, record)
        if ended:
            record.state = State.FINISHED
        else:
            record.detail = f"the stream ended after {len(record.arrivals)} chunks"
    except _ServerError as exc:
        record.state, record.detail = State.ERROR, str(exc)
    except aiohttp.ClientConnectorError as exc:  # it was never sent
        record.state, record.detail = State.ERROR, str(exc)
    except TimeoutError:
        record.state, record.detail = State.TIMEOUT, "no end within the time limit"
    except (aiohttp.ClientError, ValueError, OSError) as exc:
        record.state, record.detail = State.TRUNCATED, f"{type(exc).__name__}: {exc}"
    except asyncio.CancelledError:
        record.state, record.detail = State.CANCELLED, "by the load generator"
        raise
    finally:
        record.ended_at = perf_counter()


async def _follow(response: aiohttp.ClientResponse, record: Record) -> bool:
    """Read events; True when the stream ended as it should. Raises _ServerError for an error event."""
    finished = False
    async for data in _events(response):
        if data == b"[DONE]":
            return finished
        event = json.loads(data)
        if event.get("error"):
            error = event["error"]
            raise _ServerError(str(error.get("message") if isinstance(error, dict) else error))
        usage = event.get("usage")
        if usage:
            record.output_tokens = usage["completion_tokens"]
            record.prompt_tokens = usage["prompt_tokens"]
        choices = event.get("choices") or []
        if choices and _has_tokens(choices[0]):
            record.arrivals.append(perf_counter())
            if not usage:  # until the server says better: a token a chunk
                record.output_tokens += 1
        finished = finished or any(c.get("finish_reason") for c in choices)
    return False


def _has_tokens(choice: dict[str, Any]) -> bool:
    """False for a chat's opening chunk with the role; a chunk may hold tokens that have no text."""
    delta = choice.get("delta")
    if delta is None:
        return True
    return bool(delta.get("content") or "role" not in delta)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of each server-sent event. Raises ValueError for one without end."""
    buffer = bytearray()
    async for block in response.content.iter_any():
        buffer += block
        *lines, rest = buffer.split(b"\n")
        buffer = rest
        if len(buffer) > _MAX_EVENT_NBYTES:
            raise ValueError(f"an event of more than {_MAX_EVENT_NBYTES} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                yield bytes(line[5:].strip())


async def _error_message(response: aiohttp.ClientResponse) -> str:
    text = await response.text(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
