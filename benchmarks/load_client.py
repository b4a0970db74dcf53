"""A client of any OpenAI server: streams of /v1/completions with token-id prompts, timed event by event.

HTTP is spoken over plain asyncio streams: a client library takes longer for an event than a server needs to make one.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 600.0
CONNECT_TRIES = 5


@dataclass(frozen=True, slots=True)
class Stream:
    """One request's life; times are of this machine's monotonic clock, the same in all processes."""

    sent_s: float
    events_s: tuple[float, ...]
    """When each event with text came."""
    num_tokens: int
    """As the server counts them."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server and the model to ask it for."""

    host: str
    port: int
    model: str


def run_streams(target: Target, prompts: Sequence[Sequence[int]], max_tokens: int, processes: int) -> list[Stream]:
    """All prompts at once, shared out to `processes` clients.

    Raises:
        RuntimeError: a request failed, or a stream ended early.
    """
    bodies = [_body(target.model, prompt, max_tokens) for prompt in prompts]
    shares = [share for number in range(processes) if (share := bodies[number::processes])]
    # Forked after torch was imported a client would hold its threads' locks; a fresh interpreter takes a moment, so
    # all begin together at a time that lies ahead.
    with ProcessPoolExecutor(len(shares), mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_wake, range(len(shares))))
        begin_s = time.monotonic() + 0.5
        streams = [
            stream
            for found in pool.map(_client, [target] * len(shares), shares, [begin_s] * len(shares))
            for stream in found
        ]
    short = [stream.num_tokens for stream in streams if stream.num_tokens != max_tokens]
    if short:
        raise RuntimeError(f"{len(short)} streams had {short[0]} tokens, not {max_tokens}")
    return streams


def _wake(number: int) -> int:
    """Makes a process of the pool."""
    time.sleep(0.2)
    return number


def _client(target: Target, bodies: Sequence[bytes], begin_s: float) -> list[Stream]:
    return asyncio.run(_streams(target, bodies, begin_s))


async def _streams(target: Target, bodies: Sequence[bytes], begin_s: float) -> list[Stream]:
    await asyncio.sleep(max(0.0, begin_s - time.monotonic()))
    async with asyncio.timeout(TIMEOUT_S):
        return list(await asyncio.gather(*(_stream(target, body) for body in bodies)))


def _body(model: str, prompt: Sequence[int], max_tokens: int) -> bytes:
    return json.dumps(
        {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


async def _stream(target: Target, body: bytes) -> Stream:
    sent_s = time.monotonic()
    reader, writer = await _connect(target)
    try:
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nHost: {target.host}:{target.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise RuntimeError(f"{head.splitlines()[0].decode()}: {(await reader.read(500)).decode(errors='replace')}")
        return await _events(reader, sent_s)
    finally:
        writer.close()


async def _connect(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Hundreds of connections at once may overrun a server's backlog: then the client tries again."""
    for number in range(CONNECT_TRIES):
        try:
            return await asyncio.open_connection(target.host, target.port)
        except ConnectionError:
            await asyncio.sleep(0.02 * (number + 1))
    return await asyncio.open_connection(target.host, target.port)


async def _events(reader: asyncio.StreamReader, sent_s: float) -> Stream:
    times: list[float] = []
    num_tokens = 0
    async for event in _data(reader):
        now_s = time.monotonic()
        if event == b"[DONE]":
            return Stream(sent_s, tuple(times), num_tokens)
        # Cheap tests first: parsing JSON for each of 131,072 events is most of a client's work.
        if b'"usage":{' in event or b'"usage": {' in event:
            num_tokens = _completion_tokens(json.loads(event))
        if b'"text":""' not in event and b'"text": ""' not in event and b'"text"' in event:
            times.append(now_s)
        elif b'"error"' in event:
            raise RuntimeError(event.decode(errors="replace"))
    raise RuntimeError("a stream ended without [DONE]")


def _completion_tokens(event: dict[str, Any]) -> int:
    return int((event.get("usage") or {}).get("completion_tokens", 0))


async def _data(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The `data:` fields of a chunked event stream."""
    pending = b""
    while size := int(await reader.readline(), 16):
        pending += await reader.readexactly(size)
        await reader.readexactly(2)
        *whole, pending = pending.split(b"\n\n")
        for event in whole:
            if event.startswith(b"data:"):
                yield event[5:].strip()
