"""`shm://NAME/TOKEN`: two processes of one host copy through a ring of shared memory and tell each other over a socket.

The ring is a file without a name (`memfd_create`) that the receiver makes and passes over the socket, an abstract Unix
one: neither is ever in a file system, so whoever is killed whenever, nothing stays behind, and the size of /dev/shm,
which container runtimes keep small, does not matter. The file is sealed: a peer that could shorten it could kill us.

A slot belongs to the sender until it has said what is in it, and to the receiver until that has copied it out. These
words travel over the socket, whose locks order memory on every processor; flags that Python writes into shared memory
do not.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from twostroke_engine.transfer.channel import ChannelError, KVChannel
from twostroke_engine.transfer.pair_socket import PairSocket
from twostroke_engine.transfer.rendezvous import Rendezvous, greeting, listen_by_name

SLOT_BYTES = 1 << 19
"""Large enough that a word is cheap, small enough that what one side wrote is in the caches when the other reads it."""
NUM_SLOTS = 8

_SHAPE = struct.Struct("<II")
_FILLED = struct.Struct("<QI")
"""Bytes of the message that are still to come, this slot's among them, and how many are in this slot."""


class _Ring:
    """Slots that both sides see; each side counts for itself which one is next."""

    def __init__(self, descriptor: int, slot_bytes: int, num_slots: int) -> None:
        """Maps the file and closes the descriptor."""
        try:
            memory = mmap.mmap(descriptor, slot_bytes * num_slots)
        finally:
            os.close(descriptor)
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self._slots: NDArray[np.uint8] = np.frombuffer(memory, np.uint8).reshape(num_slots, slot_bytes)
        self._next = 0

    def next_slot(self) -> NDArray[np.uint8]:
        """The next slot, in turn."""
        slot: NDArray[np.uint8] = self._slots[self._next]
        self._next = (self._next + 1) % self.num_slots
        return slot


class ShmSender:
    """The side that fills slots."""

    def __init__(self, pair: PairSocket, ring: _Ring) -> None:
        self._pair = pair
        self._ring = ring
        self._num_free = ring.num_slots
        self._freed = memoryview(bytearray(ring.num_slots))
        self.close = pair.close

    def send(self, payload: Tensor) -> None:
        """Fills slot after slot while the receiver empties those before; returns when the last one is filled."""
        source = payload.numpy()
        with self._pair.operation():
            for start in range(0, source.size, self._ring.slot_bytes):
                piece = source[start : start + self._ring.slot_bytes]
                while not self._num_free:
                    self._num_free += self._pair.read_some(self._freed)
                np.copyto(self._ring.next_slot()[: piece.size], piece)
                self._num_free -= 1
                self._pair.write_word(_FILLED.pack(source.size - start, piece.size))

    def receive(self, payload: Tensor) -> None:
        """Bytes go one way.

        Raises:
            ChannelError: always.
        """
        raise ChannelError("this end of the pair sends")


class ShmReceiver:
    """The side that empties slots."""

    def __init__(self, pair: PairSocket, ring: _Ring) -> None:
        self._pair = pair
        self._ring = ring
        self._filled = memoryview(bytearray(_FILLED.size))
        self.close = pair.close

    def send(self, payload: Tensor) -> None:
        """Bytes go one way.

        Raises:
            ChannelError: always.
        """
        raise ChannelError("this end of the pair receives")

    def receive(self, payload: Tensor) -> None:
        """Copies slot after slot out; what the peer writes later is nothing to this payload."""
        target = payload.numpy()
        with self._pair.operation():
            for start in range(0, target.size, self._ring.slot_bytes):
                piece = target[start : start + self._ring.slot_bytes]
                self._pair.read_into(self._filled)
                left, size = _FILLED.unpack(self._filled)
                if (left, size) != (target.size - start, piece.size):
                    raise ChannelError(f"{target.size} bytes were announced; others came")
                np.copyto(piece, self._ring.next_slot()[: piece.size])
                self._pair.write_word(b"\x01")


class ShmListener:
    """The receiver's name."""

    def __init__(self, timeout_s: float) -> None:
        self._name, listening = listen_by_name("twostroke")
        self._rendezvous = Rendezvous(listening, timeout_s)
        self.close = self._rendezvous.close

    def endpoint(self, pair_id: str) -> str:
        """Name and token of the pair."""
        return f"shm://{self._name}/{self._rendezvous.token(pair_id)}"

    def accept(self, pair_id: str) -> KVChannel:
        """Meets the sender and passes it a new ring."""
        pair = self._rendezvous.accept(pair_id)
        with pair.operation():
            descriptor = _new_file(SLOT_BYTES * NUM_SLOTS)
            try:
                pair.write_file(_SHAPE.pack(SLOT_BYTES, NUM_SLOTS), descriptor)
            except OSError:
                os.close(descriptor)
                raise
            return ShmReceiver(pair, _Ring(descriptor, SLOT_BYTES, NUM_SLOTS))


class ShmScheme:
    """Two processes on one host and in one network namespace."""

    name = "shm"

    def __init__(self, timeout_s: float) -> None:
        """Needs Linux: see `place`."""
        self._timeout_s = timeout_s
        self.ability = f"shm:{place()}"

    def listen(self) -> ShmListener:
        """Listens at a new name."""
        return ShmListener(self._timeout_s)

    def connect(self, endpoint: str, pair_id: str) -> KVChannel:
        """Connects, and waits until the receiver has accepted the pair and passed its ring."""
        name, _, token = endpoint.removeprefix("shm://").partition("/")
        hello = greeting(pair_id, token)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self._timeout_s)
        try:
            connection.connect(f"\0{name}")
        except OSError as error:
            connection.close()
            raise ChannelError(f"no pair at {name}: {error.strerror or error}") from error
        pair = PairSocket(connection, self._timeout_s)
        shape = memoryview(bytearray(_SHAPE.size))
        with pair.operation():
            pair.write(hello)
            descriptor = pair.read_file(shape)
            return ShmSender(pair, _open_ring(descriptor, *_SHAPE.unpack(shape)))


def place() -> str:
    """Where this process runs: the boot of its kernel and its network namespace, in which abstract sockets are known.

    Equal for two processes if, and only if, one can connect to the other. Empty where the system has no such things, or
    forbids them.
    """
    try:
        os.close(_new_file(mmap.PAGESIZE))
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}.{os.stat('/proc/self/ns/net').st_ino}"
    except (OSError, AttributeError):  # no Linux: no such function
        return ""


def _new_file(num_bytes: int) -> int:
    descriptor = os.memfd_create("twostroke-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, num_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return descriptor


def _open_ring(descriptor: int, slot_bytes: int, num_slots: int) -> _Ring:
    try:
        is_sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        is_whole = 0 < slot_bytes * num_slots == os.fstat(descriptor).st_size
    except OSError:
        is_sealed, is_whole = 0, False
    if not (is_sealed and is_whole):
        os.close(descriptor)
        raise ChannelError("the receiver's ring is not one")
    return _Ring(descriptor, slot_bytes, num_slots)
