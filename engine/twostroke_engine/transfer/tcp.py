"""`tcp://HOST:PORT/TOKEN`: one connection for each pair, and each message a frame: its length, then its bytes.

Bytes go from the segment's memory to the kernel's and from there to the receiver's scratch, and nowhere else.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

from torch import Tensor

from twostroke_engine.transfer.channel import ChannelError, KVChannel
from twostroke_engine.transfer.pair_socket import PairSocket
from twostroke_engine.transfer.rendezvous import Rendezvous, greeting

_LENGTH = struct.Struct("<Q")
_WELCOME = b"\x01"


class TcpChannel:
    """One side of a pair."""

    def __init__(self, pair: PairSocket) -> None:
        self._pair = pair
        self._length = memoryview(bytearray(_LENGTH.size))
        self.close = pair.close

    def send(self, payload: Tensor) -> None:
        """One frame, one system call if the kernel takes it all."""
        view = bytes_of(payload)
        with self._pair.operation():
            self._pair.write(_LENGTH.pack(view.nbytes), view)

    def receive(self, payload: Tensor) -> None:
        """Reads a frame of exactly this size; after any other nothing that follows could be trusted."""
        view = bytes_of(payload)
        with self._pair.operation():
            self._pair.read_into(self._length)
            (length,) = _LENGTH.unpack(self._length)
            if length != view.nbytes:
                raise ChannelError(f"a frame of {view.nbytes} bytes was announced, one of {length} came")
            self._pair.read_into(view)


class TcpListener:
    """The receiver's port."""

    def __init__(self, host: str, timeout_s: float) -> None:
        listening, self._address = listen_at(host)
        self._rendezvous = Rendezvous(listening, timeout_s)
        self.close = self._rendezvous.close

    def endpoint(self, pair_id: str) -> str:
        """Port and token of the pair."""
        return f"tcp://{self._address}/{self._rendezvous.token(pair_id)}"

    def accept(self, pair_id: str) -> KVChannel:
        """Meets the sender, and lets it go on."""
        pair = self._rendezvous.accept(pair_id)
        with pair.operation():
            pair.write(_WELCOME)
        return TcpChannel(pair)


class TcpScheme:
    """Any two hosts that reach each other."""

    name = "tcp"
    ability = "tcp"

    def __init__(self, host: str, timeout_s: float) -> None:
        self._host = host
        self._timeout_s = timeout_s

    def listen(self) -> TcpListener:
        """Listens at a free port."""
        return TcpListener(self._host, self._timeout_s)

    def connect(self, endpoint: str, pair_id: str) -> KVChannel:
        """Connects, and waits until the receiver has accepted the pair."""
        address, _, token = endpoint.removeprefix("tcp://").partition("/")
        pair = PairSocket(connect_to(address, self._timeout_s), self._timeout_s)
        with pair.operation():
            pair.write(greeting(pair_id, token))
            pair.read_into(memoryview(bytearray(len(_WELCOME))))
        return TcpChannel(pair)


def bytes_of(payload: Tensor) -> memoryview:
    """A host tensor's own memory."""
    view: Any = payload.numpy()  # a buffer, which numpy's stubs deny before Python 3.12
    return memoryview(view)


def _tune(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that died while the pair was idle


def listen_at(host: str) -> tuple[socket.socket, str]:
    """A socket at a free port of this address, and HOST:PORT of it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, 0), family=family, backlog=128)
    _tune(listening)  # what it accepts inherits
    shown = f"[{host}]" if ":" in host else host
    return listening, f"{shown}:{listening.getsockname()[1]}"


def connect_to(address: str, timeout_s: float) -> socket.socket:
    """A connection to HOST:PORT.

    Raises:
        ChannelError: it is no address, or no one is there.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ChannelError(f"not a tcp endpoint: {address!r}")
    host = host.removeprefix("[").removesuffix("]")
    try:
        connection = socket.create_connection((host, int(port)), timeout=timeout_s)
    except OSError as error:
        raise ChannelError(f"no pair at {address}: {error.strerror or error}") from error
    _tune(connection)
    return connection
