"""KV channels that go wrong on purpose: wrapped around the real ones, by construction, in an engine process of a test.

The announcements that pass tell the wrapper which request a payload belongs to, and the request's id tells what is to
happen to it (`fault_plan`). What was done is reported before it is done, so that a killed process has told of it.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from queue import SimpleQueue
from threading import local
from typing import Any

import torch
from torch import Tensor
from twostroke_engine.transfer.channel import (
    BlockListener,
    BlockWriter,
    ChannelFactory,
    ChannelListener,
    KVChannel,
    Listeners,
)
from twostroke_engine.transfer.collective import CollectiveChannel
from twostroke_engine.transfer.messages import OpenTransfer, PairHello, ReceiverMessage, SegmentReady, SenderMessage

from tests.support.fault_plan import BY_RECEIVER, BY_SENDER, Planned, faults_of

Report = Callable[[str], None]
_LEAVE_S = 0.03


class Injector:
    """What a process knows of the hand-offs that pass through it, and where it tells what it did."""

    receives_blocks = False
    """Nothing is received for an announcement: it has been written already."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._thread = local()
        self._requests: dict[str, str] = {}
        self._num_stops = 0
        self._counts: Counter[str] = Counter()
        self._places: dict[tuple[str, int, int], bool] = {}
        self._announced: defaultdict[str, SimpleQueue[SegmentReady]] = defaultdict(SimpleQueue)
        self._pairs: dict[str, str] = {}

    def note_said(self, message: SenderMessage | ReceiverMessage) -> None:
        """The sender's pair thread says this, and is about to send if it is an announcement."""
        if isinstance(message, OpenTransfer):
            self._requests[message.lease_id] = message.request_id
        elif isinstance(message, SegmentReady):
            self._thread.segment = message

    def note_heard(self, peer: str, message: SenderMessage | ReceiverMessage) -> None:
        """The receiver hears this; a pair's announcements are received in their order."""
        if isinstance(message, PairHello):
            self._pairs[peer] = message.pair_id
        elif isinstance(message, OpenTransfer):
            self._requests[message.lease_id] = message.request_id
        elif isinstance(message, SegmentReady) and self.receives_blocks:
            for fault in self._due_to_hear(message):
                self.tell(fault, message.lease_id, message.number)
                end_here(signal.SIGKILL)
        elif isinstance(message, SegmentReady) and peer in self._pairs:
            self._announced[self._pairs[peer]].put(message)

    def due_to_send(self) -> tuple[SegmentReady, list[Planned]]:
        """The segment that this thread sends now, and what is to happen to it."""
        segment: SegmentReady = self._thread.segment
        place = (segment.lease_id, segment.first_layer, segment.first_block)
        return segment, self.due_to_write(self._requests.get(segment.lease_id, ""), place)

    def due_to_write(self, request_id: str, place: tuple[str, int, int]) -> list[Planned]:
        """What is to happen to a request's next segment, which has this lease, first layer and first block."""
        at = self._next(place[0])
        faults = [fault for fault in faults_of(request_id) if fault.kind in BY_SENDER]
        due = [fault for fault in faults if fault.at == at or (fault.kind == "flips" and self._places.get(place))]
        self._places[place] = any(fault.kind == "flips" for fault in due)
        return due

    def due_to_receive(self, pair_id: str) -> tuple[SegmentReady | None, list[Planned]]:
        """The segment that comes now, and what is to happen; None if a message came twice and this is unclear."""
        if self._announced[pair_id].empty():
            return None, []
        segment = self._announced[pair_id].get()
        return segment, self._due_to_hear(segment)

    def tell(self, fault: Planned, lease_id: str, number: int) -> None:
        """A line for the one who counts."""
        self._report(f"fault {fault.kind} {lease_id} {number}")

    def stop(self, fault: Planned, lease_id: str, number: int) -> None:
        """Every second time an announcement leaves the process before it stops, else it is stopped with it."""
        self._num_stops += 1
        if self._num_stops % 2:
            time.sleep(_LEAVE_S)
        self.tell(fault, lease_id, number)
        end_here(signal.SIGSTOP)

    def tell_hash(self, where: str, request_id: str, value: str) -> None:
        """A line for the one who compares."""
        self._report(f"{where} {request_id} {value}")

    def _due_to_hear(self, segment: SegmentReady) -> list[Planned]:
        at, faults = self._next(segment.lease_id), faults_of(self._requests.get(segment.lease_id, ""))
        return [fault for fault in faults if fault.at == at and fault.kind in BY_RECEIVER]

    def _next(self, lease_id: str) -> int:
        self._counts[lease_id] += 1
        return self._counts[lease_id] - 1


class FaultyFactory(ChannelFactory):
    """Another factory, whose channels go wrong."""

    def __init__(self, inner: ChannelFactory, injector: Injector) -> None:
        self._inner = inner
        self._injector = injector

    @property
    def abilities(self) -> tuple[str, ...]:
        return self._inner.abilities

    def listen(self) -> Listeners:
        return _FaultyListeners(self._inner.listen(), self._injector)

    def connect(self, endpoint: str, pair_id: str) -> KVChannel | BlockWriter:
        channel = self._inner.connect(endpoint, pair_id)
        return channel if isinstance(channel, BlockWriter) else FaultySender(channel, self._injector)


