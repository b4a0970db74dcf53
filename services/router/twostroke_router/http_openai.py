"""The OpenAI endpoints: a body becomes asks, asks become sagas, their pieces become an object or a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from twostroke_router.choice import Piece
from twostroke_router.errors import invalid
from twostroke_router.explanation import Usage
from twostroke_router.frontend import Frontend, merged
from twostroke_router.generation import Generation
from twostroke_router.http_wire import EventStream, JsonResponse, cancelled_on_disconnect, read_body
from twostroke_router.intake import Ask, Caller, seed_of
from twostroke_router.openai_render import ChatRendering, CompletionRendering, Rendering, WholeChoice
from twostroke_router.openai_schema import ChatRequest, CompletionRequest, decode_body, sampling_of
from twostroke_router.sampling_check import check_prompt_ids

EXPLAIN = "x-twostroke-explain"
MAX_PROMPTS = 256
"""Prompts in one call of /v1/completions."""


class OpenAI:
    """/v1/chat/completions and /v1/completions."""

    def __init__(self, frontend: Frontend, max_body_bytes: int) -> None:
        self._frontend = frontend
        self._max_body_bytes = max_body_bytes

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        caller = self._caller(request, "chat")
        body = decode_body(await read_body(request, self._max_body_bytes), ChatRequest)
        body.check()
        self._frontend.check_model(body.model)
        token_ids = await self._frontend.text.encode_chat(
            body.conversation(), add_generation_prompt=body.add_generation_prompt is not False
        )
        return await self._answer(request, caller, body, [ask_of(body, token_ids, "messages")], ChatRendering)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        caller = self._caller(request, "completions")
        body = decode_body(await read_body(request, self._max_body_bytes), CompletionRequest)
        body.check()
        self._frontend.check_model(body.model)
        prompts = body.prompts()
        if len(prompts) > MAX_PROMPTS:
            raise invalid("prompt", f"at most {MAX_PROMPTS} prompts in one call")
        asks = [ask_of(body, await self._prompt_ids(prompt), "prompt") for prompt in prompts]
        return await self._answer(request, caller, body, asks, CompletionRendering)

    def _caller(self, request: Request, endpoint: str) -> Caller:
        wants_facts = request.headers.get(EXPLAIN, "") not in ("", "0")
        return self._frontend.caller(
            request.headers,
            request.state.request_id,
            request.state.arrival,
            endpoint=endpoint,
            wants_facts=wants_facts,
        )

    async def _prompt_ids(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return await self._frontend.text.encode(prompt, "prompt")
        return check_prompt_ids("prompt", prompt, self._frontend.text.vocab_size)

    async def _answer(
        self,
        request: Request,
        caller: Caller,
        body: ChatRequest | CompletionRequest,
        asks: Sequence[Ask],
        rendering: type[Rendering],
    ) -> Response:
        frontend = self._frontend
        generations = frontend.generations(asks, replace(caller, wants_whole=not body.stream))
        answer = _Answer(
            generations,
            rendering(
                frontend.text,
                caller.request_id,
                frontend.model_name,
                int(time.time()),
                body.wanted_logprobs() is not None,
            ),
            body.choices(),
            caller.wants_facts,
        )
        async with cancelled_on_disconnect(request.receive):
            if not body.stream:
                return JsonResponse(await answer.whole())
            return EventStream(await answer.stream(body.wants_usage_chunk))


class _Answer:
    """The answer to one call, of one saga per prompt."""

    def __init__(self, generations: list[Generation], rendering: Rendering, n: int, explains: bool) -> None:
        self._generations = generations
        self._rendering = rendering
        self._n = n
        self._explains = explains

    async def whole(self) -> dict[str, Any]:
        """Everything at once."""
        choices = [WholeChoice() for _ in range(self._n * len(self._generations))]
        async with aclosing(merged(self._generations)) as pieces:
            async for place, piece in pieces:
                choices[place * self._n + piece.choice].add(piece)
        return self._explained(self._rendering.whole(choices, self._usages))

    async def stream(self, has_usage: bool) -> AsyncGenerator[object, None]:
        """The events of a stream; returns once there is a first piece, so that a refusal still has a status."""
        pieces = merged(self._generations)
        try:
            first = await anext(pieces)
        except BaseException:
            await pieces.aclose()
            raise
        return self._events(first, pieces, has_usage)

    async def _events(
        self, first: tuple[int, Piece], pieces: AsyncGenerator[tuple[int, Piece], None], has_usage: bool
    ) -> AsyncGenerator[object, None]:
        async with aclosing(pieces):
            # Where it runs is settled with the first piece; what was measured comes at the end.
            yield self._explained(self._chunk(*first, has_usage))
            async for place, piece in pieces:
                yield self._chunk(place, piece, has_usage)
        if has_usage or self._explains:
            yield self._explained(self._rendering.usage_chunk(self._usages))

    def _chunk(self, place: int, piece: Piece, has_usage: bool) -> dict[str, Any]:
        chunk = self._rendering.chunk(place * self._n + piece.choice, piece)
        return {**chunk, "usage": None} if has_usage else chunk

    def _explained(self, body: dict[str, Any]) -> dict[str, Any]:
        return {**body, "twostroke": self._generations[0].explain()} if self._explains else body

    @property
    def _usages(self) -> list[Usage]:
        return [generation.usage for generation in self._generations]


def ask_of(body: ChatRequest | CompletionRequest, token_ids: tuple[int, ...], prompt_param: str) -> Ask:
    """One prompt of a body, with everything that the body asks for."""
    tokens_param, max_tokens = body.wanted_tokens()
    return Ask(
        token_ids=token_ids,
        sampling=sampling_of(body, body.wanted_logprobs(), max_tokens or 1, seed_of(body.seed)),
        max_tokens=max_tokens,
        prompt_param=prompt_param,
        tokens_param=tokens_param,
        n=body.choices(),
        stops=body.stops(),
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
    )
