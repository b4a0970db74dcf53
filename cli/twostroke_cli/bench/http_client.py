"""HTTP/1.1 as a load generator needs it: posts over kept connections, bodies handed on the moment they arrive.

httptools parses. General clients take longer for an event of a stream than a server needs to make one.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import httptools

LENGTH_HEADERS = (b"content-length", b"transfer-encoding")
READ_BYTES = 1 << 18
CONNECT_TRIES = 5
"""Hundreds of connections at once may overrun a server's backlog."""


class BadAnswer(Exception):
    """What came is not HTTP."""


class Receiver(Protocol):
    """Takes an answer in."""

    def on_status(self, status: int) -> None:
        """The head has come."""
        ...

    def on_data(self, data: bytes) -> None:
        """A piece of the body has come."""
        ...


@dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_used: bool = False


class _Answer:
    """The callbacks of httptools for one answer."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.parser = httptools.HttpResponseParser(self)
        self.has_begun = self.has_head = False
        self.has_length = False
        """Whether the head says where the body ends; otherwise the connection's end says it."""
        self.is_complete = False
        self.is_kept = False
        """Whether the server leaves the connection open."""

    def on_header(self, name: bytes, value: bytes) -> None:
        self.has_length = self.has_length or name.lower() in LENGTH_HEADERS

    def on_headers_complete(self) -> None:
        self.has_head = True
        self._receiver.on_status(self.parser.get_status_code())

    def on_body(self, data: bytes) -> None:
        self._receiver.on_data(data)

    def on_message_complete(self) -> None:
        self.is_complete = True
        self.is_kept = bool(self.parser.should_keep_alive())  # afterwards the parser no longer knows


class HttpClient:
    """Posts to one server."""

    def __init__(self, base_url: str, headers: dict[str, str], timeout_s: float) -> None:
        where = urlsplit(base_url)
        self._host = where.hostname or ""
        self._tls = ssl.create_default_context() if where.scheme == "https" else None
        self._port = where.port or (443 if self._tls else 80)
        self._path = where.path.rstrip("/")
        lines = {"Host": where.netloc.rpartition("@")[2], "Content-Type": "application/json", **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []

    async def post(self, path: str, body: bytes, headers: str, receiver: Receiver) -> None:
        """Sends `body` and gives the answer to the receiver; `headers` are more lines, each with its line end.

        Raises:
            OSError: no connection, or it broke off.
            TimeoutError: nothing came for as long as may be.
            BadAnswer: something else than HTTP came.
        """
        request = f"POST {self._path}{path} HTTP/1.1\r\n{self._headers}{headers}Content-Length: {len(body)}\r\n\r\n"
        connection = await self._connection()
        answer = _Answer(receiver)
        try:
            await self._exchange(connection, request.encode() + body, answer)
        except ConnectionError:
            # A kept connection may be closed by the server in the moment it is used: that says nothing about it.
            if not connection.is_used or answer.has_begun:
                raise
            connection, answer = await self._connect(), _Answer(receiver)
            await self._exchange(connection, request.encode() + body, answer)
        if answer.is_kept:
            connection.is_used = True
            self._idle.append(connection)
        else:
            connection.writer.close()

    def close(self) -> None:
        """Ends the connections that wait."""
        for connection in self._idle:
            connection.writer.close()

    async def _exchange(self, connection: _Connection, request: bytes, answer: _Answer) -> None:
        try:
            connection.writer.write(request)
            while not answer.is_complete:
                async with asyncio.timeout(self._timeout_s):
                    data = await connection.reader.read(READ_BYTES)
                answer.has_begun = answer.has_begun or bool(data)
                self._feed(answer, data)
        except BaseException:
            connection.writer.close()
            raise

    def _feed(self, answer: _Answer, data: bytes) -> None:
        try:
            answer.parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise BadAnswer(str(error)) from None
        if not data and not answer.is_complete:
            if not answer.has_head or answer.has_length:
                raise ConnectionResetError("the server closed the connection")
            answer.is_complete = True

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.reader.at_eof() and not connection.writer.is_closing():
                return connection
            connection.writer.close()
        return await self._connect()

    async def _connect(self) -> _Connection:
        for number in range(1, CONNECT_TRIES + 1):
            try:
                async with asyncio.timeout(self._timeout_s):
                    return _Connection(*await asyncio.open_connection(self._host, self._port, ssl=self._tls))
            except ConnectionError:
                if number == CONNECT_TRIES:
                    raise
                await asyncio.sleep(0.02 * number)
        raise AssertionError("the last try returns or raises")
