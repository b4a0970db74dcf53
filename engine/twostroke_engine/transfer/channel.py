"""`KVChannel`: a byte pipe from one sender to one receiver, of a scheme that both sides can use.

A channel moves exactly what was announced on the control stream, in order; it knows no leases. It is two-sided: bytes
land only where the receiver's own thread asked for them, so that thread's end is the fence before a block is reused.

Which scheme a pair uses is agreed in its greeting. Each side tells its abilities, best first: texts such as `tcp`,
`collective:gloo` or `shm:HOST`. Two sides can use a scheme together if, and only if, both tell the same text, so a
scheme puts into it what the two must have in common, and a router can compare what it does not understand.
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

    def endpoint(self, pair_id: str) -> str:
        """`scheme://...`, to be told to the sender of this pair and to no one else."""
        ...

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
    """The scheme of its endpoints."""
    ability: str
    """`name`, or `name:WHAT`: what a peer must tell as well for the two to use this scheme."""

    def listen(self) -> ChannelListener:
        """Opens the receiver's end."""
        ...

    def connect(self, endpoint: str, pair_id: str) -> KVChannel:
        """Joins the pair at a listener's endpoint.

        Raises:
            ChannelError: it did not work in time.
        """
        ...


class Listeners:
    """The receiver's ends of all schemes of an engine."""

    def __init__(self, listeners: dict[str, ChannelListener]) -> None:
        self._listeners = listeners

    def refusal(self, abilities: Sequence[str]) -> str:
        """Why a sender with these abilities cannot reach this side; empty if it can."""
        if any(ability in abilities for ability in self._listeners):
            return ""
        ours, theirs = ", ".join(self._listeners), ", ".join(abilities) or "none"
        return f"no common channel: the decode worker has {ours}, the prefill worker {theirs}"

    def choose(self, abilities: Sequence[str]) -> ChannelListener:
        """The listener of the best scheme, in this side's order, that a sender with these abilities can use.

        Raises:
            ChannelError: there is none.
        """
        for ability, listener in self._listeners.items():
            if ability in abilities:
                return listener
        raise ChannelError(self.refusal(abilities))

    def close(self) -> None:
        """No new pair; idempotent. Pairs that exist go on."""
        for listener in self._listeners.values():
            listener.close()


class ChannelFactory:
    """The schemes an engine can use, best first."""

    def __init__(self, schemes: Sequence[ChannelScheme]) -> None:
        if not schemes:
            raise ValueError("an engine needs at least one channel scheme")
        self._schemes = {scheme.name: scheme for scheme in schemes}

    @property
    def abilities(self) -> tuple[str, ...]:
        """What to tell peers, best first."""
        return tuple(scheme.ability for scheme in self._schemes.values())

    def listen(self) -> Listeners:
        """A listener of each scheme."""
        return Listeners({scheme.ability: scheme.listen() for scheme in self._schemes.values()})

    def connect(self, endpoint: str, pair_id: str) -> KVChannel:
        """Joins a pair; the endpoint's scheme chooses how.

        Raises:
            ChannelError: no such scheme here, or the pair did not come together.
        """
        name = scheme_of(endpoint)
        if name not in self._schemes:
            raise ChannelError(
                f"no channel for {name or 'an endpoint without a scheme'}; have {', '.join(self._schemes)}"
            )
        return self._schemes[name].connect(endpoint, pair_id)


def scheme_of(endpoint: str) -> str:
    """The part before `://`; empty if there is none."""
    name, separator, _ = endpoint.partition("://")
    return name if separator else ""
