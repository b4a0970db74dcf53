"""The router's end of one Connect stream: requests out, news in, reconnect and resume."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal, Protocol

import grpc
import grpc.aio
from twostroke_chassis.backoff import Backoff
from twostroke_chassis.loop_clock import news_s, unseen_s
from twostroke_chassis.membership import WorkerRecord
from twostroke_chassis.rpc import open_channel
from twostroke_chassis.settings import split_host_port
from twostroke_chassis.tracing import call_metadata
from twostroke_engine.request import Request
from twostroke_proto.v1 import worker_pb2, worker_pb2_grpc

from twostroke_router import wire
from twostroke_router.events import Destination, Event, Lost, WorkerLoad
from twostroke_router.outgoing import Encode, Outgoing

_log = logging.getLogger(__name__)

HELLO_S = 5.0
"""How long a worker may take to say hello."""
SILENCE_S = 10.0
"""A worker that says nothing for this long, heartbeats included, counts as disconnected."""
RESUME_S = 5.0
"""How long requests survive a broken stream."""
REFUSED_S = 1.0
"""How long the question may take whether anyone listens."""
UPDATES_UNTIL_REPORTED = 2
"""The first load after a submission may have been measured before it; the second was not."""

Sink = Callable[[Event], None]


class _Stream(Protocol):
    """What is used of a call of grpc.aio."""

    async def read(self) -> object:
        """The next message, or EOF."""

    async def write(self, message: worker_pb2.RouterMessage) -> None:
        """Sends; waits while the other side does not read."""

    def cancel(self) -> bool:
        """Ends the call."""


class _Broken(Exception):
    """The stream cannot go on; says why."""


@dataclass(slots=True)
class _Live:
    """A request this link has to do with."""

    sink: Sink
    num_tokens: int
    """Prompt tokens the worker has to compute."""
    num_blocks: int
    next_offsets: list[int]
    sent_at_update: int | None = None
    """How many updates had come when it was sent; None while it waits in the outgoing queue."""
    sent_s: float | None = None
    """When it was sent first."""


@dataclass(slots=True)
class OwnLoad:
    """What this router placed on a worker that the worker's load does not show yet."""

    requests: int = 0
    tokens: int = 0
    blocks: int = 0


@dataclass(slots=True)
class LinkEvents:
    """What a link tells its directory."""

    changed: Callable[[], None] = lambda: None
    """It can or cannot be placed on any more."""
    busier: Callable[[], None] = lambda: None
    """Its load has changed, or what was placed on it."""
    loaded: Callable[[worker_pb2.WorkerLoad], None] = field(default=lambda load: None)


