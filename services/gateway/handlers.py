"""The two endpoints that generate: from a body to an answer, whole or as server-sent events.

Before the first event of a stream arrives nothing is sent, so a request that fails early gets a proper HTTP status.
Later failures are an `error` event, and a stream without `[DONE]` is one that failed.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import ClientConnectionResetError, ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError

from common.request import TokenEvent
from services.gateway.choices import Choice, Piece
from services.gateway.dispatch import Batch, Dispatcher
from services.gateway.errors import ApiError, invalid
from services.gateway.model import ServedModel
from services.gateway.prepare import Job, chat_job, completion_job
from services.gateway.render import ChatFormat, CompletionFormat, Format
from services.gateway.schema import ChatRequest, CompletionRequest, parse_body

# A worker fails requests at their deadline by itself; this is for a gateway whose reader does not read.
_GRACE_S = 5.0

_BODY_S = 60.0  # for a client to send its body

_SSE_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies must not collect the stream
}


class Generation:
    """Handlers of /v1/completions and /v1/chat/completions."""

    def __init__(self, model: ServedModel, dispatcher: Dispatcher) -> None:
        self._model = model
        self._dispatcher = dispatcher

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions."""
        body = parse_body(CompletionRequest, await _read(request))
        self._check_model(body.model)
        job = await completion_job(body, self._model)
        layout = CompletionFormat(job, self._model, created=int(time.time()))
        return await self._answer(request, job, layout)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions."""
        body = parse_body(ChatRequest, await _read(request))
        self._check_model(body.model)
        job = await chat_job(body, self._model)
        layout = ChatFormat(job, self._model, created=int(time.time()))
        return await self._answer(request, job, layout)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model.name:
            raise unknown_model(name)

    async def _answer(self, request: web.Request, job: Job, layout: Format) -> web.StreamResponse:
        choices = [Choice(job, index, self._model) for index in range(len(job.requests))]
        batch = self._dispatcher.submit(job.requests)
        try:  # the client's disconnect cancels this handler: whatever happens, nothing goes on running
            async with asyncio.timeout_at(batch.deadline + _GRACE_S):
                if job.stream:
                    return await _stream(request, job, layout, choices, batch)
                return await _collect(layout, choices, batch)
        except TimeoutError as exc:
            raise ApiError(
                504, "the request's deadline passed", kind="server_error", code="deadline"
            ) from exc
        finally:
            batch.close()


def unknown_model(name: str) -> ApiError:
    """The model is not served here (404)."""
    return ApiError(
        404, f"the model {name!r} does not exist", param="model", code="model_not_found"
    )


def json_response(body: dict[str, Any], *, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")


async def _read(request: web.Request) -> bytes:
    """The whole body. Raises ApiError 408 when it does not come, 400 when it cannot be decoded."""
    try:
        async with asyncio.timeout(_BODY_S):
            return await request.read()
    except TimeoutError as exc:
        raise ApiError(408, f"the body did not arrive within {_BODY_S:g} s") from exc
    except (web.RequestPayloadError, HttpProcessingError, ClientPayloadError) as exc:
        raise invalid(f"the body cannot be read: {exc}") from exc


async def _collect(layout: Format, choices: Sequence[Choice], batch: Batch) -> web.Response:
    pieces = [Piece() for _ in choices]
    while not all(choice.finished for choice in choices):
        for index, event in await batch.events():
            piece = _advance(choices[index], event, batch)
            if piece is not None:
                pieces[index].extend(piece)
    return json_response(layout.whole(choices, pieces))


async def _stream(
    request: web.Request, job: Job, layout: Format, choices: Sequence[Choice], batch: Batch
) -> web.StreamResponse:
    response = web.StreamResponse(headers=_SSE_HEADERS)
    try:
        while not all(choice.finished for choice in choices):
            await _write_events(request, response, layout, choices, batch)
        if job.include_usage:
            await response.write(_sse(layout.usage_chunk(choices)))
        await response.write(b"data: [DONE]\n\n")
    except ApiError as error:
        if not response.prepared:
            raise
        await response.write(_sse(error.body()))
    except ClientConnectionResetError:
        return response  # nobody reads any more; the caller cancels
    except BaseException:
        # A fault of ours or the deadline. A second status would be read as data: cut the stream, so that nobody takes
        # it as whole.
        if response.prepared and request.transport is not None:
            request.transport.abort()
        raise
    await response.write_eof()
    return response


async def _write_events(
    request: web.Request, response: web.StreamResponse, layout: Format, choices: Sequence[Choice],
    batch: Batch,
) -> None:  # fmt: skip
    """Wait for events and write them as one piece of data. Raises ApiError after writing what preceded it."""
    chunks: list[dict[str, Any]] = []
    failure: ApiError | None = None
    for index, event in await batch.events():
        try:
            piece = _advance(choices[index], event, batch)
        except ApiError as error:
            failure = error
            break
        if piece is not None:
            chunks.append(layout.chunk(choices[index], piece))
    if failure is not None and not response.prepared:
        raise failure
    if not response.prepared:
        await response.prepare(request)
        first = [chunk for choice in choices for chunk in layout.first_chunks(choice.index)]
        chunks = first + chunks
    if chunks:
        await response.write(b"".join(_sse(chunk) for chunk in chunks))
    if failure is not None:
        raise failure


def _advance(choice: Choice, event: TokenEvent, batch: Batch) -> Piece | None:
    """None for what arrives behind a stop string."""
    if choice.finished:
        return None
    piece = choice.advance(event)
    if choice.stopped_by_string:
        batch.stop(choice.index)
    return piece


def _sse(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
