"""A worker service as its own process, and a router's end of its Connect stream."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import grpc.aio
import psutil
from twostroke_chassis.rpc import open_channel
from twostroke_chassis.tracing import call_metadata
from twostroke_proto.v1 import types_pb2, worker_pb2, worker_pb2_grpc


class WorkerProcess:
    """`python -m twostroke_ROLE`; what it writes goes to a file."""

    def __init__(self, role: str, folder: Path, *flags: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.role = role
        self._log = folder / "log"
        self._ready_file = folder / "ready.json"
        command = [sys.executable, "-m", f"twostroke_{role}", "--ready-file", str(self._ready_file), *flags]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def endpoint(self, seconds: float = 60) -> str:
        """Its gRPC endpoint, once it is ready."""
        deadline = time.monotonic() + seconds
        while not self._ready_file.exists():
            assert self.process.poll() is None, f"exited with {self.process.returncode}:\n{self.log()}"
            assert time.monotonic() < deadline, f"not ready within {seconds} s:\n{self.log()}"
            time.sleep(0.02)
        return str(json.loads(self._ready_file.read_text())["endpoints"]["grpc"])

    def engine(self) -> psutil.Process:
        """Its engine's process."""
        (engine,) = psutil.Process(self.process.pid).children()
        return engine

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self, seconds: float = 10) -> int:
        return self.process.wait(seconds)


class RouterClient:
    """A router as a worker sees it: keeps what it received, and resumes from there."""

    def __init__(self, endpoint: str, router_id: str) -> None:
        self.router_id = router_id
        self.worker_hello = worker_pb2.WorkerHello()
        self.load = worker_pb2.WorkerLoad()
        self.num_updates = 0
        self.tokens: dict[str, dict[int, list[int]]] = {}
        self.finish: dict[str, dict[int, int]] = {}
        self.reserved: dict[str, types_pb2.KVDestination] = {}
        self.ends: dict[str, worker_pb2.RequestEnd] = {}
        self._endpoint = endpoint
        self._news = asyncio.Event()
        self._one_write = asyncio.Lock()
        self._call: Any = None
        self._channel: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drop()

    async def connect(self, *, is_reading: bool = True, resume: Iterable[str] | None = None) -> None:
        """Opens a stream that resumes what is live, or the requests given."""
        self._channel = open_channel(self._endpoint)
        self._call = worker_pb2_grpc.WorkerStub(self._channel).Connect(metadata=call_metadata())
        wanted = [name for name in self.tokens if name not in self.ends] if resume is None else resume
        resumes = [worker_pb2.Resume(request_id=name, next_offsets=self._next_offsets(name)) for name in wanted]
        hello = worker_pb2.RouterHello(router_id=self.router_id, version=1, resume=resumes)
        await self.send(hello=hello)
        self.worker_hello = (await self._call.read()).hello
        if is_reading:
            self.start_reading()

    def start_reading(self) -> None:
        self._reader = asyncio.create_task(self._read())

    async def drop(self) -> None:
        """Breaks the stream without a word."""
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
            self._reader = None
        self._call.cancel()
        await self._channel.close()

    async def send(self, **kind: Any) -> None:
        async with self._one_write:  # gRPC allows no second write beside the first
            await self._call.write(worker_pb2.RouterMessage(**kind))

    async def submit(
        self, request_id: str, token_ids: Iterable[int], to: types_pb2.KVDestination | None = None, **fields: Any
    ) -> None:
        """Runs a request, or prefills it for a destination; `n` and `cache_salt` are the request's, the rest is
        sampling."""
        self.tokens.setdefault(request_id, {})
        request = self.request(request_id, token_ids, **fields)
        await self.send(submit=worker_pb2.Submit(request=request, destination=to))

    async def reserve(self, request_id: str, token_ids: Iterable[int], ttl_ms: int = 20_000, **fields: Any) -> None:
        self.tokens.setdefault(request_id, {})
        request = self.request(request_id, token_ids, **fields)
        await self.send(reserve=worker_pb2.Reserve(request=request, ttl_ms=ttl_ms))

    async def cancel(self, request_id: str) -> None:
        await self.send(cancel=worker_pb2.Cancel(request_id=request_id, reason="test"))

    @staticmethod
    def request(request_id: str, token_ids: Iterable[int], **fields: Any) -> worker_pb2.EngineRequest:
        own: dict[str, Any] = {"n": 1} | {name: fields.pop(name) for name in ("n", "cache_salt") if name in fields}
        sampling = {"temperature": 0.0, "seed": 7, "max_tokens": 16, "ignore_eos": True} | fields
        return worker_pb2.EngineRequest(
            id=request_id, token_ids=token_ids, sampling=types_pb2.SamplingParams(**sampling), **own
        )

    async def until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        """Waits until what was received fulfils a condition."""
        async with asyncio.timeout(seconds):
            while not condition():
                self._news.clear()
                if self._reader is not None and self._reader.done():
                    self._reader.result()  # raises what broke the stream
                    raise AssertionError("the worker ended the stream")
                await self._news.wait()

    async def ended(self, request_id: str, seconds: float = 20) -> worker_pb2.RequestEnd:
        await self.until(lambda: request_id in self.ends, seconds)
        return self.ends[request_id]

    def num_tokens(self, request_id: str, choice: int = 0) -> int:
        return len(self.tokens[request_id].get(choice, ()))

    def is_idle(self) -> bool:
        """Nothing runs, and every block is free or cached."""
        load = self.load
        is_empty = not (load.running or load.waiting or load.leases_open or load.blocks_promised or load.blocks_leased)
        return is_empty and load.blocks_total > 0 and load.blocks_free + load.blocks_cached == load.blocks_total

    def _next_offsets(self, request_id: str) -> list[int]:
        choices = self.tokens.get(request_id, {})
        return [len(choices.get(index, ())) for index in range(max(choices, default=-1) + 1)]

    async def _read(self) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                self.load = message.update.load
                self.num_updates += 1
                for update in message.update.requests:
                    self._take(update)
                self._news.set()
        finally:
            self._news.set()

    def _take(self, update: worker_pb2.RequestUpdate) -> None:
        name = update.request_id
        assert name not in self.ends, f"{name}: something follows the end"
        for delta in update.deltas:
            tokens = self.tokens[name].setdefault(delta.choice, [])
            self._check_offset(name, delta, len(tokens))
            tokens += [token.id for token in delta.tokens]
            if delta.finish:
                self.finish.setdefault(name, {})[delta.choice] = delta.finish
        if update.HasField("reserved"):
            self.reserved[name] = update.reserved
        if update.HasField("end"):
            self.ends[name] = update.end

    def _check_offset(self, name: str, delta: worker_pb2.ChoiceDelta, next_offset: int) -> None:
        """Decode's tokens follow the one from prefill, which a reservation's holder gets elsewhere."""
        expected = next_offset + 1 if name in self.reserved else next_offset
        assert delta.offset == expected, f"{name}[{delta.choice}]: offset {delta.offset}, expected {expected}"
