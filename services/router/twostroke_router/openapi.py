"""The OpenAPI document of the HTTP API, made from the very schemas that parse requests."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from twostroke_router import openapi_answers as answers
from twostroke_router.errors import Fault
from twostroke_router.explanation import Explanation
from twostroke_router.http_wire import JsonResponse
from twostroke_router.openai_schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from twostroke_router.openapi_fields import describe

Json = dict[str, Any]
Schema = type[msgspec.Struct]

PATH = "/openapi.json"
_REF = "#/components/schemas/{name}"
_BODIES: tuple[Schema, ...] = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
_CALL_FAULTS = (Fault.INVALID, Fault.UNAUTHENTICATED, Fault.NO_MODEL, Fault.TOO_LARGE, Fault.INTERNAL)
_GENERATE_FAULTS = (*_CALL_FAULTS, Fault.OVERLOADED, Fault.UNAVAILABLE, Fault.DEADLINE)
_RETRY = "Retry-After says when to try again."
_SAYS = {
    Fault.INVALID: "A field is malformed, out of range or unknown; `param` names it.",
    Fault.UNAUTHENTICATED: "The router wants an API key, and this is none of them.",
    Fault.NO_MODEL: "There is no such thing.",
    Fault.TOO_LARGE: "The body is longer than `--max-body-bytes`.",
    Fault.INTERNAL: "A defect; the router's log says more.",
    Fault.OVERLOADED: f"Too many requests live. {_RETRY}",
    Fault.UNAVAILABLE: f"No worker can take it. {_RETRY}",
    Fault.DEADLINE: "The request's time was up.",
}


def openapi_route() -> Route:
    """GET /openapi.json; the document is made once."""
    document = JsonResponse(openapi_document())

    async def openapi(request: Request) -> Response:
        return document

    return Route(PATH, openapi)


def openapi_document() -> Json:
    """The document, OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Twostroke",
            "version": version("twostroke"),
            "description": "The OpenAI API, tokenizing, and what people and probes ask of a router. Unknown fields of "
            "a body are refused by name.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "parameters": _parameters(),
        },
    }


def _schemas() -> Json:
    _, bodies = msgspec.json.schema_components(_BODIES, ref_template=_REF)
    describe(bodies)
    structs = [each for each in vars(answers).values() if isinstance(each, type) and issubclass(each, msgspec.Struct)]
    _, replies = msgspec.json.schema_components(
        [each for each in structs if each is not msgspec.Struct], ref_template=_REF
    )
    return dict(sorted({**bodies, **replies}.items()))


def _parameters() -> Json:
    return {
        "RequestId": _header("x-request-id", "Names the request in logs, traces and /requests; drawn if left out."),
        "Traceparent": _header("traceparent", "W3C trace context; the request joins this trace."),
        "Explain": _header("x-twostroke-explain", "1: the answer, or the ends of a stream, tell where it ran."),
    }


def _header(name: str, text: str) -> Json:
    return {"name": name, "in": "header", "required": False, "description": text, "schema": {"type": "string"}}


def _paths() -> Json:
    return {
        "/v1/chat/completions": {"post": _generating("chat", ChatRequest, answers.ChatCompletion)},
        "/v1/completions": {"post": _generating("completions", CompletionRequest, answers.Completion)},
        "/v1/models": {"get": _call("models", "What can be asked for.", answers.ModelList)},
        "/v1/models/{model_id}": {"get": _call("model", "One model.", answers.ModelCard, names=("model_id",))},
        "/tokenize": {"post": _call("tokenize", "Text to token ids.", answers.Tokenized, body=TokenizeRequest)},
        "/detokenize": {"post": _call("detokenize", "Token ids to text.", answers.Detokenized, body=DetokenizeRequest)},
        "/requests": {"get": _latest()},
        "/requests/{request_id}": {
            "get": _call("request", "Where a request's time went.", Explanation, names=("request_id",))
        },
        "/cluster": {"get": _open("cluster", "Every worker as this router knows it.", answers.ClusterState)},
        "/health": {"get": _open("health", "This process lives.", answers.Health)},
        "/ready": {"get": _readiness()},
        "/metrics": {"get": _text("metrics", "For Prometheus, in its text format.", "text/plain")},
        PATH: {"get": _text("openapi", "This document.", "application/json")},
        "/": {"get": _text("page", "The live page, unless `--no-dashboard`.", "text/html")},
    }


def _generating(name: str, body: Schema, whole: Schema) -> Json:
    """An endpoint that generates: an object, or a stream of events."""
    chunk = answers.ChatCompletionChunk if whole is answers.ChatCompletion else whole
    operation = _call(name, f"Generates text; see {body.__name__}.", whole, body=body, faults=_GENERATE_FAULTS)
    operation["parameters"] += [{"$ref": "#/components/parameters/Explain"}]
    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": _ref(chunk)}
    return operation


def _call(
    name: str,
    summary: str,
    answer: Schema,
    *,
    body: Schema | None = None,
    names: tuple[str, ...] = (),
    faults: tuple[Fault, ...] = _CALL_FAULTS,
) -> Json:
    """An endpoint that may want an API key."""
    if body is None:
        faults = tuple(fault for fault in faults if fault not in (Fault.INVALID, Fault.TOO_LARGE))
    if body is None and not names:
        faults = tuple(fault for fault in faults if fault is not Fault.NO_MODEL)
    operation = _open(name, summary, answer)
    operation["security"] = [{}, {"key": []}]
    operation["parameters"] = [
        *({"name": each, "in": "path", "required": True, "schema": {"type": "string"}} for each in names),
        {"$ref": "#/components/parameters/RequestId"},
        {"$ref": "#/components/parameters/Traceparent"},
    ]
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _json(body)}
    operation["responses"] |= {str(fault.http_status): _failure(fault) for fault in faults}
    return operation


def _failure(fault: Fault) -> Json:
    return {"description": _SAYS[fault], "content": _json(answers.ErrorBody)}


def _open(name: str, summary: str, answer: Schema) -> Json:
    """An endpoint for everyone who reaches the port."""
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": {"description": (answer.__doc__ or "").strip(), "content": _json(answer)}},
    }


def _latest() -> Json:
    operation = _call("requests", "The latest requests, newest first.", answers.ExplanationList)
    limit = {"name": "limit", "in": "query", "description": "How many.", "schema": {"type": "integer", "minimum": 1}}
    operation["parameters"].insert(0, limit)
    operation["responses"]["400"] = _failure(Fault.INVALID)
    return operation


def _readiness() -> Json:
    operation = _open("ready", "Whether a request would find a worker.", answers.Readiness)
    operation["responses"]["503"] = {"description": "It would not.", "content": _json(answers.Readiness)}
    return operation


def _text(name: str, summary: str, media_type: str) -> Json:
    schema = {"type": "object" if media_type == "application/json" else "string"}
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": {"description": summary, "content": {media_type: {"schema": schema}}}},
    }


def _json(schema: Schema) -> Json:
    return {"application/json": {"schema": _ref(schema)}}


def _ref(schema: Schema) -> Json:
    return {"$ref": _REF.format(name=schema.__name__)}
