"""The HTTP application: routes, errors in OpenAI's format, API keys, and the cluster's state.

Give the runner `handler_cancellation=True`: a client that hangs up must cancel its request at the worker.
"""

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from aiohttp import web
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema

from common.config import ClusterConfig
from common.errors import AtollError
from common.placement.plan import Plan
from common.routing_trace_file import pack_trace
from services.gateway.auth import ApiKeys
from services.gateway.backends import Backends
from services.gateway.dispatch import Dispatcher
from services.gateway.errors import ApiError, from_atoll, unavailable
from services.gateway.handlers import Generation, json_response, unknown_model
from services.gateway.metrics import GatewayMetrics
from services.gateway.model import ServedModel
from services.gateway.schema import ChatRequest, CompletionRequest, RebalanceRequest, parse_body

log = logging.getLogger(__name__)

_STATUS_DEADLINE_S = 1.0  # how long /cluster, /ready and /metrics wait for processes to answer
_MAX_BODY_NBYTES = 16 << 20
_OPEN_PATHS = frozenset({"/health", "/ready"})  # probes have no key

_Next = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What the application is made of; `keys` None leaves it open."""

    config: ClusterConfig
    model: ServedModel
    backends: Backends
    dispatcher: Dispatcher
    metrics: GatewayMetrics
    keys: ApiKeys | None = None


PARTS = web.AppKey("parts", Parts)


def make_app(parts: Parts) -> web.Application:
    """Put the parts behind their routes."""
    app = web.Application(
        middlewares=[_errors_middleware, _auth_middleware], client_max_size=_MAX_BODY_NBYTES
    )
    app[PARTS] = parts
    generation = Generation(parts.model, parts.dispatcher)
    app.add_routes(
        [
            web.post("/v1/completions", generation.completions),
            web.post("/v1/chat/completions", generation.chat),
            web.get("/v1/models", _models),
            web.get("/v1/models/{id:.+}", _model),
            web.get("/health", _health),
            web.get("/ready", _ready),
            web.get("/metrics", _metrics),
            web.get("/cluster", _cluster),
            web.get("/plan", _plan),
            web.get("/routing", _routing),
            web.post("/rebalance", _rebalance),
            web.get("/openapi.json", _openapi),
        ]
    )
    return app


@web.middleware
async def _errors_middleware(request: web.Request, handler: _Next) -> web.StreamResponse:
    """Every failure becomes an OpenAI error object with one sentence."""
    try:
        return await handler(request)
    except ApiError as exc:
        error = exc
    except AtollError as exc:
        error = from_atoll(exc)
    except web.HTTPException as exc:  # routing and body limits
        if exc.status < 400:
            raise
        error = _from_http(request, exc)
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        error = ApiError(500, "internal error", kind="server_error", code="internal_error")
    response = json_response(error.body(), status=error.status)
    response.headers.update(error.headers)
    return response


def _from_http(request: web.Request, exc: web.HTTPException) -> ApiError:
    match exc:
        case web.HTTPNotFound():
            return ApiError(404, f"there is no {request.path}", code="not_found")
        case web.HTTPMethodNotAllowed():
            allowed = " or ".join(sorted(exc.allowed_methods))
            return ApiError(405, f"{request.path} takes {allowed}, not {request.method}")
        case web.HTTPRequestEntityTooLarge():
            return ApiError(413, f"the body is larger than {_MAX_BODY_NBYTES} bytes")
        case _:
            return ApiError(exc.status, exc.reason)


@web.middleware
async def _auth_middleware(request: web.Request, handler: _Next) -> web.StreamResponse:
    keys = request.app[PARTS].keys
    if keys is not None and request.path not in _OPEN_PATHS:
        header = request.headers.get("Authorization", "")
        if not header:
            raise ApiError(
                401, "an API key is needed: Authorization: Bearer KEY", code="missing_api_key"
            )
        if not keys.allow(header):
            raise ApiError(401, "the API key is wrong", code="invalid_api_key")
    return await handler(request)


async def _models(request: web.Request) -> web.Response:
    return json_response({"object": "list", "data": [_describe(request.app[PARTS].model)]})


async def _model(request: web.Request) -> web.Response:
    model = request.app[PARTS].model
    if request.match_info["id"] != model.name:
        raise unknown_model(request.match_info["id"])
    return json_response(_describe(model))


def _describe(model: ServedModel) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "atoll",
        "max_model_len": model.context,
    }


async def _health(_: web.Request) -> web.Response:
    return json_response({"status": "alive"})


async def _ready(request: web.Request) -> web.Response:
    parts = request.app[PARTS]
    if parts.dispatcher.draining:
        missing = ["the gateway is shutting down"]
    else:
        # States are pushed, but who asks while something is missing wants to know now.
        if parts.backends.missing():
            await parts.backends.refresh(deadline_s=_STATUS_DEADLINE_S)
        missing = parts.backends.missing()
    if missing:
        error = ApiError(503, "; ".join(missing), kind="service_unavailable", code="not_ready")
        return json_response({"status": "not ready", **error.body()}, status=503)
    return json_response({"status": "ready"})


async def _metrics(request: web.Request) -> web.Response:
    parts = request.app[PARTS]
    await parts.backends.refresh(deadline_s=_STATUS_DEADLINE_S)
    return web.Response(body=parts.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _cluster(request: web.Request) -> web.Response:
    parts = request.app[PARTS]
    await parts.backends.refresh(deadline_s=_STATUS_DEADLINE_S)
    cluster = parts.config.cluster
    missing = parts.backends.missing()
    return json_response(
        {
            "name": cluster.name,
            "model": parts.model.name,
            "epoch": cluster.epoch,
            "placement": parts.backends.rebalancer.to_json(),
            "wire": cluster.wire,
            "ready": not missing,
            "missing": missing,
            "processes": parts.backends.processes(),
        }
    )


async def _plan(request: web.Request) -> web.Response:
    plan = request.app[PARTS].backends.rebalancer.in_force
    if plan is None:
        raise unavailable("no router is connected")
    return json_response(plan.to_json())


async def _routing(request: web.Request) -> web.Response:
    trace = await request.app[PARTS].backends.rebalancer.trace()
    return web.Response(body=pack_trace(trace), content_type="application/octet-stream")


async def _rebalance(request: web.Request) -> web.Response:
    body = parse_body(RebalanceRequest, await request.read() or b"{}")
    rebalancer, started = request.app[PARTS].backends.rebalancer, time.monotonic()
    answer: dict[str, Any] = {}
    if body.plan is not None:
        plan = Plan.from_json(body.plan)
    else:
        found = await rebalancer.search(replicas=body.replicas)
        plan = found.plan
        answer = {
            "moves": found.num_moves, "before": asdict(found.before), "after": asdict(found.after),
            "searched_s": time.monotonic() - started,
        }  # fmt: skip
    if body.dry_run:
        return json_response(answer | {"plan": plan.to_json()})
    started = time.monotonic()
    epoch = await rebalancer.carry_out(plan)
    served = rebalancer.to_json()["served"]
    return json_response(
        answer | {"epoch": epoch, "served": served, "took_s": time.monotonic() - started}
    )


async def _openapi(request: web.Request) -> web.Response:
    schemas = (CompletionRequest, ChatRequest, RebalanceRequest)
    _schemas, definitions = models_json_schema(
        [(schema, "validation") for schema in schemas], ref_template="#/components/schemas/{model}"
    )
    posts = {
        "/v1/completions": "CompletionRequest", "/v1/chat/completions": "ChatRequest", "/rebalance": "RebalanceRequest",
    }  # fmt: skip
    gets = (
        "/v1/models", "/v1/models/{id}", "/health", "/ready", "/metrics", "/cluster", "/plan", "/routing",
    )  # fmt: skip
    paths: dict[str, object] = {
        path: {"post": _operation(name, [400, 401, 404, 429, 500, 503])}
        for path, name in posts.items()
    }
    paths |= {path: {"get": _operation(None, [401, 404, 503])} for path in gets}
    return json_response(
        {
            "openapi": "3.1.0",
            "info": {"title": f"Atoll: {request.app[PARTS].model.name}", "version": "1"},
            "paths": paths,
            "components": {"schemas": definitions["$defs"]},
        }
    )


def _operation(schema: str | None, errors: list[int]) -> dict[str, object]:
    operation: dict[str, object] = {
        "responses": {"200": {"description": "OK"}}
        | {str(status): {"description": "An error object"} for status in errors}
    }
    if schema is not None:
        content = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
        operation["requestBody"] = {"required": True, "content": {"application/json": content}}
    return operation
