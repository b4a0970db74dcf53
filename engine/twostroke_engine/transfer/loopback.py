"""`loopback://NAME`: both ends in one process; a send meets a receive and the bytes are copied once."""

from __future__ import annotations

from itertools import count
from queue import Empty, SimpleQueue
from threading import Event, Lock

from torch import Tensor

from twostroke_engine.transfer.channel import ChannelError, KVChannel

_CLOSED = None


class _Message:
    """A payload on its way; the sender waits until it was taken."""

    def __init__(self, payload: Tensor) -> None:
        self.payload = payload
        self.taken = Event()


class _Pipe:
    """What the two sides of a pair share."""

    def __init__(self) -> None:
        self.messages: SimpleQueue[_Message | None] = SimpleQueue()
        self.broken = Event()
        self.joined = Event()
        self.underway: _Message | None = None


class LoopbackChannel:
    """One side of an in-process pair."""

    def __init__(self, pipe: _Pipe, timeout_s: float) -> None:
        self._pipe = pipe
        self._timeout_s = timeout_s

    def send(self, payload: Tensor) -> None:
        """Hands the payload over and waits until the receiver has copied it."""
        message = self._pipe.underway = _Message(payload)
        self._check()
        self._pipe.messages.put(message)
        if not message.taken.wait(self._timeout_s):
            self.close()
            raise ChannelError("loopback: the receiver did not take the message in time")
        self._check()

    def receive(self, payload: Tensor) -> None:
        """Copies the next message."""
        try:
            message = self._pipe.messages.get(timeout=self._timeout_s)
        except Empty:
            message = _CLOSED
        if message is _CLOSED:
            self.close()
            raise ChannelError("loopback: closed, or nothing came in time")
        try:
            self._check()
            if message.payload.numel() != payload.numel():
                self.close()
                raise ChannelError(f"loopback: {payload.numel()} bytes expected, {message.payload.numel()} came")
            payload.copy_(message.payload)
        finally:
            message.taken.set()

    def close(self) -> None:
        """Wakes both sides."""
        self._pipe.broken.set()
        self._pipe.messages.put(_CLOSED)
        if self._pipe.underway is not None:
            self._pipe.underway.taken.set()

    def _check(self) -> None:
        if self._pipe.broken.is_set():
            raise ChannelError("loopback: the pair is closed")


class LoopbackListener:
    """The receiving end of a name."""

    def __init__(self, scheme: LoopbackScheme, endpoint: str) -> None:
        self._endpoint = endpoint
        self._scheme = scheme

    def endpoint(self, pair_id: str) -> str:
        """The name; pairs are kept apart by their ids."""
        return self._endpoint

    def accept(self, pair_id: str) -> KVChannel:
        """Waits for the pair's sender."""
        return self._scheme.join(self._endpoint, pair_id, awaited="sender")

    def close(self) -> None:
        """Nothing to stop: a pair that no one accepts times out."""


class LoopbackScheme:
    """Pairs by name; the two ends share one object of this class."""

    name = "loopback"
    ability = "loopback"

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._numbers = count()
        self._lock = Lock()
        self._pipes: dict[tuple[str, str], _Pipe] = {}

    def listen(self) -> LoopbackListener:
        """A new name."""
        return LoopbackListener(self, f"loopback://{next(self._numbers)}")

    def connect(self, endpoint: str, pair_id: str) -> KVChannel:
        """Waits for the pair's receiver."""
        return self.join(endpoint, pair_id, awaited="receiver")

    def join(self, endpoint: str, pair_id: str, *, awaited: str) -> KVChannel:
        """Whoever comes last lets the other one go on."""
        key = (endpoint, pair_id)
        with self._lock:
            pipe = self._pipes.pop(key, None)
            if pipe is not None:
                pipe.joined.set()
            else:
                pipe = self._pipes[key] = _Pipe()
        if not pipe.joined.wait(self._timeout_s):
            with self._lock:
                self._pipes.pop(key, None)
            raise ChannelError(f"loopback: the {awaited} of pair {pair_id} did not come in time")
        return LoopbackChannel(pipe, self._timeout_s)
