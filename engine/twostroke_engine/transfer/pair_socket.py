"""`PairSocket`: a pair's connected stream socket. Operations have deadlines; closing wakes one that blocks.

Reads and writes are single system calls as far as the kernel allows (`MSG_WAITALL`, `sendmsg`): a transfer thread
shares the interpreter with the engine's, and each return from a call has to wait for its turn.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from twostroke_engine.transfer.channel import ChannelError

_TIMEVAL = struct.Struct("@ll")


class PairSocket:
    """One operation at a time, in `operation`; only `close` may come from another thread."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        """Owns the connection from now on; an operation may take `timeout_s`."""
        connection.settimeout(None)  # the kernel's own time-outs, set before each call, work with MSG_WAITALL
        self._connection = connection
        self._timeout_s = timeout_s
        self._due_s = 0.0
        self._set_s = {socket.SO_RCVTIMEO: float("inf"), socket.SO_SNDTIMEO: float("inf")}  # the kernel's defaults
        self._lock = Lock()
        self._is_closed = False
        self._is_busy = False

    @contextmanager
    def operation(self) -> Iterator[None]:
        """Begins an operation and its time; whatever goes wrong in it closes the socket.

        Raises:
            ChannelError: the pair is closed, the peer has gone, or the time was over.
        """
        with self._lock:
            if self._is_closed:
                raise ChannelError("the pair is closed")
            self._is_busy = True
        self._due_s = time.monotonic() + self._timeout_s
        try:
            yield
        except OSError as error:
            self.close()
            raise ChannelError(self._reason(error)) from error
        except BaseException:
            self.close()
            raise
        finally:
            self._leave()

    def close(self) -> None:
        """Any thread; idempotent. The peer and an operation under way notice at once."""
        with self._lock:
            self._is_closed = True
            with contextlib.suppress(OSError):  # the peer was faster
                self._connection.shutdown(socket.SHUT_RDWR)
            if not self._is_busy:  # otherwise its number could be another file's while the operation still uses it
                self._connection.close()

    def detach(self) -> socket.socket:
        """The connection itself, for one that goes on without operations; this object is of no use any more."""
        with self._lock:
            self._is_closed = True
            return socket.socket(fileno=self._connection.detach())

    # ---- inside an operation -------------------------------------------------------------------------------------

    def write(self, *parts: bytes | memoryview) -> None:
        """Sends all of it."""
        views = [memoryview(part) for part in parts]
        while views:
            self._set_timeout(socket.SO_SNDTIMEO)
            sent = self._connection.sendmsg(views)
            while views and sent >= views[0].nbytes:
                sent -= views.pop(0).nbytes
            if views:
                views[0] = views[0][sent:]

    def write_word(self, word: bytes) -> None:
        """Sends a few bytes, which the kernel takes at once or not at all."""
        self._set_timeout(socket.SO_SNDTIMEO)
        self._connection.send(word)

    def read_into(self, target: memoryview) -> None:
        """Fills the target."""
        while (count := self._read(target, socket.MSG_WAITALL)) < target.nbytes:
            target = target[count:]

    def read_some(self, target: memoryview) -> int:
        """Waits for at least one byte; how many came."""
        return self._read(target, 0)

    def read_file(self, target: memoryview) -> int:
        """Fills the target with a message that carries an open file; the file's descriptor."""
        self._set_timeout(socket.SO_RCVTIMEO)
        flags = socket.MSG_CMSG_CLOEXEC
        data, descriptors, _, _ = socket.recv_fds(self._connection, target.nbytes, 1, flags)
        if len(data) != target.nbytes or len(descriptors) != 1:
            for descriptor in descriptors:
                os.close(descriptor)
            raise ConnectionResetError("the peer has closed the pair" if not data else "the peer sent no file")
        target[:] = data
        return descriptors[0]

    def write_file(self, data: bytes, descriptor: int) -> None:
        """Sends a short message that carries an open file."""
        self._set_timeout(socket.SO_SNDTIMEO)
        socket.send_fds(self._connection, [data], [descriptor])

    def _read(self, target: memoryview, flags: int) -> int:
        self._set_timeout(socket.SO_RCVTIMEO)
        count = self._connection.recv_into(target, target.nbytes, flags)
        if not count:
            raise ConnectionResetError("the peer has closed the pair")
        return count

    def _set_timeout(self, which: int) -> None:
        left_s = self._due_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        # A call to the kernel for each call would be dear; being late by an eighth is not.
        if abs(self._set_s[which] - left_s) > self._timeout_s / 8:
            value = _TIMEVAL.pack(*divmod(max(1, round(left_s * 1e6)), 1_000_000))
            self._connection.setsockopt(socket.SOL_SOCKET, which, value)
            self._set_s[which] = left_s

    def _reason(self, error: OSError) -> str:
        if isinstance(error, BlockingIOError | TimeoutError):
            return f"Timed out after {self._timeout_s:g} s"
        return error.strerror or str(error)

    def _leave(self) -> None:
        with self._lock:
            self._is_busy = False
            if self._is_closed:
                self._connection.close()