class WorkerLink:
    """One worker as this router knows it. `run` keeps a stream to it until `close`."""

    def __init__(self, record: WorkerRecord, router_id: str, events: LinkEvents, resume_s: float = RESUME_S) -> None:
        self.record = record
        self.load = WorkerLoad()
        self.is_connected = False
        self.is_listed = True
        """Its record is in the membership."""
        self._router_id = router_id
        self._events = events
        self._resume_s = resume_s
        self._outgoing = Outgoing()
        self._live: dict[str, _Live] = {}
        self._unreported: dict[str, _Live] = {}
        self._num_updates = 0
        self._give_up: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def worker_id(self) -> str:
        """The worker's id in the membership."""
        return self.record.worker_id

    @property
    def state(self) -> Literal["ready", "connecting", "draining"]:
        """For people."""
        if not self.is_connected:
            return "connecting"
        return "draining" if self.load.draining else "ready"

    # ---- what the saga of a request asks for -------------------------------------------------------------------------

    def submit(
        self, request: Request, sink: Sink, left_s: Callable[[], float | None], destination: Destination | None = None
    ) -> None:
        """Runs a request here, or prefills it for a destination."""
        self._begin(request, sink, request.num_prompt_tokens)
        self._put(request.id, lambda: wire.submit_to_proto(request, destination, left_s()))

    def reserve(self, request: Request, sink: Sink, left_s: Callable[[], float | None], ttl_s: float) -> None:
        """Asks for KV capacity for a request that another worker prefills."""
        self._begin(request, sink, 0)
        self._put(request.id, lambda: wire.reserve_to_proto(request, ttl_s, left_s()))

    def cancel(self, request_id: str, reason: str) -> None:
        """Ends a request here; its end is still reported, unless it was never sent."""
        if request_id in self._live:
            if request_id in self._outgoing:
                self.forget(request_id)
            self._outgoing.cancel(request_id, reason)

    def forget(self, request_id: str) -> None:
        """Nothing more is wanted of a request."""
        self._live.pop(request_id, None)
        if self._unreported.pop(request_id, None):
            self._events.busier()

    def own_load(self) -> OwnLoad:
        """What was placed here but is not yet part of `load`."""
        own = OwnLoad()
        for live in self._unreported.values():
            own.requests += 1
            own.tokens += live.num_tokens
            own.blocks += live.num_blocks
        return own

    def _begin(self, request: Request, sink: Sink, num_tokens: int) -> None:
        num_blocks = -(-request.num_prompt_tokens // self.record.block_size)
        live = _Live(sink, num_tokens, num_blocks, [0] * request.n)
        self._live[request.id] = self._unreported[request.id] = live
        self._events.busier()

    def _put(self, request_id: str, encode: Encode) -> None:
        self._outgoing.put(request_id, encode)

    # ---- the stream --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to connect."""
        self._task = asyncio.create_task(self._run(), name=f"link-{self.worker_id}")

    async def close(self, reason: str) -> None:
        """Ends the stream and fails what is still live."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self.fail_all(reason)

    def fail_all(self, reason: str) -> None:
        """Tells every live request that this worker is lost to it."""
        live, self._live, self._unreported = self._live, {}, {}
        self._disarm()
        for request_id, each in live.items():
            self._outgoing.cancel(request_id, reason)
            each.sink(Lost(request_id, self.worker_id, reason))

    async def _run(self) -> None:
        backoff = Backoff(max_s=1.0)
        async with open_channel(self.record.endpoint) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            while True:
                try:
                    await self._converse(stub.Connect(metadata=call_metadata()), backoff)
                except (_Broken, grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
                    self._disconnected(_reason(error))
                except Exception as error:  # noqa: BLE001 - the task's boundary: a dead link must not look alive
                    _log.exception("the stream to worker %s failed", self.worker_id)
                    self._disconnected(_reason(error))
                if self._live and await _is_refused(self.record.endpoint):
                    self.fail_all(f"worker {self.worker_id} is gone")
                await backoff.sleep()

    async def _converse(self, stream: _Stream, backoff: Backoff) -> None:
        """One stream from hello to its end, which is always an exception."""
        writer: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(HELLO_S):
                await self._greet(stream)
            backoff.reset()
            writer = asyncio.create_task(self._write(stream), name=f"link-writer-{self.worker_id}")
            while True:
                async with asyncio.timeout(SILENCE_S):
                    message = await self._read(stream)
                self._take(message)
        finally:
            stream.cancel()
            if writer is not None:
                writer.cancel()
                await asyncio.wait([writer])

    async def _greet(self, stream: _Stream) -> None:
        self._outgoing.forget_cancels()
        resume = {key: live.next_offsets for key, live in self._live.items() if key not in self._outgoing}
        await stream.write(wire.hello_to_proto(self._router_id, resume))
        hello = (await self._read(stream)).hello
        if hello.version != wire.PROTOCOL_VERSION:
            raise _Broken(f"it speaks protocol version {hello.version}, not {wire.PROTOCOL_VERSION}")
        if (hello.worker_id, hello.epoch) != (self.worker_id, self.record.epoch):
            self.fail_all(f"worker {self.worker_id} was restarted")
            raise _Broken(f"{hello.worker_id} of epoch {hello.epoch} answers in its place")
        self.is_connected = True
        self._disarm()
        self._events.changed()
        _log.info("connected to %s worker %s at %s", self.record.role, self.worker_id, self.record.endpoint)

    async def _read(self, stream: _Stream) -> worker_pb2.WorkerMessage:
        message = await stream.read()
        if not isinstance(message, worker_pb2.WorkerMessage):
            raise _Broken("it ended the stream")
        return message

    async def _write(self, stream: _Stream) -> None:
        """Sends what is to be sent; it fails only when the stream has, and the reader says why."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                request_id, message = await self._outgoing.next()
                if live := self._live.get(request_id):
                    live.sent_at_update = self._num_updates
                    live.sent_s = live.sent_s or monotonic()
                await stream.write(message)

    def _take(self, message: worker_pb2.WorkerMessage) -> None:
        update, state = message.update, self.state
        self._num_updates += 1
        self.load = wire.load_from_proto(update.load)
        self._events.loaded(update.load)
        reading = wire.Reading(news_s(), unseen_s())
        for news in update.requests:
            self._deliver(news, reading)
        self._mark_reported()
        self._events.busier()
        if self.state != state:
            self._events.changed()

    def _deliver(self, news: worker_pb2.RequestUpdate, reading: wire.Reading) -> None:
        live = self._live.get(news.request_id)
        if live is None:
            return
        update = wire.update_from_proto(news, self.worker_id, live.sent_s, reading)
        self._unreported.pop(news.request_id, None)
        for delta in update.deltas:
            if delta.choice >= len(live.next_offsets):
                raise _Broken(f"it sent choice {delta.choice} of request {news.request_id}, which has fewer")
            live.next_offsets[delta.choice] = delta.offset + len(delta.tokens)
        if update.end is not None:
            self.forget(news.request_id)
        live.sink(update)

    def _mark_reported(self) -> None:
        for request_id, live in list(self._unreported.items()):
            sent = live.sent_at_update
            if sent is not None and self._num_updates >= sent + UPDATES_UNTIL_REPORTED:
                del self._unreported[request_id]

    def _disconnected(self, reason: str) -> None:
        if self.is_connected:
            _log.warning("lost %s worker %s: %s", self.record.role, self.worker_id, reason)
        else:
            _log.debug("no connection to %s worker %s: %s", self.record.role, self.worker_id, reason)
        self.is_connected = False
        if self._live and self._give_up is None:
            message = f"the connection to worker {self.worker_id} was lost"
            self._give_up = asyncio.get_running_loop().call_later(self._resume_s, self.fail_all, message)
        self._events.changed()

    def _disarm(self) -> None:
        if self._give_up is not None:
            self._give_up.cancel()
            self._give_up = None


async def _is_refused(endpoint: str) -> bool:
    """Whether nobody listens there any more: the process is dead, so there is nothing to resume."""
    host, port = split_host_port(endpoint)
    try:
        async with asyncio.timeout(REFUSED_S):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError):
        return False
    writer.close()
    return False


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or "it is silent"
