"""`Rendezvous`: where the senders of `tcp` and `shm` pairs meet a receiver, and strangers meet nothing.

A sender proves in its first bytes that it was told the pair's endpoint: they are a MAC of the pair's id under a key
that the listener drew at its start. One thread reads them from all connections at once, so one that says nothing, or
nonsense, is closed after a while or at once and holds up no other. A proven one waits for its `accept` for a while.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import secrets
import selectors
import socket
import struct
import time
from dataclasses import dataclass, field
from threading import Condition, Thread

from twostroke_engine.transfer.channel import ChannelError
from twostroke_engine.transfer.pair_socket import PairSocket

log = logging.getLogger(__name__)

MAX_STRANGERS = 64
"""Connections that have not proven themselves; one more closes the oldest."""
MAX_PAIR_ID_BYTES = 1024
_MAGIC = b"2stroke\x01"
_TOKEN_BYTES = 32
_HELLO = struct.Struct(f"<{len(_MAGIC)}s{_TOKEN_BYTES}sH")
_HELLO_S = 5.0
_IDLE_S = 1.0


@dataclass(slots=True, eq=False)
class _Stranger:
    """A connection of which nothing is known yet."""

    connection: socket.socket
    due_s: float
    said: bytearray = field(default_factory=bytearray)

    @property
    def num_missing(self) -> int:
        """Bytes to read next: never more than the greeting has."""
        if len(self.said) < _HELLO.size:
            return _HELLO.size - len(self.said)
        return _HELLO.size + self.id_bytes - len(self.said)

    @property
    def id_bytes(self) -> int:
        """Length of the pair's id, as the stranger has it."""
        return int(_HELLO.unpack_from(self.said)[2])

    def is_plausible(self) -> bool:
        """Whether what came so far can become a greeting."""
        if not self.said.startswith(_MAGIC[: len(self.said)]):
            return False
        return len(self.said) < _HELLO.size or self.id_bytes <= MAX_PAIR_ID_BYTES


def listen_by_name(prefix: str) -> tuple[str, socket.socket]:
    """A listening socket that processes of this host find by its name, which no file stands for; the name."""
    name = f"{prefix}-{secrets.token_hex(8)}"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(f"\0{name}")
    listening.listen(128)
    return name, listening


class Rendezvous:
    """The listening socket of one scheme, and its thread."""

    def __init__(self, listening: socket.socket, timeout_s: float) -> None:
        """Owns the socket, which listens already; `timeout_s` bounds `accept`, and the wait for one."""
        self._listening = listening
        self._timeout_s = timeout_s
        self._key = secrets.token_bytes(_TOKEN_BYTES)
        self._strangers: list[_Stranger] = []
        self._arrived: dict[str, tuple[socket.socket, float]] = {}
        self._changed = Condition()
        self._is_closed = False
        self._selector = selectors.DefaultSelector()
        listening.setblocking(False)
        self._selector.register(listening, selectors.EVENT_READ)
        self._thread = Thread(target=self._run, name="kv-rendezvous", daemon=True)
        self._thread.start()

    def token(self, pair_id: str) -> str:
        """What the sender of this pair must know, in hexadecimal."""
        return self._mac(pair_id.encode()).hex()

    def accept(self, pair_id: str) -> PairSocket:
        """Waits for the sender of this pair.

        Raises:
            ChannelError: it did not come in time, or the listener was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or pair_id in self._arrived, self._timeout_s)
            if pair_id not in self._arrived:
                reason = "the listener is closed" if self._is_closed else "the sender did not come in time"
                raise ChannelError(f"no pair: {reason}")
            connection, _ = self._arrived.pop(pair_id)
        return PairSocket(connection, self._timeout_s)

    def close(self) -> None:
        """Ends the thread and everything that was not accepted; idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_closed:
            for key, _ in self._selector.select(self._wait_s()):
                if key.data is None:
                    self._admit()
                elif key.data in self._strangers:  # not closed by an admission of this round
                    self._hear(key.data)
            self._expire()
        self._selector.close()
        self._listening.close()
        for stranger in self._strangers:
            stranger.connection.close()
        with self._changed:
            for connection, _ in self._arrived.values():
                connection.close()
            self._arrived.clear()

    def _admit(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError as error:
            if not self._is_closed and not isinstance(error, BlockingIOError | ConnectionAbortedError):
                log.warning("cannot accept a connection: %s", error)
                time.sleep(0.1)  # out of file descriptors: the next round would find the same
            return
        if len(self._strangers) >= MAX_STRANGERS:
            self._dismiss(self._strangers[0], "there are too many of its kind")
        connection.setblocking(False)
        stranger = _Stranger(connection, time.monotonic() + min(_HELLO_S, self._timeout_s))
        self._strangers.append(stranger)
        self._selector.register(connection, selectors.EVENT_READ, stranger)

    def _hear(self, stranger: _Stranger) -> None:
        try:
            data = stranger.connection.recv(stranger.num_missing)
        except BlockingIOError:
            return
        except OSError as error:
            self._dismiss(stranger, str(error))
            return
        stranger.said += data
        if not data or not stranger.is_plausible():
            self._dismiss(stranger, "it has not greeted as a sender does")
        elif not stranger.num_missing:
            self._judge(stranger)

    def _judge(self, stranger: _Stranger) -> None:
        _, token, _ = _HELLO.unpack_from(stranger.said)
        pair_id = bytes(stranger.said[_HELLO.size :])
        if not hmac.compare_digest(token, self._mac(pair_id)):
            self._dismiss(stranger, "it was not told of the pair that it asks for")
            return
        self._forget(stranger)
        with self._changed:
            before = self._arrived.pop(pair_id.decode(), None)
            self._arrived[pair_id.decode()] = (stranger.connection, time.monotonic() + self._timeout_s)
            self._changed.notify_all()
        if before is not None:
            before[0].close()

    def _dismiss(self, stranger: _Stranger, reason: str) -> None:
        log.warning("a connection to the KV channel's port was closed: %s", reason)
        self._forget(stranger)
        stranger.connection.close()

    def _forget(self, stranger: _Stranger) -> None:
        self._strangers.remove(stranger)
        self._selector.unregister(stranger.connection)

    def _expire(self) -> None:
        now_s = time.monotonic()
        for stranger in [stranger for stranger in self._strangers if stranger.due_s <= now_s]:
            self._dismiss(stranger, "it said too little for too long")
        with self._changed:
            overdue = [pair_id for pair_id, (_, due_s) in self._arrived.items() if due_s <= now_s]
            for pair_id in overdue:
                self._arrived.pop(pair_id)[0].close()

    def _wait_s(self) -> float:
        first_due_s = min((stranger.due_s for stranger in self._strangers), default=float("inf"))
        return max(0.0, min(_IDLE_S, first_due_s - time.monotonic()))

    def _mac(self, pair_id: bytes) -> bytes:
        return hmac.digest(self._key, pair_id, hashlib.sha256)


def greeting(pair_id: str, token: str) -> bytes:
    """A sender's first bytes.

    Raises:
        ChannelError: no token of a rendezvous.
    """
    encoded = pair_id.encode()
    try:
        mac = bytes.fromhex(token)
    except ValueError:
        mac = b""
    if len(mac) != _TOKEN_BYTES or len(encoded) > MAX_PAIR_ID_BYTES:
        raise ChannelError("the endpoint has no token, or the pair's id is too long")
    return _HELLO.pack(_MAGIC, mac, len(encoded)) + encoded
