"""`nixl://HOST:PORT/TOKEN`: the sender writes into memory of the receiver by NIXL (UCX): RDMA where there is a fabric.

Each side of a pair registers a few slots of memory, where its KV pool is: on the host or on the GPU. The sender copies
a piece of a message into a slot, writes it to the receiver's slot and has a notice follow it; the receiver copies it
out and says over the pair's socket that the slot is free. `send` returns when its last write has ended. The pool itself
is never registered: what a late writer could still change is a slot that no one reads, never a block.

Slots are given back when the sender has said that it writes no more, or has proven to be dead (`nixl_slots.py`).
"""

from __future__ import annotations

import contextlib
import secrets
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from threading import Lock
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor

from twostroke_engine.transfer.channel import ChannelError, KVChannel
from twostroke_engine.transfer.nixl_agent import NixlAgent, release
from twostroke_engine.transfer.nixl_slots import FAREWELL, SlotKeeper, Slots
from twostroke_engine.transfer.peer_process import ProcessName, own_process, watch
from twostroke_engine.transfer.polled_socket import PolledSocket
from twostroke_engine.transfer.rendezvous import Rendezvous, greeting
from twostroke_engine.transfer.tcp import connect_to, listen_at

T = TypeVar("T")

_NOTICE = struct.Struct("<QQI")
"""Number of the piece, bytes of the message that are still to come, its own among them, and its own."""
_READY = b"\x01"
_LOOKS_WITHOUT_PAUSE = 4
_SHORTEST_S, _LONGEST_S = 10e-6, 500e-6
_LAST_WRITES_S = 1.0


class _Welcome(msgspec.Struct, frozen=True, array_like=True):
    """What the sender must know of the receiver."""

    agent: bytes
    """Its description, of the slots and no other memory."""
    address: int
    device_index: int
    slot_bytes: int
    num_slots: int
    tag: bytes
    """Notices of this pair begin with it."""


class _Side:
    """What both sides of a pair do: wait, with an end to it, and close once nothing is under way."""

    def __init__(self, agent: NixlAgent, link: PolledSocket, slots: Slots, timeout_s: float) -> None:
        self.agent = agent
        self.link = link
        self.slots = slots
        self._timeout_s = timeout_s
        self.end: Callable[[], None] = lambda: None
        """Gives up what the pair has; called once or more, never during an operation."""
        self._busy = Lock()
        self._is_closing = False

    @contextlib.contextmanager
    def operation(self) -> Iterator[None]:
        """One at a time; whatever goes wrong in it closes the pair."""
        try:
            with self._busy:
                if self._is_closing:
                    raise ChannelError("the pair is closed")
                yield
        except BaseException:
            self._is_closing = True
            raise
        finally:
            if self._is_closing:
                self.close()

    def close(self) -> None:
        """Any thread: `end` follows as soon as no operation is under way, on that one's thread if there is one."""
        self._is_closing = True
        if self._busy.acquire(blocking=False):
            try:
                self.end()
            finally:
                self._busy.release()

    def until(self, look: Callable[[], T | None]) -> T:
        """Looks again and again while UCX works.

        Raises:
            ChannelError: the pair was closed, the peer has gone, or the time was over.
        """
        due_s, pause_s, looks = time.monotonic() + self._timeout_s, _SHORTEST_S, count(1)
        while True:
            self.agent.progress()
            found = look()
            if found is not None:
                return found
            if self._is_closing:
                raise ChannelError("the pair is closed")
            if time.monotonic() >= due_s:
                raise ChannelError(f"Timed out after {self._timeout_s:g} s")
            if next(looks) <= _LOOKS_WITHOUT_PAUSE:
                continue
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.2, _LONGEST_S)


