"""What the HTTP and gRPC surfaces share: the model they offer and the way from a checked ask to a running request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from twostroke_chassis.security import ApiKeys

from twostroke_router.arrival import Arrival
from twostroke_router.choice import Piece
from twostroke_router.errors import Fault, RequestError
from twostroke_router.generation import Cluster, Generation
from twostroke_router.intake import Ask, Caller, Limits, clean_request_id, take_in
from twostroke_router.request_log import RequestLog
from twostroke_router.text import Text


@dataclass(frozen=True)
class Frontend:
    """One model behind one router."""

    router_id: str
    model_name: str
    cluster: Cluster
    keys: ApiKeys
    log: RequestLog
    created_s: int = field(default_factory=lambda: int(time.time()))

    @property
    def text(self) -> Text:
        """The model's tokenizer and template."""
        return self.cluster.text

    @property
    def limits(self) -> Limits:
        """What a request may ask for now: the workers' limit, or the model's own while none is known."""
        of_workers = self.cluster.directory.max_model_len
        return Limits(self.text.vocab_size, of_workers or self.text.max_model_len)

    def visible_to(self, tenant: str) -> str | None:
        """Whose requests a tenant may see: its own, or everyone's (None) where the door is open."""
        return tenant if self.keys.is_required else None

    def check_model(self, name: str | None) -> None:
        """Refuses a model that is not served; None and the empty name mean the only one.

        Raises:
            RequestError: it is not served.
        """
        if name and name != self.model_name:
            raise RequestError(Fault.NO_MODEL, f"model: {name!r} does not exist; {self.model_name!r} does", "model")

    def caller(
        self, headers: Mapping[str, str], request_id: str | None, arrival: Arrival | None = None, **more: Any
    ) -> Caller:
        """Who asks, from a call's headers or metadata; without an arrival it arrives now.

        Raises:
            RequestError: keys are configured and this is none of them.
        """
        tenant = self.keys.caller(headers.get("authorization"))
        if tenant is None:
            raise RequestError(Fault.UNAUTHENTICATED, "a valid API key is required: Authorization: Bearer KEY")
        arrival = arrival or Arrival.of(headers)
        return Caller(request_id=clean_request_id(request_id), tenant=tenant, arrival=arrival, **more)

    def generations(self, asks: Sequence[Ask], caller: Caller) -> list[Generation]:
        """Checks every prompt of a call, then makes their sagas; nothing runs yet.

        Raises:
            RequestError: names the field of the first that is wrong.
        """
        limits = self.limits
        # Each prompt of a call is a request of its own, and is found by an id of its own.
        callers = [caller, *(replace(caller, request_id=f"{caller.request_id}-{n + 2}") for n in range(len(asks) - 1))]
        jobs = [take_in(ask, each, limits) for ask, each in zip(asks, callers, strict=True)]
        return [Generation(job, self.cluster) for job in jobs]


@dataclass(frozen=True)
class _Over:
    """A saga of several has ended, with this error or well."""

    error: BaseException | None = None


async def merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of several sagas as they come, each with its saga's number; the first error ends all."""
    if len(generations) == 1:
        async with aclosing(generations[0].pieces()) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | _Over]] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(place, each, queue)) for place, each in enumerate(generations)]
    try:
        num_left = len(pumps)
        while num_left:
            place, item = await queue.get()
            if isinstance(item, Piece):
                yield place, item
            elif item.error is not None:
                raise item.error
            else:
                num_left -= 1
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(place: int, generation: Generation, queue: asyncio.Queue[tuple[int, Piece | _Over]]) -> None:
    try:
        async with aclosing(generation.pieces()) as pieces:
            async for piece in pieces:
                queue.put_nowait((place, piece))
        queue.put_nowait((place, _Over()))
    except Exception as error:  # noqa: BLE001 (a task's boundary: the merging side raises it)
        queue.put_nowait((place, _Over(error)))
