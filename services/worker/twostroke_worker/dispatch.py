"""Between routers and the engine: requests go down, news is kept in the ledger and wakes the streams.

Runs on the service's event loop; nothing here waits for a router.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from twostroke_chassis.loop_clock import news_s
from twostroke_engine.messages import (
    Cancel,
    EngineLoad,
    InboxMessage,
    RequestUpdate,
    Reserve,
    StepReport,
    Submit,
)
from twostroke_engine.request import ErrorCode, Request
from twostroke_proto.v1 import worker_pb2

from twostroke_worker.ledger import Ledger, ended
from twostroke_worker.spans import NoSpans, RequestSpans
from twostroke_worker.wire import (
    InvalidMessage,
    LeaseHome,
    RequestLimits,
    destination_from_proto,
    load_to_proto,
    receipt_to_proto,
    request_from_proto,
    update_to_proto,
)

log = logging.getLogger(__name__)

_Work = TypeVar("_Work", worker_pb2.Submit, worker_pb2.Reserve)

HEARTBEAT_S = 1.0
"""Longest silence of a stream."""
LOAD_DELAY_S = 0.02
"""A changed load alone waits this long for company."""
CANCEL_GRACE_S = 2.0
"""After a drain's grace time: what the engine gets to end cancelled requests."""
DRAIN_POLL_S = 0.02


class RouterStream:
    """The sending half of one Connect stream."""

    def __init__(self, router_id: str, number: int) -> None:
        self.router_id = router_id
        self.number = number
        self.is_closed = False
        self._wake = asyncio.Event()
        self._is_load_due = False

    def wake(self) -> None:
        """There is something to send."""
        self._wake.set()

    def wake_for_load(self) -> None:
        """Only the load changed."""
        if not self._is_load_due:
            self._is_load_due = True
            asyncio.get_running_loop().call_later(LOAD_DELAY_S, self._wake.set)

    def close(self) -> None:
        """Nothing more is to be sent."""
        self.is_closed = True
        self._wake.set()

    async def wait(self) -> None:
        """Returns when something is to be sent, a heartbeat at the latest."""
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                await self._wake.wait()
        except TimeoutError:
            pass  # the heartbeat
        self._wake.clear()
        self._is_load_due = False