class NixlSender:
    """The side that writes."""

    def __init__(self, side: _Side, peer: str, theirs: _Welcome) -> None:
        self._side = side
        self._peer = peer
        self._theirs = theirs
        self._num_written = 0
        self._num_freed = 0
        self._under_way: deque[Any] = deque()
        self._is_open = True
        side.end = self._end
        self.close = side.close

    def send(self, payload: Tensor) -> None:
        """Writes piece after piece while the receiver empties the slots before; returns when all are written."""
        size, slot_bytes = payload.numel(), self._theirs.slot_bytes
        with self._side.operation():
            for start in range(0, size, slot_bytes):
                piece = payload[start : start + slot_bytes]
                if self._num_written - self._num_freed == self._theirs.num_slots:
                    self._side.until(self._freed_more)
                self._write(piece, size - start)
            self._side.until(self._all_written)
            self._side.agent.progress()  # whatever UCX still holds of the last notice

    def receive(self, payload: Tensor) -> None:
        """Bytes go one way.

        Raises:
            ChannelError: always.
        """
        raise ChannelError("this end of the pair sends")

    def _write(self, piece: Tensor, left: int) -> None:
        which = self._num_written % self._theirs.num_slots
        slot = self._side.slots.fill(which, piece)
        notice = self._theirs.tag + _NOTICE.pack(self._num_written, left, piece.numel())
        address = self._theirs.address + which * self._theirs.slot_bytes
        handle = self._side.agent.write(self._peer, slot, address, self._theirs.device_index, notice)
        self._num_written += 1
        self._under_way.append(handle)

    def _all_written(self) -> bool | None:
        """True once every write has ended, its notice included."""
        while self._under_way and self._side.agent.is_done(self._under_way[0]):
            self._side.agent.drop(self._under_way.popleft())
        if self._under_way:
            self._look()
        return None if self._under_way else True

    def _freed_more(self) -> bool | None:
        """Drives the writes on; True if the receiver has emptied a slot since."""
        self._all_written()
        return bool(self._look()) or None

    def _look(self) -> int:
        freed = len(self._side.link.look(self._theirs.num_slots))
        self._num_freed += freed
        return freed

    def _end(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        due_s = time.monotonic() + _LAST_WRITES_S
        while not (is_over := self._writes_are_over()) and time.monotonic() < due_s:
            time.sleep(_LONGEST_S)
        if is_over:
            with contextlib.suppress(ChannelError):
                self._side.link.say(FAREWELL)
            self._side.slots.give_back()
        else:  # the receiver keeps its slots until this process has ended, and this side its own
            self._side.slots.abandon(*self._under_way)
        with contextlib.suppress(ChannelError):
            self._side.agent.leave(self._peer)
        self._side.link.close()

    def _writes_are_over(self) -> bool:
        agent = self._side.agent
        with contextlib.suppress(ChannelError):
            agent.progress()
        while self._under_way and agent.drop(self._under_way[0]):
            self._under_way.popleft()
        return not self._under_way


class NixlReceiver:
    """The side that is written to."""

    def __init__(self, side: _Side, tag: bytes, give_up: Callable[[bool], None]) -> None:
        """`give_up` takes over slots and socket when the pair ends; it hears whether the sender has said farewell."""
        self._side = side
        self._tag = tag
        self._give_up = give_up
        self._notices: dict[int, tuple[int, int]] = {}
        self._number = 0
        self._is_open = True
        self._has_farewell = False
        side.end = self._end
        self.close = side.close

    def send(self, payload: Tensor) -> None:
        """Bytes go one way.

        Raises:
            ChannelError: always.
        """
        raise ChannelError("this end of the pair receives")

    def receive(self, payload: Tensor) -> None:
        """Copies slot after slot out; what the peer writes later is nothing to this payload."""
        size, slots = payload.numel(), self._side.slots
        with self._side.operation():
            for start in range(0, size, slots.slot_bytes):
                piece = payload[start : start + slots.slot_bytes]
                notice = self._side.until(self._next_notice)
                if notice != (size - start, piece.numel()):
                    raise ChannelError(f"{size} bytes were announced; others came")
                slots.empty(self._number % slots.num_slots, piece)
                self._number += 1
                self._side.link.say(b"\x01")

    def _next_notice(self) -> tuple[int, int] | None:
        for found in self._side.agent.heard(self._tag):
            number, left, size = _NOTICE.unpack(found)
            self._notices[number] = (left, size)
        if self._number in self._notices:  # writes overtake one another, and their notices with them
            return self._notices.pop(self._number)
        if self._side.link.look(1) == FAREWELL:
            self._has_farewell = True
            raise ChannelError("the peer has closed the pair")
        return None

    def _end(self) -> None:
        if self._is_open:
            self._is_open = False
            self._side.agent.ignore(self._tag)
            self._give_up(self._has_farewell)


class NixlListener:
    """The receiver's port."""

    def __init__(self, scheme: NixlScheme, host: str, timeout_s: float) -> None:
        self._scheme = scheme
        self._timeout_s = timeout_s
        listening, self._address = listen_at(host)
        self._rendezvous = Rendezvous(listening, timeout_s)
        self.close = self._rendezvous.close

    def endpoint(self, pair_id: str) -> str:
        """Port and token of the pair."""
        return f"nixl://{self._address}/{self._rendezvous.token(pair_id)}"

    def accept(self, pair_id: str) -> KVChannel:
        """Meets the sender, gives it slots, and waits until it can write to them."""
        link = PolledSocket(self._rendezvous.accept(pair_id).detach())
        scheme = self._scheme
        try:
            slots = scheme.keeper.take(scheme.agent)
        except ChannelError:
            link.close()
            raise
        tag = secrets.token_bytes(8)
        side = _Side(scheme.agent, link, slots, self._timeout_s)
        scheme.agent.expect(tag)
        try:
            process = msgspec.msgpack.decode(side.until(link.look_frame), type=ProcessName)
            link.say_frame(msgspec.msgpack.encode(_welcome(slots, tag)))
        except (ChannelError, msgspec.DecodeError) as error:
            scheme.agent.ignore(tag)
            slots.give_back()  # the peer does not know them
            link.close()
            raise ChannelError(f"no pair: {error}") from error
        give_up = partial(_keep, scheme.keeper, side, process)
        channel = NixlReceiver(side, tag, give_up)
        with side.operation():
            side.until(lambda: link.look(1) or None)
        return channel


class NixlScheme:
    """Two hosts of one fabric, or two processes of one host; needs NIXL on both."""

    name = "nixl"

    def __init__(self, device: torch.device, host: str, timeout_s: float) -> None:
        """Makes the process's agent.

        Raises:
            ChannelError: NIXL is not installed, or cannot be used here.
        """
        self.agent = NixlAgent(device)
        self.keeper = SlotKeeper(device)
        self.ability = f"nixl:ucx.{release()}.{self.agent.memory_type}"
        self._host = host
        self._timeout_s = timeout_s

    def listen(self) -> NixlListener:
        """Listens at a free port."""
        return NixlListener(self, self._host, self._timeout_s)

    def connect(self, endpoint: str, pair_id: str) -> KVChannel:
        """Connects, learns where to write, and says so."""
        address, _, token = endpoint.removeprefix("nixl://").partition("/")
        link = PolledSocket(connect_to(address, self._timeout_s))
        slots = None
        try:
            slots = self.keeper.take(self.agent)
            side = _Side(self.agent, link, slots, self._timeout_s)
            link.say(greeting(pair_id, token))
            link.say_frame(msgspec.msgpack.encode(own_process()))
            theirs = msgspec.msgpack.decode(side.until(link.look_frame), type=_Welcome)
            if theirs.slot_bytes != slots.slot_bytes or theirs.num_slots != slots.num_slots:
                raise ChannelError("the receiver's slots have another shape")
            peer = self.agent.join(theirs.agent)
        except (ChannelError, msgspec.DecodeError, OSError) as error:
            if slots is not None:
                slots.give_back()
            link.close()
            raise ChannelError(f"no pair at {address}: {error}") from error
        channel = NixlSender(side, peer, theirs)
        with side.operation():
            link.say(_READY)
        return channel


def _welcome(slots: Slots, tag: bytes) -> _Welcome:
    described = slots.describe()
    return _Welcome(described, slots.address, slots.device_index, slots.slot_bytes, slots.num_slots, tag)


def _keep(keeper: SlotKeeper, side: _Side, process: ProcessName, has_farewell: bool) -> None:
    keeper.keep(side.slots, side.link, watch(process), is_over=has_farewell)
