"""The engine's process as its service sees it: frames over a socket pair, and the life of a child.

The engine exits by itself when the socket closes, so it outlives its service by no more than a moment, whatever ended
the service.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from typing import Self

import msgspec
from twostroke_chassis.lifecycle import FatalError, StartError
from twostroke_engine.config import EngineConfig
from twostroke_engine.framing import LENGTH, frame
from twostroke_engine.messages import EngineFailed, EngineReady, InboxMessage, OutboxMessage

EXIT_GRACE_S = 2.0
"""From the closed socket to SIGKILL."""

_decoder: msgspec.msgpack.Decoder[OutboxMessage] = msgspec.msgpack.Decoder(OutboxMessage)


class EngineDied(FatalError):
    """The engine's process is gone, or has given up."""


class EngineClient:
    """A running engine process. Made by `start`; iterate over it for the engine's reports."""

    ready: EngineReady

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls, config: EngineConfig) -> Self:
        """Spawns an engine and returns when its model is loaded; `StartError` if it cannot be."""
        ours, theirs = socket.socketpair()
        with theirs:
            # The connection comes first: from the spawn on, nothing may be awaited without a hand on the process.
            reader, writer = await asyncio.open_connection(sock=ours)
            process = await _spawn(theirs.fileno())
        client = cls(process, reader, writer)
        try:
            client.ready = await client._introduce(config)
        except BaseException:  # cancellation included: no engine may be left behind
            await client.close()
            raise
        return client

    @property
    def pid(self) -> int:
        """The engine's process id."""
        return self._process.pid

    async def send(self, message: InboxMessage | EngineConfig) -> None:
        """Writes one message; waits only while the engine's process does not read. Nothing happens if it is gone:
        whoever iterates is told."""
        self._writer.write(frame(message))
        try:
            await self._writer.drain()
        except ConnectionError:
            return

    async def __aiter__(self) -> AsyncIterator[OutboxMessage]:
        """The engine's messages, until it is gone: then `EngineDied`."""
        while True:
            message = await self._receive()
            if message is None:
                raise EngineDied(await self._obituary())
            if isinstance(message, EngineFailed):
                raise EngineDied(f"the engine failed: {message.message}")
            yield message

    async def close(self) -> None:
        """Closes the socket, which makes the engine exit, and sees to it that it does."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), EXIT_GRACE_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def _introduce(self, config: EngineConfig) -> EngineReady:
        await self.send(config)
        match await self._receive():
            case EngineReady() as ready:
                return ready
            case EngineFailed(message=message):
                raise StartError(message)
            case None:
                raise StartError(await self._obituary())
            case other:
                raise StartError(f"the engine's first message is {type(other).__name__}")

    async def _receive(self) -> OutboxMessage | None:
        """The next message, or None at the end of the stream."""
        try:
            (size,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            return _decoder.decode(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def _obituary(self) -> str:
        try:
            code = await asyncio.wait_for(self._process.wait(), EXIT_GRACE_S)
        except TimeoutError:
            return "the engine process closed its socket"
        how = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        return f"the engine process {how}"


async def _spawn(fd: int) -> asyncio.subprocess.Process:
    # Its own session: Ctrl-C in a terminal is for the service, which drains, and not for the engine.
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "twostroke_engine.process", "--fd", str(fd)),
        pass_fds=(fd,),
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