class _FaultyListeners(Listeners):
    def __init__(self, inner: Listeners, injector: Injector) -> None:
        self._inner = inner
        self._injector = injector
        self.refusal = inner.refusal  # type: ignore[method-assign]
        self.close = inner.close  # type: ignore[method-assign]

    def choose(self, abilities: Sequence[str]) -> ChannelListener | BlockListener:
        listener = self._inner.choose(abilities)
        if isinstance(listener, BlockListener):
            self._injector.receives_blocks = True
            return listener
        return _FaultyListener(listener, self._injector)


class _FaultyListener:
    def __init__(self, inner: ChannelListener, injector: Injector) -> None:
        self.endpoint = inner.endpoint
        self.close = inner.close
        self._inner = inner
        self._injector = injector

    def accept(self, pair_id: str) -> KVChannel:
        return _FaultyReceiver(self._inner.accept(pair_id), pair_id, self._injector)


class FaultySender:
    """The sending side of a pair."""

    def __init__(self, inner: KVChannel, injector: Injector) -> None:
        self.receive = inner.receive
        self.close = inner.close
        self._inner = inner
        self._injector = injector

    def send(self, payload: Tensor) -> None:
        segment, due = self._injector.due_to_send()
        try:
            self._send(payload.clone(), segment, due)
        finally:
            if any(fault.kind.startswith("kill") for fault in due):  # what was told comes true, whatever else happens
                end_here(signal.SIGKILL)

    def _send(self, payload: Tensor, segment: SegmentReady, due: list[Planned]) -> None:
        for number, fault in enumerate(due):
            if fault.kind != "stop":
                self._injector.tell(fault, segment.lease_id, segment.number)
            match fault.kind:
                case "flip" | "flips":
                    payload[(segment.number * 7919 + number) % payload.numel()] ^= 1 << (segment.number % 8)
                case "truncate":
                    payload = payload[: payload.numel() // 2]
                case "twice":
                    self._inner.send(payload)
                case "kill-before":
                    end_here(signal.SIGKILL)
                case "kill-mid":
                    return self._send_halves(payload, lambda: end_here(signal.SIGKILL))
                case "stop":
                    return self._send_halves(
                        payload, partial(self._injector.stop, fault, segment.lease_id, segment.number)
                    )
        self._inner.send(payload)
        return None

    def _send_halves(self, payload: Tensor, between: Callable[[], None]) -> None:
        """Sends, with a break in the middle; then scribbles over whatever memory it shares with the receiver."""
        inner: Any = self._inner
        name = "_group" if isinstance(inner, CollectiveChannel) else "_pair"
        real = getattr(inner, name, None)
        if real is None:  # a channel that cannot be looked into, or that is closed
            between()
            inner.send(payload)
            return
        setattr(inner, name, _MidGroup(real, between) if name == "_group" else _MidSocket(real, between))
        try:
            inner.send(payload)
        finally:
            if getattr(inner, name) is not None:  # a closed group stays closed
                setattr(inner, name, real)
            if hasattr(inner, "_ring"):
                inner._ring._slots.fill(0xFF)


class _FaultyReceiver:
    """The receiving side of a pair."""

    def __init__(self, inner: KVChannel, pair_id: str, injector: Injector) -> None:
        self.send = inner.send
        self.close = inner.close
        self._inner = inner
        self._pair_id = pair_id
        self._injector = injector

    def receive(self, payload: Tensor) -> None:
        segment, due = self._injector.due_to_receive(self._pair_id)
        for fault in due:
            if segment is not None:
                self._injector.tell(fault, segment.lease_id, segment.number)
        if any(fault.kind == "die-before" for fault in due):
            end_here(signal.SIGKILL)
        try:
            self._inner.receive(payload)
        finally:
            if any(fault.kind == "die-after" for fault in due):
                end_here(signal.SIGKILL)


class _MidGroup:
    """A process group whose next message is interrupted once it is on its way."""

    def __init__(self, inner: Any, between: Callable[[], None]) -> None:
        self._inner = inner
        self._between = between

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Any:
        work = self._inner.send(tensors, rank, tag)
        if tensors[0].dtype is torch.uint8:  # not the length before it
            self._between()
        return work


class _MidSocket:
    """A pair's socket whose next message is interrupted: tcp's after half its bytes, shm's before the word that says
    that a slot is filled."""

    def __init__(self, inner: Any, between: Callable[[], None]) -> None:
        self._inner = inner
        self._between = between
        self.read_some = inner.read_some

    def operation(self) -> AbstractContextManager[None]:
        entered: AbstractContextManager[None] = self._inner.operation()
        return entered

    def write(self, header: bytes, body: memoryview) -> None:
        half = body.nbytes // 2
        self._inner.write(header, body[:half])
        self._between()
        self._inner.write(body[half:])

    def write_word(self, word: bytes) -> None:
        self._between()
        self._inner.write_word(word)


def end_here(how: signal.Signals) -> None:
    os.kill(os.getpid(), how)
