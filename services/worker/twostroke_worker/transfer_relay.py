"""Carries transfer control messages between engines: the prefill side opens streams, the decode side serves them.

An engine never waits for a peer: a peer that does not read is lost once its bounded queue is full.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import grpc
import grpc.aio
from twostroke_chassis.loop_clock import news_s
from twostroke_chassis.rpc import open_channel
from twostroke_chassis.tracing import call_metadata
from twostroke_engine.messages import InboxMessage, PeerLost, PeerMessage
from twostroke_engine.transfer.messages import PairHello, ReceiverMessage, SenderMessage
from twostroke_proto.v1 import transfer_pb2, transfer_pb2_grpc

from twostroke_worker.transfer_wire import (
    receiver_from_proto,
    receiver_to_proto,
    sender_from_proto,
    sender_to_proto,
)
from twostroke_worker.wire import InvalidMessage

log = logging.getLogger(__name__)

MAX_QUEUED = 8192
"""Control messages that wait for one peer. A prompt of 8k tokens in 128 layers makes some 2,000."""
CONNECT_TIMEOUT_S = 5.0

Deliver = Callable[[InboxMessage], Awaitable[None]]
Message = Any  # SenderMessage on the prefill side, ReceiverMessage on the decode side
_BROKEN = (grpc.aio.AioRpcError, grpc.aio.BaseError)


class TransferRelay(Protocol):
    """One side's relay."""

    def attach(self, server: grpc.aio.Server) -> None:
        """Adds what this side serves."""
        ...

    def send(self, message: PeerMessage) -> None:
        """Passes on a message of the engine; never waits."""
        ...

    async def close(self) -> None:
        """Ends every stream."""
        ...


class _Link:
    """One stream to or from a peer: a bounded queue out, delivery in, and one end."""

    def __init__(self, peer: str, deliver: Deliver) -> None:
        self._peer = peer
        self._deliver = deliver
        self._queue: asyncio.Queue[Any] = asyncio.Queue(MAX_QUEUED)
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def put(self, message: Message) -> None:
        """Queues a message; a full queue loses the peer."""
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self.lose("it does not read")

    def lose(self, reason: str) -> None:
        """Ends the link; the first reason counts."""
        if not self._lost.done():
            self._lost.set_result(reason)

    async def run(
        self,
        write: Callable[[Message], Awaitable[None]],
        incoming: AsyncIterator[Any],
        from_proto: Callable[[Any], SenderMessage | ReceiverMessage],
    ) -> str:
        """Carries messages both ways until the link is lost; returns why."""
        tasks = (
            asyncio.create_task(self._write(write)),
            asyncio.create_task(self._read(incoming, from_proto)),
        )
        try:
            return await self._lost
        finally:
            for task in tasks:
                task.cancel()

    async def _write(self, write: Callable[[Message], Awaitable[None]]) -> None:
        try:
            while True:
                await write(await self._queue.get())
        except (*_BROKEN, asyncio.InvalidStateError) as error:
            self.lose(_describe(error))

    async def _read(
        self, incoming: AsyncIterator[Any], from_proto: Callable[[Any], SenderMessage | ReceiverMessage]
    ) -> None:
        try:
            async for envelope in incoming:
                message = from_proto(envelope)
                await self._deliver(PeerMessage(peer=self._peer, message=message, received_s=news_s()))
            self.lose("its stream ended")
        except (*_BROKEN, InvalidMessage) as error:
            self.lose(_describe(error))


def _describe(error: BaseException) -> str:
    details = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
    return " ".join((details or type(error).__name__).split())


class SenderRelay:
    """Prefill's side: opens one stream per decode worker, on its engine's hello."""

    def __init__(self, deliver: Deliver, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self._deliver = deliver
        self._connect_timeout_s = connect_timeout_s
        self._links: dict[str, _Link] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, server: grpc.aio.Server) -> None:
        """Serves nothing."""

    def send(self, message: PeerMessage) -> None:
        """Passes on a message; a hello opens the stream if there is none."""
        link = self._links.get(message.peer)
        if link is None:
            if not isinstance(message.message, PairHello):
                return  # of a pair that was lost meanwhile: the engine is being told
            link = self._links[message.peer] = _Link(message.peer, self._deliver)
            task = asyncio.create_task(self._run(message.peer, link))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        link.put(message.message)

    async def close(self) -> None:
        """Ends every stream."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, endpoint: str, link: _Link) -> None:
        reason = "the service stops"
        try:
            async with open_channel(endpoint) as channel:
                reason = await self._exchange(channel, link)
        finally:
            del self._links[endpoint]
            log.info("transfer stream to %s ended: %s", endpoint, reason)
            await self._deliver(PeerLost(peer=endpoint, reason=reason))

    async def _exchange(self, channel: grpc.aio.Channel, link: _Link) -> str:
        call: Any = transfer_pb2_grpc.TransferStub(channel).Exchange(metadata=call_metadata())
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await call.wait_for_connection()
        except TimeoutError:
            return f"no connection within {self._connect_timeout_s:g} s"
        except _BROKEN as error:
            return _describe(error)
        return await link.run(lambda message: call.write(sender_to_proto(message)), call, receiver_from_proto)


class ReceiverRelay(transfer_pb2_grpc.TransferServicer):
    """Decode's side: serves one stream per prefill worker and gives each a name of its own."""

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._links: dict[str, _Link] = {}
        self._numbers = itertools.count(1)

    def attach(self, server: grpc.aio.Server) -> None:
        """Adds the Transfer service."""
        transfer_pb2_grpc.add_TransferServicer_to_server(self, server)

    def send(self, message: PeerMessage) -> None:
        """Passes on a message; one for a stream that ended meanwhile is dropped: the engine is being told."""
        if link := self._links.get(message.peer):
            link.put(message.message)

    async def close(self) -> None:
        """Ends every stream."""
        for link in self._links.values():
            link.lose("the service stops")

    async def Exchange(  # type: ignore[override]
        self, request_iterator: AsyncIterator[transfer_pb2.SenderMessage], context: Any
    ) -> None:
        """Carries one prefill worker's control messages until either side ends the stream."""
        peer = f"{context.peer()}#{next(self._numbers)}"
        link = self._links[peer] = _Link(peer, self._deliver)
        reason = "its stream was cancelled"
        try:
            await context.send_initial_metadata(())  # tells the sender that it is connected
            reason = await link.run(
                lambda message: context.write(receiver_to_proto(message)), request_iterator, sender_from_proto
            )
        finally:
            del self._links[peer]
            log.info("transfer stream from %s ended: %s", peer, reason)
            await self._deliver(PeerLost(peer=peer, reason=reason))
