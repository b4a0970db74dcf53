"""The HTTP surface: the OpenAI API, tokenizing, and what people and probes ask of a router."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from twostroke_chassis.telemetry import CONTENT_TYPE, metrics_text

from twostroke_router.errors import Fault, RequestError, internal_error, invalid
from twostroke_router.frontend import Frontend
from twostroke_router.http_openai import OpenAI
from twostroke_router.http_wire import JsonResponse, RequestIds, error_response, read_body
from twostroke_router.link import WorkerLink
from twostroke_router.openai_schema import DetokenizeRequest, TokenizeRequest, decode_body, turns
from twostroke_router.openapi import openapi_route
from twostroke_router.request_log import MAX_LISTED
from twostroke_router.sampling_check import check_prompt_ids

_log = logging.getLogger(__name__)


class HttpApi:
    """Every endpoint but those that generate."""

    def __init__(self, frontend: Frontend, max_body_bytes: int) -> None:
        self._frontend = frontend
        self._max_body_bytes = max_body_bytes

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self._authorize(request)
        return JsonResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        self._authorize(request)
        self._frontend.check_model(request.path_params["model_id"])
        return JsonResponse(self._model())

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        self._authorize(request)
        body = decode_body(await read_body(request, self._max_body_bytes), TokenizeRequest)
        self._frontend.check_model(body.model)
        text = self._frontend.text
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt", "give either prompt or messages")
        if body.messages is not None:
            conversation = turns(body.messages)
            token_ids = await text.encode_chat(conversation, add_generation_prompt=body.add_generation_prompt)
        else:
            token_ids = await text.encode(body.prompt or "", "prompt", body.add_special_tokens)
        max_model_len = self._frontend.limits.max_model_len
        return JsonResponse({"tokens": token_ids, "count": len(token_ids), "max_model_len": max_model_len})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        self._authorize(request)
        body = decode_body(await read_body(request, self._max_body_bytes), DetokenizeRequest)
        self._frontend.check_model(body.model)
        text = self._frontend.text
        token_ids = check_prompt_ids("tokens", body.tokens, text.vocab_size) if body.tokens else ()
        return JsonResponse({"prompt": text.decode(token_ids)})

    async def health(self, request: Request) -> Response:
        """GET /health: this process lives."""
        return JsonResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: a request would find a worker."""
        is_ready = self._frontend.cluster.directory.is_ready
        return JsonResponse({"ready": is_ready}, 200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics, for Prometheus."""
        return Response(metrics_text(self._frontend.cluster.metrics.registry), headers={"Content-Type": CONTENT_TYPE})

    async def requests(self, request: Request) -> Response:
        """GET /requests: the latest requests of all routers, newest first."""
        tenant = self._authorize(request)
        limit = request.query_params.get("limit", "50")
        if not (limit.isascii() and limit.isdigit() and len(limit) < 6 and 1 <= int(limit) <= MAX_LISTED):
            raise invalid("limit", f"must be a number from 1 to {MAX_LISTED}")
        found = await self._frontend.log.latest(int(limit), self._frontend.visible_to(tenant))
        return JsonResponse({"requests": found})

    async def request(self, request: Request) -> Response:
        """GET /requests/{id}: where one request's time went."""
        tenant = self._authorize(request)
        request_id = request.path_params["request_id"]
        found = await self._frontend.log.get(request_id, self._frontend.visible_to(tenant))
        if found is None:
            message = f"request {request_id!r} is not known: it has not ended, or is no longer kept"
            raise RequestError(Fault.NO_REQUEST, message)
        return JsonResponse(found)

    async def cluster(self, request: Request) -> Response:
        """GET /cluster: every worker as this router knows it."""
        frontend = self._frontend
        router = {"id": frontend.router_id, "live": frontend.cluster.admission.num_live}
        workers = [worker_status(link) for link in frontend.cluster.directory.links]
        return JsonResponse({"model": frontend.model_name, "routers": [router], "workers": workers})

    def _authorize(self, request: Request) -> str:
        return self._frontend.caller(request.headers, request.state.request_id).tenant

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._frontend.model_name,
            "object": "model",
            "created": self._frontend.created_s,
            "owned_by": "twostroke",
            "max_model_len": self._frontend.limits.max_model_len,
        }


def worker_status(link: WorkerLink) -> dict[str, Any]:
    """One worker of /cluster."""
    load = link.load
    queried = load.prefix_query_tokens
    return {
        "id": link.worker_id,
        "role": link.record.role,
        "endpoint": link.record.endpoint,
        "state": link.state,
        "load": {
            "waiting": load.waiting,
            "running": load.running,
            "queued_tokens": load.queued_tokens,
            "step_s": load.step_s,
            "steps": load.steps,
        },
        "blocks": {
            "total": load.blocks_total,
            "free": load.blocks_free,
            "cached": load.blocks_cached,
            "leased": load.blocks_leased,
            "promised": load.blocks_promised,
        },
        "hit_rate": load.prefix_hit_tokens / queried if queried else None,
        "prompt_tokens": queried,
        "leases_open": load.leases_open,
        "kv_bytes": load.kv_bytes,
        "preemptions": load.preemptions,
        "longest_wait_s": load.longest_wait_s,
        "digest_failures": load.digest_failures,
    }


async def _on_request_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestError):
        raise error
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    fault = {404: Fault.NO_ROUTE, 405: Fault.METHOD}.get(error.status_code, Fault.INVALID)
    where = f"{request.method} {request.url.path}"
    message = {Fault.NO_ROUTE: f"there is no {where}", Fault.METHOD: f"{where} is not allowed"}.get(fault, error.detail)
    response = error_response(RequestError(fault, message))
    response.headers.update(error.headers or {})
    return response


async def _on_defect(request: Request, error: Exception) -> Response:
    return error_response(internal_error())


def build_app(frontend: Frontend, max_body_bytes: int, more_routes: Sequence[Route] = ()) -> Starlette:
    """The ASGI application: the API, and `more_routes` beside it."""
    api, openai = HttpApi(frontend, max_body_bytes), OpenAI(frontend, max_body_bytes)
    routes = [
        Route("/v1/chat/completions", openai.chat, methods=["POST"]),
        Route("/v1/completions", openai.completions, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{model_id:path}", api.model),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/health", api.health),
        Route("/ready", api.ready),
        Route("/metrics", api.metrics),
        Route("/cluster", api.cluster),
        Route("/requests", api.requests),
        Route("/requests/{request_id:path}", api.request),
        openapi_route(),
        *more_routes,
    ]
    handlers = {RequestError: _on_request_error, HTTPException: _on_http_exception, Exception: _on_defect}
    app = Starlette(routes=routes, middleware=[Middleware(RequestIds)], exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app
