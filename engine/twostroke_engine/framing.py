"""Frames between a service and its engine process: 4 bytes of little-endian length, then msgpack. Torch-free."""

from __future__ import annotations

import socket
import struct

import msgspec

LENGTH = struct.Struct("<I")

_encoder = msgspec.msgpack.Encoder()


def frame(message: object) -> bytes:
    """A message as it goes over the socket."""
    payload = _encoder.encode(message)
    return LENGTH.pack(len(payload)) + payload


def read_frame(connection: socket.socket) -> bytes | None:
    """The next frame's payload; None at the end of the stream, also if that comes within a frame."""
    header = _read(connection, LENGTH.size)
    return None if header is None else _read(connection, LENGTH.unpack(header)[0])


def _read(connection: socket.socket, num_bytes: int) -> bytes | None:
    data = bytearray()
    while len(data) < num_bytes:
        piece = connection.recv(num_bytes - len(data))
        if not piece:
            return None
        data += piece
    return bytes(data)
