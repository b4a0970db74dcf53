"""The `Worker` service: one Connect stream per router, and Drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
from twostroke_chassis.tracing import received_traceparent
from twostroke_proto.v1 import worker_pb2, worker_pb2_grpc

from twostroke_worker.dispatch import Dispatch, RouterStream

log = logging.getLogger(__name__)

PROTOCOL_VERSION = 1


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Serves routers from a `Dispatch`."""

    def __init__(self, worker_id: str, epoch: int, dispatch: Dispatch) -> None:
        self._hello = worker_pb2.WorkerHello(worker_id=worker_id, epoch=epoch, version=PROTOCOL_VERSION)
        self._dispatch = dispatch

    async def Connect(
        self, request_iterator: AsyncIterator[worker_pb2.RouterMessage], context: Any
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        """Carries one router's requests, tokens and the load until either side ends it.

        A yield waits while the router does not read; meanwhile news gathers in the ledger.
        """
        hello = await self._first(request_iterator, context)
        trace = received_traceparent(context.invocation_metadata())
        log.info("router %s connected, resumes %d requests, trace %s", hello.router_id, len(hello.resume), trace)
        stream = await self._dispatch.open(hello)
        reader = asyncio.create_task(self._read(stream, request_iterator))
        try:
            yield worker_pb2.WorkerMessage(hello=self._hello)
            while not stream.is_closed:
                await stream.wait()
                if not stream.is_closed:
                    yield worker_pb2.WorkerMessage(update=self._dispatch.compose(stream))
        finally:
            reader.cancel()
            self._dispatch.close(stream)
            log.info("router %s disconnected", hello.router_id)

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:
        """Takes no new work and returns when what runs has ended."""
        return worker_pb2.DrainResponse(cancelled=await self._dispatch.drain(request.grace_ms / 1000))

    async def _first(
        self, request_iterator: AsyncIterator[worker_pb2.RouterMessage], context: Any
    ) -> worker_pb2.RouterHello:
        message = await anext(aiter(request_iterator), worker_pb2.RouterMessage())
        hello = message.hello
        if message.WhichOneof("kind") != "hello" or not hello.router_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello with a router_id")
        if hello.version != PROTOCOL_VERSION:
            why = f"protocol version {hello.version} is not {PROTOCOL_VERSION}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)
        return hello

    async def _read(self, stream: RouterStream, messages: AsyncIterator[worker_pb2.RouterMessage]) -> None:
        """Hands the router's messages on; closes the stream at their end."""
        try:
            async for message in messages:
                if stream.is_closed:
                    return  # superseded: what the router still wants it says on its newer stream
                await self._dispatch.receive(stream.router_id, message)
        finally:
            stream.close()
