"""The gRPC surface: the public Inference service."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, Protocol

import grpc
import grpc.aio
from twostroke_chassis.logs import about_request
from twostroke_chassis.tracing import in_trace
from twostroke_engine.request import SamplingParams, TokenOut
from twostroke_proto.v1 import inference_pb2, inference_pb2_grpc, types_pb2

from twostroke_router.arrival import Arrival
from twostroke_router.choice import Piece
from twostroke_router.errors import RequestError, internal_error, invalid
from twostroke_router.explanation import Usage
from twostroke_router.frontend import Frontend
from twostroke_router.intake import Ask, draw_seed
from twostroke_router.openai_schema import ROLES
from twostroke_router.sampling_check import check_prompt_ids, check_stops

_log = logging.getLogger(__name__)

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name

_PLAIN = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "logprobs",
)


class Call(Protocol):
    """What is used of a servicer context of grpc.aio."""

    def invocation_metadata(self) -> Any:
        """Headers."""

    def time_remaining(self) -> float | None:
        """Until the client's deadline."""

    async def write(self, message: inference_pb2.GenerateResponse) -> None:
        """Sends a message of the stream."""

    abort: Callable[..., Awaitable[None]]


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Generate, Tokenize and ListModels. A cancelled call closes its saga, which cancels on the workers."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Call) -> None:  # type: ignore[override]
        """Streams the answer; the last message has usage."""
        headers = _headers(context)
        arrival = Arrival.of(headers)
        async with refusing(context):
            deadline_s = context.time_remaining()
            caller = self._frontend.caller(
                headers, request.request_id, arrival, deadline_s=deadline_s, endpoint="generate"
            )
            self._frontend.check_model(request.model)
            with in_trace(arrival.traceparent), about_request(caller.request_id):
                [generation] = self._frontend.generations([await self._ask(request)], caller)
                async with aclosing(generation.pieces()) as pieces:
                    async for piece in pieces:
                        await context.write(_piece_to_proto(piece, caller.request_id))
            await context.write(_usage_to_proto(generation.usage, caller.request_id))

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Call) -> inference_pb2.TokenizeResponse:
        """Token ids of a text or a conversation."""
        async with refusing(context):
            self._frontend.caller(_headers(context), None)
            self._frontend.check_model(request.model)
            text = self._frontend.text
            if request.WhichOneof("input") == "chat":
                token_ids = await text.encode_chat(_conversation(request.chat), "chat")
            else:
                token_ids = await text.encode(request.prompt, "prompt", not request.skip_special_tokens)
            return inference_pb2.TokenizeResponse(
                token_ids=token_ids, max_model_len=self._frontend.limits.max_model_len or 0
            )
        raise AssertionError("unreachable: a refusal raises")

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Call
    ) -> inference_pb2.ListModelsResponse:
        """The one model."""
        async with refusing(context):
            self._frontend.caller(_headers(context), None)
            model = inference_pb2.Model(
                name=self._frontend.model_name,
                max_model_len=self._frontend.limits.max_model_len or 0,
                created_unix_s=self._frontend.created_s,
            )
            return inference_pb2.ListModelsResponse(models=[model])
        raise AssertionError("unreachable: a refusal raises")

    async def _ask(self, request: inference_pb2.GenerateRequest) -> Ask:
        sampling = request.sampling
        has_limit = sampling.HasField("max_tokens")
        return Ask(
            token_ids=await self._token_ids(request),
            sampling=_sampling_from_proto(sampling),
            max_tokens=sampling.max_tokens if has_limit else None,
            prompt_param=request.WhichOneof("input") or "prompt",
            n=request.n or 1,
            stops=check_stops(sampling.stop),
            priority=request.priority,
            cache_salt=request.cache_salt,
        )

    async def _token_ids(self, request: inference_pb2.GenerateRequest) -> tuple[int, ...]:
        text = self._frontend.text
        match request.WhichOneof("input"):
            case "prompt":
                return await text.encode(request.prompt, "prompt")
            case "token_ids":
                return check_prompt_ids("token_ids", request.token_ids.ids, text.vocab_size)
            case "chat":
                return await text.encode_chat(_conversation(request.chat), "chat")
        raise invalid("input", "one of prompt, token_ids and chat is required")


def _sampling_from_proto(message: types_pb2.SamplingParams) -> SamplingParams:
    given = {name: getattr(message, name) for name in _PLAIN if message.HasField(name)}  # type: ignore[arg-type]
    if given.get("top_k") == -1:
        given["top_k"] = 0
    return SamplingParams(
        **{"seed": draw_seed(), **given},
        logit_bias=tuple(sorted(message.logit_bias.items())),
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def _conversation(chat: inference_pb2.ChatMessages) -> list[dict[str, str]]:
    if not chat.messages:
        raise invalid("chat.messages", "must not be empty")
    for place, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise invalid(f"chat.messages[{place}].role", f"must be one of {', '.join(sorted(ROLES))}")
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def _piece_to_proto(piece: Piece, request_id: str) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        request_id=request_id,
        choice=piece.choice,
        text=piece.text,
        tokens=[_token_to_proto(token) for token in piece.tokens],
        finish_reason=types_pb2.FinishReason.ValueType(piece.finish or 0),
    )


def _token_to_proto(token: TokenOut) -> types_pb2.Token:
    top = [types_pb2.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top]
    return types_pb2.Token(id=token.id, logprob=token.logprob, top=top)


def _usage_to_proto(usage: Usage, request_id: str) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        request_id=request_id,
        usage=types_pb2.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
        ),
    )


def _headers(context: Call) -> Mapping[str, str]:
    return {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}


@asynccontextmanager
async def refusing(context: Call) -> AsyncIterator[None]:
    """Turns a refusal or failure into the call's status, if the call is still there to take one.

    A client that cancels, or whose deadline passes, takes its call away under whatever is being sent, and gRPC then
    raises where it was sent.

    Raises:
        asyncio.CancelledError: the call is gone.
    """
    try:
        with _or_gone():
            yield
    except RequestError as error:
        retry = () if error.retry_after_s is None else (("retry-after", str(error.retry_after_s)),)
        with _or_gone():
            await context.abort(error.fault.grpc_status, error.message, retry)
    except Exception:  # noqa: BLE001 - the call's boundary: its details must not show a defect's insides
        _log.exception("a gRPC call failed")
        defect = internal_error()
        with _or_gone():
            await context.abort(defect.fault.grpc_status, defect.message)


@contextmanager
def _or_gone() -> Iterator[None]:
    try:
        yield
    except (grpc.aio.InternalError, grpc.aio.UsageError) as error:
        raise asyncio.CancelledError from error


def add_inference(server: grpc.aio.Server, frontend: Frontend) -> None:
    """Adds the service to a server."""
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(frontend), server)
