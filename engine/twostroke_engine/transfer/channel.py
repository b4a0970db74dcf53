"""`KVChannel`: a byte pipe from one sender to one receiver, chosen by its endpoint's scheme.

A channel moves exactly what was announced on the control stream, in order; it knows no leases. It is two-sided: bytes
land only where the receiver's own thread asked for them, so that thread's end is the fence before a block is reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class ChannelError(Exception):
    """The pair's channel cannot be used any more: peer dead, time-out, or closed. Says nothing of other pairs."""


class KVChannel(Protocol):
    """One side of a pair. One operation at a time; only `close` may come from another thread."""

    def send(self, payload: Tensor) -> None:
        """Sends a contiguous uint8 tensor; blocks until it may be reused.

        Raises:
            ChannelError: the pair is broken; every later operation fails too.
        """
        ...

    def receive(self, payload: Tensor) -> None:
        """Fills a contiguous uint8 tensor with the next message, which must have its size.

        Raises:
            ChannelError: as for `send`.
        """
        ...

    def close(self) -> None:
        """Breaks the pair; idempotent."""
        ...


class ChannelListener(Protocol):
    """The receiver's end of a scheme."""

    endpoint: str
    """`scheme://...`, to be told to senders."""

    def accept(self, pair_id: str) -> KVChannel:
        """Waits for the sender of this pair.

        Raises:
            ChannelError: it did not come in time.
        """
        ...

    def close(self) -> None:
        """No new pair; idempotent. Pairs that exist go on."""
        ...


class ChannelScheme(Protocol):
    """One kind of channel."""

    name: str

    def listen(self) -> ChannelListener:
        """Opens the receiver's end."""
        ...

    def connect(self, endpoint: str, pair_id: str) -> KVChannel:
        """Joins the pair at a listener's endpoint.

        Raises:
            ChannelError: it did not work in time.
        """
        ...


class ChannelFactory:
    """The schemes an engine can use, best first."""

    def __init__(self, schemes: Sequence[ChannelScheme]) -> None:
        if not schemes:
            raise ValueError("an engine needs at least one channel scheme")
        self._schemes = {scheme.name: scheme for scheme in schemes}

    @property
    def names(self) -> tuple[str, ...]:
        """Scheme names, best first."""
        return tuple(self._schemes)

    def listen(self) -> ChannelListener:
        """A listener of the best scheme."""
        return next(iter(self._schemes.values())).listen()

    def connect(self, endpoint: str, pair_id: str) -> KVChannel:
        """Joins a pair; the endpoint's scheme chooses how.

        Raises:
            ChannelError: no such scheme here, or the pair did not come together.
        """
        name = scheme_of(endpoint)
        if name not in self._schemes:
            raise ChannelError(f"no channel for {endpoint!r}; this engine has {', '.join(self._schemes)}")
        return self._schemes[name].connect(endpoint, pair_id)


def scheme_of(endpoint: str) -> str:
    """The part before `://`; empty if there is none."""
    name, separator, _ = endpoint.partition("://")
    return name if separator else ""
