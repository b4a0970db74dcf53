"""HTTP underneath the API: bodies with a limit, clients that go away, event streams, request ids, errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from twostroke_chassis.logs import about_request
from twostroke_chassis.tracing import in_trace

from twostroke_router.arrival import Arrival
from twostroke_router.errors import Fault, RequestError, internal_error
from twostroke_router.intake import clean_request_id
from twostroke_router.openai_render import error_body

REQUEST_ID = "x-request-id"

_log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode


class JsonResponse(Response):
    """An object as JSON."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Encodes the object."""
        return _encode(content)


def error_response(error: RequestError) -> Response:
    """A refused or failed request."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.fault is Fault.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    return JsonResponse(error_body(error), error.fault.http_status, headers)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        RequestError: it is longer than the limit, or the client went away.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_bytes:
                raise _too_large(max_bytes)
            chunks.append(chunk)
    except ClientDisconnect:
        raise client_gone() from None
    return b"".join(chunks)


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(Fault.TOO_LARGE, f"the body is longer than {max_bytes} bytes")


def client_gone() -> RequestError:
    """The client closed its connection."""
    return RequestError(Fault.CANCELLED, "the client went away")


@asynccontextmanager
async def cancelled_on_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancels the block when the client goes away; the body must have been read.

    Raises:
        RequestError: the client went away.
    """
    task = asyncio.current_task()
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        if task is not None:
            task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if is_gone and task is not None and task.uncancel() == 0:
            raise client_gone() from None
        raise
    finally:
        watcher.cancel()


class EventStream(Response):
    """Server-sent events from a generator, which is closed whatever happens. A failure is its last event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[object, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events as they come."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            try:
                async with cancelled_on_disconnect(receive):
                    async for event in events:
                        await send(_event(event))
                    await send(_body(b"data: [DONE]\n\n"))
            except RequestError as error:
                if error.fault is not Fault.CANCELLED:
                    await send(_event(error_body(error)))
            except Exception:  # noqa: BLE001 - the stream's boundary: a cut answer must not look whole
                _log.exception("an event stream failed")
                await send(_event(error_body(internal_error())))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(event: object) -> Message:
    return _body(b"data: " + _encode(event) + b"\n\n")


def _body(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}


class RequestIds:
    """Middleware: every request has an id, the client's or a drawn one, which its answer and its log lines carry."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application with `request_id` and `arrival` in the scope's state."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id, arrival = clean_request_id(headers.get(REQUEST_ID)), Arrival.of(headers)
        scope.setdefault("state", {}).update(request_id=request_id, arrival=arrival)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        with in_trace(arrival.traceparent), about_request(request_id):
            await self._app(scope, receive, send_with_id)