class Dispatch:
    """One worker's requests and their routers."""

    def __init__(
        self,
        send: Callable[[InboxMessage], Awaitable[None]],
        limits: RequestLimits,
        home: LeaseHome,
        ledger: Ledger,
        spans: RequestSpans | NoSpans | None = None,
    ) -> None:
        self.is_draining = False
        self._send = send
        self._limits = limits
        self.home = home
        """Its endpoint is known once the server is bound, which is before any router is."""
        self._ledger = ledger
        self._spans = spans or NoSpans()
        self._streams: dict[str, RouterStream] = {}
        self._step = 0
        self._load = EngineLoad()
        self._clock = asyncio.get_running_loop().time

    # ---- streams -----------------------------------------------------------------------------------------------------

    async def open(self, hello: worker_pb2.RouterHello) -> RouterStream:
        """A router's new stream; an older one of the same router is closed."""
        resumes = {resume.request_id: tuple(resume.next_offsets) for resume in hello.resume}
        number, orphans = self._ledger.connect(hello.router_id, resumes)
        if older := self._streams.get(hello.router_id):
            older.close()
        stream = self._streams[hello.router_id] = RouterStream(hello.router_id, number)
        stream.wake()
        await self._cancel(orphans, "given up by its router")
        return stream

    def close(self, stream: RouterStream) -> None:
        """A stream ended; its requests go on for the time of grace."""
        stream.close()
        self._ledger.disconnect(stream.router_id, stream.number, self._clock())
        if self._streams.get(stream.router_id) is stream:
            del self._streams[stream.router_id]

    def compose(self, stream: RouterStream) -> worker_pb2.StepUpdate:
        """All news of the stream's router, and the load."""
        now_s = self._clock()
        receipts = [
            receipt_to_proto(request_id, now_s - received_s)
            for request_id, received_s in self._ledger.take_receipts(stream.router_id)
        ]
        updates = self._ledger.take(stream.router_id, now_s)
        if self._ledger.has_news(stream.router_id):
            stream.wake()  # more than fits one message
        return worker_pb2.StepUpdate(
            step=self._step,
            requests=[*receipts, *(self._to_proto(stream.router_id, update, now_s) for update in updates)],
            load=self.load,
        )

    def _to_proto(self, router_id: str, update: RequestUpdate, now_s: float) -> worker_pb2.RequestUpdate:
        message = update_to_proto(update, self.home, now_s)
        if update.reserved is not None:
            message.receipt.held_s = now_s - self._ledger.received_s(router_id, update.request_id)
        return message

    @property
    def load(self) -> worker_pb2.WorkerLoad:
        """How busy the worker is now."""
        return load_to_proto(self._load, self.is_draining)

    # ---- from the router ---------------------------------------------------------------------------------------------

    async def receive(self, router_id: str, message: worker_pb2.RouterMessage) -> None:
        """One message of a router. A bad one ends its request, never the stream."""
        match message.WhichOneof("kind"):
            case "submit":
                await self._admit(router_id, message.submit, self._submit)
            case "reserve":
                await self._admit(router_id, message.reserve, self._reserve)
            case "cancel":
                if self._ledger.owns(router_id, message.cancel.request_id):
                    await self._send(Cancel(request_id=message.cancel.request_id, reason=message.cancel.reason))
            case other:
                log.warning("router %s sent %s in the middle of a stream: ignored", router_id, other)

    async def _admit(
        self, router_id: str, message: _Work, make: Callable[[_Work, Request, float], Submit | Reserve]
    ) -> None:
        request_id, now_s = message.request.id, news_s()
        if self._ledger.knows(router_id, request_id):
            return  # said again after a reconnect
        try:
            inbox_message = make(message, self._checked(message), now_s)
        except InvalidMessage as error:
            self._refuse(router_id, request_id, ErrorCode.INVALID, str(error))
            return
        if self.is_draining:
            self._refuse(router_id, request_id, ErrorCode.DRAINING, "the worker is draining")
            return
        # A reservation's receipt comes with the grant.
        is_submission = isinstance(inbox_message, Submit)
        self._ledger.accept(router_id, request_id, now_s, has_receipt=is_submission)
        if is_submission and (stream := self._streams.get(router_id)):
            stream.wake()
        self._spans.begun(inbox_message, now_s)
        await self._send(inbox_message)

    def _checked(self, message: worker_pb2.Submit | worker_pb2.Reserve) -> Request:
        if self._ledger.is_live(message.request.id):
            raise InvalidMessage("request.id must be unique: it runs for another router")
        return request_from_proto(message.request, message.traceparent, self._limits)

    @staticmethod
    def _submit(message: worker_pb2.Submit, request: Request, now_s: float) -> Submit:
        has_destination = message.HasField("destination")
        destination = destination_from_proto(message.destination) if has_destination else None
        return Submit(request=request, destination=destination, received_s=now_s)

    @staticmethod
    def _reserve(message: worker_pb2.Reserve, request: Request, now_s: float) -> Reserve:
        if not message.ttl_ms:
            raise InvalidMessage("ttl_ms must be >= 1")
        return Reserve(request=request, ttl_s=message.ttl_ms / 1000)

    def _refuse(self, router_id: str, request_id: str, error: ErrorCode, why: str) -> None:
        self._ledger.refuse(router_id, request_id, ended(error, why))
        if stream := self._streams.get(router_id):
            stream.wake()

    # ---- from the engine ---------------------------------------------------------------------------------------------

    async def take_report(self, report: StepReport) -> None:
        """One step's news: into the ledger, and the streams that it concerns are woken."""
        self._step = report.step
        has_new_load = report.load != self._load
        self._load = report.load
        for update in report.requests:
            self._follow(update)
        broken = self._ledger.apply(report.requests)
        for stream in self._streams.values():
            if self._ledger.has_news(stream.router_id):
                stream.wake()
            elif has_new_load:
                stream.wake_for_load()
        if broken:
            log.error("requests with a gap in their tokens: %s", ", ".join(broken))
            await self._cancel(broken, "gap in its tokens")

    def _follow(self, update: RequestUpdate) -> None:
        """Tells the spans what concerns them; most updates are tokens, which do not."""
        if update.stages is not None:
            self._spans.stages(update.request_id, update.stages)
        if update.reserved is not None:
            self._spans.granted(update.request_id, self._clock())
        if update.end is not None:
            self._spans.ended(update.request_id, update.end, self._clock())

    async def expire(self) -> None:
        """Once in a while: forgets what was kept long enough, cancels for routers that stayed away."""
        await self._cancel(self._ledger.expire(self._clock()), "its router is gone")

    # ---- the end -----------------------------------------------------------------------------------------------------

    def start_draining(self) -> None:
        """No new work from here on; the routers are told at once."""
        self.is_draining = True
        for stream in self._streams.values():
            stream.wake()

    async def drain(self, grace_s: float) -> int:
        """Returns when every request has ended and connected routers know; after the grace time the rest is
        cancelled. Returns how many were."""
        self.start_draining()
        if await self._is_empty_within(grace_s):
            return 0
        rest = self._ledger.live
        await self._cancel(rest, "the worker is draining")
        await self._is_empty_within(CANCEL_GRACE_S)
        return len(rest)

    def end_streams(self) -> None:
        """Ends every stream after what it is sending."""
        for stream in self._streams.values():
            stream.close()

    async def _is_empty_within(self, seconds: float) -> bool:
        deadline = self._clock() + seconds
        while self._ledger.live or self._ledger.has_unsent:
            if self._clock() >= deadline:
                return False
            await asyncio.sleep(DRAIN_POLL_S)
        return True

    async def _cancel(self, request_ids: list[str], reason: str) -> None:
        for request_id in request_ids:
            await self._send(Cancel(request_id=request_id, reason=reason))
