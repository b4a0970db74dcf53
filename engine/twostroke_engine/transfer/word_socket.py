"""`WordSocket`: a pair's socket for messages in both directions, read by a thread of its own."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from threading import Lock

from twostroke_engine.transfer.channel import ChannelError

MAX_WORD_BYTES = 1 << 20
_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 16


class WordSocket:
    """Any thread may say, one may hear."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        """Owns the connection from now on; a peer that does not read for `timeout_s` has broken the pair."""
        connection.settimeout(timeout_s)
        self._connection = connection
        self._lock = Lock()
        self._read = bytearray()

    def say(self, word: bytes) -> None:
        """Sends a message.

        Raises:
            ChannelError: the peer has gone, or does not read.
        """
        try:
            with self._lock:
                self._connection.sendall(_LENGTH.pack(len(word)) + word)
        except OSError as error:
            raise ChannelError(f"the peer cannot be told: {error.strerror or error}") from error

    def hear(self, timeout_s: float | None = None) -> bytes | None:
        """Waits for the next message; None if the peer has closed its side, or there is no end to the message.

        Raises:
            ChannelError: none came in time.
        """
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        while (word := self._take()) is None:
            if not poll.poll(None if timeout_s is None else round(timeout_s * 1e3)):
                raise ChannelError(f"Timed out after {timeout_s:g} s")
            try:
                data = self._connection.recv(_READ_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                return None
            if not data:
                return None
            self._read += data
        return word

    def stop_saying(self) -> None:
        """The peer sees the end of what this side says; what the peer says still arrives."""
        self._shutdown(socket.SHUT_WR)

    def stop_hearing(self) -> None:
        """Wakes who hears, for good."""
        self._shutdown(socket.SHUT_RD)

    def close(self) -> None:
        """Idempotent."""
        self._connection.close()

    def _shutdown(self, how: int) -> None:
        with contextlib.suppress(OSError):  # the peer was faster
            self._connection.shutdown(how)

    def _take(self) -> bytes | None:
        if len(self._read) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._read)
        if length > MAX_WORD_BYTES:
            raise ChannelError(f"a message of {length} bytes")
        end = _LENGTH.size + int(length)
        if len(self._read) < end:
            return None
        word = bytes(self._read[_LENGTH.size : end])
        del self._read[:end]
        return word
