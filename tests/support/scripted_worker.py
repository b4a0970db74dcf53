"""A worker as far as a router can tell: a real gRPC server that speaks worker.proto and answers by a script.

It stands for a remote process at the level of the protocol: which tokens come, how fast, and what fails is the test's
to say. Prefill and decode workers of one `Stage` hand requests over as real ones do over transfer.proto.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import grpc.aio
from twostroke_chassis.membership import Membership, WorkerRecord, new_epoch
from twostroke_chassis.rpc import SERVER_OPTIONS
from twostroke_proto.v1 import types_pb2, worker_pb2, worker_pb2_grpc

LENGTH = types_pb2.FINISH_REASON_LENGTH
STOP = types_pb2.FINISH_REASON_STOP

Script = Callable[[worker_pb2.EngineRequest, int], list[int]]
"""The token ids of one choice of a request."""


@dataclass
class Running:
    """A request on a scripted worker."""

    request: worker_pb2.EngineRequest
    router_id: str
    tokens: list[list[int]]
    """By choice: every token the script gives."""
    first: int = 0
    """The first offset that this worker generates."""
    until: int = 1 << 30
    """It generates no offset from here on."""
    made: list[int] = field(default_factory=list)
    """By choice: tokens generated so far."""
    received_s: float = field(default_factory=time.monotonic)
    """When it came; with a destination, when the KV was all there."""
    end: worker_pb2.RequestEnd | None = None
    task: asyncio.Task[None] | None = None


class Stage:
    """What the workers of one test share."""

    def __init__(self) -> None:
        self.leases: dict[str, ScriptedWorker] = {}


class ScriptedWorker(worker_pb2_grpc.WorkerServicer):
    """One worker. Use it as a context manager: it serves, registers, and leaves."""

    def __init__(self, stage: Stage, role: str, worker_id: str, script: Script, **record: Any) -> None:
        self.stage, self.role, self.worker_id, self.script = stage, role, worker_id, script
        self.epoch = new_epoch()
        self.pace_s = 0.0
        self.gate = asyncio.Event()
        """Tokens beyond a choice's first come only while it is set."""
        self.gate.set()
        self.fail_next: list[int] = []
        """Error codes of the next submissions and reservations."""
        self.load = worker_pb2.WorkerLoad(blocks_total=100, blocks_free=100)
        self.facts = worker_pb2.RequestFacts(cached_tokens=16, kv_bytes=4096, kv_segments=2)
        self.received: list[worker_pb2.RouterMessage] = []
        self.hellos: list[worker_pb2.RouterHello] = []
        self.running: dict[str, Running] = {}
        self.metadata: list[dict[str, str]] = []
        self._record = record
        self._streams: dict[str, asyncio.Queue[worker_pb2.RequestUpdate | None]] = {}
        self._server: grpc.aio.Server | None = None
        self._membership: Membership | None = None

    # ---- life --------------------------------------------------------------------------------------------------------

    async def start(self, etcd_url: str, port: int = 0) -> Self:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        worker_pb2_grpc.add_WorkerServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()
        self._membership = Membership(etcd_url, "default")
        await self._membership.register(self.record)
        return self

    @property
    def record(self) -> WorkerRecord:
        given = {
            "worker_id": self.worker_id,
            "role": self.role,
            "endpoint": f"127.0.0.1:{self.port}",
            "epoch": self.epoch,
            "model_name": "tiny",
            "model_fingerprint": "m",
            "kv_fingerprint": "k",
            "block_size": 16,
            "max_model_len": 256,
            "channels": ("tcp",),
        }
        return WorkerRecord(**{**given, **self._record})

    async def kill(self) -> None:
        """The server ends at once, streams and all; the record stays until its lease ends."""
        if self._server is not None:
            for running in self.running.values():
                if running.task is not None:
                    running.task.cancel()
            await self._server.stop(0)
            self._server = None

    async def leave(self) -> None:
        await self.kill()
        if self._membership is not None:
            await self._membership.close()

    def break_streams(self) -> None:
        """Every router's stream ends; requests go on."""
        for queue in self._streams.values():
            queue.put_nowait(None)

    # ---- what the test looks at --------------------------------------------------------------------------------------

    def of_kind(self, kind: str) -> list[Any]:
        return [getattr(message, kind) for message in self.received if message.WhichOneof("kind") == kind]

    @property
    def live(self) -> list[str]:
        return [request_id for request_id, running in self.running.items() if running.end is None]

    # ---- the protocol ------------------------------------------------------------------------------------------------

    async def Connect(
        self, request_iterator: AsyncIterator[worker_pb2.RouterMessage], context: Any
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        messages = aiter(request_iterator)
        hello = (await anext(messages)).hello
        self.hellos.append(hello)
        self.metadata.append(dict(context.invocation_metadata()))
        queue: asyncio.Queue[worker_pb2.RequestUpdate | None] = asyncio.Queue()
        self._streams[hello.router_id] = queue
        self._resume(hello, queue)
        reader = asyncio.create_task(self._read(hello.router_id, messages))
        try:
            yield worker_pb2.WorkerMessage(
                hello=worker_pb2.WorkerHello(worker_id=self.worker_id, epoch=self.epoch, version=1)
            )
            yield worker_pb2.WorkerMessage(update=worker_pb2.StepUpdate(load=self.load))
            while True:
                update = await self._next(queue)
                if update is None:
                    return
                yield worker_pb2.WorkerMessage(update=worker_pb2.StepUpdate(requests=update, load=self.load))
        finally:
            reader.cancel()
            if self._streams.get(hello.router_id) is queue:
                del self._streams[hello.router_id]

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:
        self.load.draining = True
        return worker_pb2.DrainResponse()

    @staticmethod
    async def _next(queue: asyncio.Queue[Any]) -> list[worker_pb2.RequestUpdate] | None:
        try:
            async with asyncio.timeout(0.5):
                update = await queue.get()
        except TimeoutError:
            return []  # a heartbeat
        return None if update is None else [update]

    def _resume(self, hello: worker_pb2.RouterHello, queue: asyncio.Queue[Any]) -> None:
        for resume in hello.resume:
            running = self.running.get(resume.request_id)
            if running is None:
                end = worker_pb2.RequestEnd(error=worker_pb2.ERROR_CODE_INTERNAL, message="unknown request")
                queue.put_nowait(worker_pb2.RequestUpdate(request_id=resume.request_id, end=end))
                continue
            for choice, wanted in enumerate(resume.next_offsets):
                start = max(wanted, running.first)
                if start < running.made[choice]:
                    queue.put_nowait(self._update(running, choice, start, running.made[choice]))
            if running.end is not None:
                queue.put_nowait(worker_pb2.RequestUpdate(request_id=resume.request_id, end=running.end))

    async def _read(self, router_id: str, messages: AsyncIterator[worker_pb2.RouterMessage]) -> None:
        with contextlib.suppress(grpc.RpcError):
            async for message in messages:
                self.received.append(message)
                self._receive(router_id, message)

    def _receive(self, router_id: str, message: worker_pb2.RouterMessage) -> None:
        match message.WhichOneof("kind"):
            case "submit":
                running = self._begin(router_id, message.submit.request)
                if not self._failed(running):
                    receipt = worker_pb2.Receipt(held_s=time.monotonic() - running.received_s)
                    self._send(running, worker_pb2.RequestUpdate(request_id=running.request.id, receipt=receipt))
                    has_destination = message.submit.HasField("destination")
                    lease_id = message.submit.destination.lease_id if has_destination else ""
                    running.until = 1 if has_destination else 1 << 30
                    running.task = asyncio.create_task(self._run(running, lease_id))
            case "reserve":
                running = self._begin(router_id, message.reserve.request)
                running.first, running.made = 1, [1] * message.reserve.request.n
                if not self._failed(running):
                    self._grant(running)
            case "cancel":
                running_or_none = self.running.get(message.cancel.request_id)
                if running_or_none is not None and running_or_none.end is None:
                    if running_or_none.task is not None:
                        running_or_none.task.cancel()
                    self._end(running_or_none, worker_pb2.ERROR_CODE_CANCELLED)

    def _begin(self, router_id: str, request: worker_pb2.EngineRequest) -> Running:
        limit = request.sampling.max_tokens
        tokens = [self.script(request, choice)[:limit] for choice in range(request.n)]
        running = Running(request, router_id, tokens, made=[0] * request.n)
        self.running[request.id] = running
        return running

    def _failed(self, running: Running) -> bool:
        if not self.fail_next:
            return False
        self._end(running, self.fail_next.pop(0))
        return True

    def _grant(self, running: Running) -> None:
        lease_id = f"lease-{running.request.id}"
        self.stage.leases[lease_id] = self
        destination = types_pb2.KVDestination(
            worker_id=self.worker_id,
            endpoint="127.0.0.1:1",
            lease_id=lease_id,
            epoch=1,
            kv_fingerprint="k",
            ttl_ms=1000,
        )
        self._send(running, worker_pb2.RequestUpdate(request_id=running.request.id, reserved=destination))

    async def _run(self, running: Running, lease_id: str = "") -> None:
        """Generates choice by choice in step, as an engine's batch does."""
        for offset in range(running.first, min(running.until, max(map(len, running.tokens)))):
            await asyncio.sleep(self.pace_s)
            if offset:
                await self.gate.wait()
            for choice, tokens in enumerate(running.tokens):
                if offset < len(tokens):
                    running.made[choice] = offset + 1
                    self._send(running, self._update(running, choice, offset, offset + 1))
        if lease_id:
            self.stage.leases[lease_id].adopt(running.request.id)
        self._end(running, 0)

    def adopt(self, request_id: str) -> None:
        """Prefill has handed the request over."""
        running = self.running[request_id]
        if running.end is None:
            running.received_s = time.monotonic()
            running.task = asyncio.create_task(self._run(running))

    def _update(self, running: Running, choice: int, start: int, stop: int) -> worker_pb2.RequestUpdate:
        tokens = running.tokens[choice]
        is_last = stop == len(tokens)
        finish = (STOP if tokens[-1] == 2 else LENGTH) if is_last else types_pb2.FINISH_REASON_UNSPECIFIED
        k = running.request.sampling.logprobs
        top = [types_pb2.TopLogprob(token_id=50 + place, logprob=-1.0 - place) for place in range(k)]
        delta = worker_pb2.ChoiceDelta(
            choice=choice,
            offset=start,
            tokens=[types_pb2.Token(id=token, logprob=-0.5, top=top) for token in tokens[start:stop]],
            finish=finish,
        )
        stages = None
        if start == running.first:
            stages = worker_pb2.StageTimes(compute_s=time.monotonic() - running.received_s)
        return worker_pb2.RequestUpdate(request_id=running.request.id, deltas=[delta], stages=stages)

    def _end(self, running: Running, error: int) -> None:
        message = f"scripted error {error}" if error else ""
        running.end = worker_pb2.RequestEnd(
            error=worker_pb2.ErrorCode.ValueType(error), message=message, facts=self.facts
        )
        self._send(running, worker_pb2.RequestUpdate(request_id=running.request.id, end=running.end))

    def _send(self, running: Running, update: worker_pb2.RequestUpdate) -> None:
        if queue := self._streams.get(running.router_id):
            queue.put_nowait(update)
