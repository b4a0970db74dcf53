"""What a transfer thread must respect of its device: points in the engine's work, its own work, and turns.

On a host a layer is in memory once the engine says so. On a GPU the engine only launches: it leaves a mark (an event)
that the transfer thread's own stream waits for, and operations on channels take turns.

Turns (`DeviceOrder`). Two NCCL groups of one device must not run their kernels in different orders on different
processes, or each waits for one that is not scheduled. So at most one operation of a device is under way. It cannot
deadlock: a sender takes its turn first, then announces and sends at once, and has one segment outstanding; so every
announced segment's sender is already in its turn and waits for nothing but the receive; a receiver posts receives only
for announced segments, in any order, so the one it is in always ends. (If a sender announced before its turn, two
senders and two receivers could wait in a circle.) gloo pairs share nothing, so a host has no turns, and a dead peer
holds up no one else; on a GPU it holds the device's turn until the channel's time-out at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Lock, local
from typing import Protocol

import torch

Mark = torch.cuda.Event | None
"""A point in the engine's work; None has passed already."""


class DeviceSide(Protocol):
    """A transfer thread's view of a device."""

    def mark(self) -> Mark:
        """Engine thread: a point after everything launched so far."""
        ...

    def work(self, after: Mark) -> AbstractContextManager[None]:
        """Transfer thread: operations inside begin after the mark, and have ended when the block is left."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Transfer thread: held for a channel operation, announcement included."""
        ...


class HostSide:
    """A CPU: nothing is asynchronous, and pairs are independent."""

    def mark(self) -> Mark:
        """The point has passed."""
        return None

    def work(self, after: Mark) -> AbstractContextManager[None]:
        """Nothing to wait for."""
        return nullcontext()

    def turn(self) -> AbstractContextManager[None]:
        """No turns."""
        return nullcontext()


class DeviceOrder:
    """The lock behind a GPU's turns."""

    def __init__(self) -> None:
        self._lock = Lock()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One operation at a time."""
        with self._lock:
            yield


class CudaSide:
    """A GPU: one stream per transfer thread, so that copies do not queue behind the model's kernels."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads = local()
        self._order = DeviceOrder()

    def mark(self) -> Mark:
        """Records an event in the engine's stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def work(self, after: Mark) -> Iterator[None]:
        """Runs in this thread's stream, and waits for its end."""
        stream = self._stream()
        if after is not None:
            stream.wait_event(after)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            stream.synchronize()

    def turn(self) -> AbstractContextManager[None]:
        """The device's turn."""
        return self._order.turn()

    def _stream(self) -> torch.cuda.Stream:
        stream: torch.cuda.Stream | None = getattr(self._threads, "stream", None)
        if stream is None:
            torch.cuda.set_device(self._device)
            stream = self._threads.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return stream


def device_side(device: torch.device) -> DeviceSide:
    """The side of a device; an engine makes one, so that all its pairs share the turns."""
    return CudaSide(device) if device.type == "cuda" else HostSide()
