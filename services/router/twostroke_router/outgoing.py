"""What is still to be sent to a worker: cancels first, then work in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from twostroke_proto.v1 import worker_pb2

from twostroke_router.wire import cancel_to_proto

Encode = Callable[[], worker_pb2.RouterMessage]
"""Makes the message when it is sent, so that the time left in it is true then."""


class Outgoing:
    """A queue with two lanes. It outlives a stream: what was not sent goes out on the next one."""

    def __init__(self) -> None:
        self._cancels: dict[str, str] = {}
        self._work: dict[str, Encode] = {}
        self._news = asyncio.Event()

    def put(self, request_id: str, encode: Encode) -> None:
        """Adds a Submit or Reserve."""
        self._work[request_id] = encode
        self._news.set()

    def cancel(self, request_id: str, reason: str) -> None:
        """Takes back what was not sent, or adds a Cancel ahead of all work."""
        if self._work.pop(request_id, None) is None:
            self._cancels[request_id] = reason
            self._news.set()

    def forget_cancels(self) -> None:
        """A new stream begins: its hello names what is wanted, so the worker ends the rest by itself."""
        self._cancels.clear()

    def __contains__(self, request_id: str) -> bool:
        """Whether work for this request is waiting to be sent."""
        return request_id in self._work

    def __len__(self) -> int:
        return len(self._cancels) + len(self._work)

    async def next(self) -> tuple[str, worker_pb2.RouterMessage]:
        """The next message and its request's id; waits for one."""
        while not len(self):
            self._news.clear()
            await self._news.wait()
        if self._cancels:
            request_id = next(iter(self._cancels))
            return request_id, cancel_to_proto(request_id, self._cancels.pop(request_id))
        request_id = next(iter(self._work))
        return request_id, self._work.pop(request_id)()
