"""A small OpenAI server whose answers are scripted by the number at the end of `X-Request-Id`."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Script = Callable[["Reply"], Awaitable[None]]


@dataclass
class Reply:
    """One request, and the means to answer it."""

    number: int
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter

    async def whole(self, status: int, content: object) -> None:
        data = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} Status\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self.writer.write(head.encode() + data)
        await self.writer.drain()

    async def begin(self) -> None:
        self.writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await self.writer.drain()

    async def send(self, text: str) -> None:
        self.writer.write(f"{len(text.encode()):x}\r\n{text}\r\n".encode())
        await self.writer.drain()

    async def event(self, content: object) -> None:
        await self.send(f"data: {json.dumps(content)}\n\n")

    async def piece(self, text: str) -> None:
        await self.event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})

    async def end(self, prompt_tokens: int, completion_tokens: int) -> None:
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        await self.event({"choices": [], "usage": usage})
        await self.send("data: [DONE]\n\n")
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    async def answer(self, pieces: int = 3, gap_s: float = 0.01) -> None:
        await self.begin()
        for number in range(pieces):
            await asyncio.sleep(gap_s if number else 0)
            await self.piece(f" word{number}")
        await self.end(7, pieces)


@dataclass
class OpenAIServer:
    """The server's address, and what it was asked."""

    port: int = 0
    asked: list[Reply] = field(default_factory=list)
    connections: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@contextmanager
def openai_server(script: Script) -> Iterator[OpenAIServer]:
    """Serves on a free port of loopback, in a thread, for as long as the body runs."""
    server, ready = OpenAIServer(), threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with await asyncio.start_server(connected, "127.0.0.1", 0) as listener:
            server.port = listener.sockets[0].getsockname()[1]
            ready.set()
            await stop.wait()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        try:
            while not writer.is_closing():
                reply = await _read(reader, writer)
                if reply.path.endswith("/models"):
                    await reply.whole(200, {"data": [{"id": "scripted"}]})
                    continue
                server.asked.append(reply)
                await script(reply)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Reply:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    number = headers.get("x-request-id", "").rpartition("-")[2]
    content = json.loads(body) if body else {}
    return Reply(int(number) if number.isdigit() else -1, head[0].split()[1], headers, content, writer)
