"""`PolledSocket`: a pair's socket for short words of those who cannot sleep in it: something else must go on."""

from __future__ import annotations

import contextlib
import socket
import struct

from twostroke_engine.transfer.channel import ChannelError

MAX_FRAME_BYTES = 1 << 20
_LENGTH = struct.Struct("<I")


class PolledSocket:
    """Never blocks. One thread at a time."""

    def __init__(self, connection: socket.socket) -> None:
        """Owns the connection from now on."""
        connection.settimeout(0.0)
        self._connection = connection
        self._read = bytearray()

    def say(self, word: bytes) -> None:
        """Sends a few bytes.

        Raises:
            ChannelError: the peer has gone, or has not read for long.
        """
        try:
            sent = self._connection.send(word)
        except OSError as error:
            raise ChannelError(error.strerror or str(error)) from error
        if sent != len(word):
            raise ChannelError("the peer does not read")

    def look(self, most: int) -> bytes:
        """What has come, at most so many bytes; empty if nothing has.

        Raises:
            ChannelError: the peer has closed the pair, or died.
        """
        try:
            data = self._connection.recv(most)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise ChannelError(error.strerror or str(error)) from error
        if not data:
            raise ChannelError("the peer has closed the pair")
        return data

    def say_frame(self, content: bytes) -> None:
        """Sends a message of some length."""
        self.say(_LENGTH.pack(len(content)) + content)

    def look_frame(self) -> bytes | None:
        """The next message, None if it has not come whole.

        Raises:
            ChannelError: as for `look`, or it is too long to be one.
        """
        self._read += self.look(self._num_missing())
        if self._num_missing():
            return None
        content, self._read = bytes(self._read[_LENGTH.size :]), bytearray()
        return content

    def stop_saying(self) -> None:
        """The peer sees the end of what this side says; what the peer says still arrives."""
        with contextlib.suppress(OSError):  # the peer was faster
            self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Idempotent."""
        self._connection.close()

    def _num_missing(self) -> int:
        if len(self._read) < _LENGTH.size:
            return _LENGTH.size - len(self._read)
        (length,) = _LENGTH.unpack_from(self._read)
        if not 0 < length <= MAX_FRAME_BYTES:
            raise ChannelError(f"a message of {length} bytes")
        return _LENGTH.size + int(length) - len(self._read)
