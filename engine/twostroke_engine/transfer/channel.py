"""`KVChannel`: a byte pipe from one sender to one receiver, of a scheme that both sides can use.

A channel moves exactly what was announced on the control stream, in order; it knows no leases. It is two-sided: bytes
land only where the receiver's own thread asked for them, so that thread's end is the fence before a block is reused.

`BlockWriter` and `BlockTarget` are the ends of the other kind: the sender writes into granted blocks of the receiver's
pool by itself, and a block is reused only when it is proven that it does so no more.

Which scheme a pair uses is agreed in its greeting. Each side tells its abilities, best first: texts such as `tcp`,
`collective:gloo` or `shm:HOST`. Two sides can use a scheme together if, and only if, both tell the same text, so a
scheme puts into it what the two must have in common, and a router can compare what it does not understand.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor

log = logging.getLogger(__name__)


NOT_GRANTED = -1
"""In place of a block that is part of a lease but not to be written to."""


class ChannelError(Exception):
    """The pair's channel cannot be used any more: peer dead, time-out, or closed. Says nothing of other pairs."""


class ChannelUnusable(ChannelError):
    """A scheme turned out not to work between these two processes; the next pair is to be of another one."""


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


@runtime_checkable
class BlockWriter(Protocol):
    """The sender's side of a pair in which it writes to the receiver's blocks."""

    pool: Tensor
    """The receiver's KV pool [N, L, 2, B, G, D], mapped here."""

    def writing(self, lease_id: str, epoch: int) -> AbstractContextManager[tuple[int, ...] | None]:
        """While the context lasts, writes to the lease's blocks, which it yields, are granted; None: they were taken
        back. Writes must have ended when it is left.

        Raises:
            ChannelError: the pair is broken.
        """
        ...

    def close(self) -> None:
        """Ends the pair: unmaps, and then says so; idempotent, from any thread."""
        ...


@runtime_checkable
class BlockTarget(Protocol):
    """The receiver's side: it grants leases to the writer, and knows when the writer has let go of them."""

    def grant(self, lease_id: str, epoch: int, block_ids: tuple[int, ...]) -> None:
        """The writer may write to these blocks from now on, but where it says `NOT_GRANTED`.

        Raises:
            ChannelError: the pair is broken.
        """
        ...

    def end(self, lease_id: str, epoch: int, *, is_acknowledged: bool) -> bool:
        """Takes a grant back. True: the writer is known to be done with it, as `is_acknowledged` says too; otherwise
        `fenced` of `accept` is called with lease and epoch once that is proven, from any thread."""
        ...

    def close(self) -> None:
        """Ends the pair; what was granted stays pinned until it is proven that the writer has let go; idempotent."""
        ...


@runtime_checkable
class BlockListener(Protocol):
    """The receiver's end of a scheme whose senders write to blocks."""

    def endpoint(self, pair_id: str) -> str:
        """As a `ChannelListener`'s."""
        ...

    def accept_writer(self, pair_id: str, fenced: Callable[[str, int], None]) -> BlockTarget:
        """Waits for the sender of this pair; for `fenced` see `BlockTarget.end`.

        Raises:
            ChannelError: it did not come in time, or cannot be fenced.
        """
        ...

    def close(self) -> None:
        """As a `ChannelListener`'s."""
        ...


class BlockScheme(Protocol):
    """A kind of channel whose senders write to blocks."""

    name: str
    ability: str
    """As a `ChannelScheme`'s."""

    def listen(self) -> BlockListener:
        """Opens the receiver's end."""
        ...

    def connect(self, endpoint: str, pair_id: str) -> BlockWriter:
        """Joins the pair at a listener's endpoint.

        Raises:
            ChannelUnusable: the receiver's memory cannot be reached from this process.
            ChannelError: it did not work in time.
        """
        ...


class Listeners:
    """The receiver's ends of all schemes of an engine."""

    def __init__(self, listeners: dict[str, ChannelListener | BlockListener]) -> None:
        self._listeners = listeners

    def refusal(self, abilities: Sequence[str]) -> str:
        """Why a sender with these abilities cannot reach this side; empty if it can."""
        if any(ability in abilities for ability in self._listeners):
            return ""
        ours, theirs = ", ".join(self._listeners), ", ".join(abilities) or "none"
        return f"no common channel: the decode worker has {ours}, the prefill worker {theirs}"

    def choose(self, abilities: Sequence[str]) -> ChannelListener | BlockListener:
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

    def __init__(self, schemes: Sequence[ChannelScheme | BlockScheme], reachable: Sequence[str] = ()) -> None:
        """`reachable` are abilities of other receivers that this side's senders can use as well."""
        if not schemes:
            raise ValueError("an engine needs at least one channel scheme")
        self._schemes = {scheme.name: scheme for scheme in schemes}
        self._reachable = tuple(reachable)

    @property
    def abilities(self) -> tuple[str, ...]:
        """What to tell peers, best first."""
        return (*(scheme.ability for scheme in self._schemes.values()), *self._reachable)

    def listen(self) -> Listeners:
        """A listener of each scheme."""
        return Listeners({scheme.ability: scheme.listen() for scheme in self._schemes.values()})

    def connect(self, endpoint: str, pair_id: str) -> KVChannel | BlockWriter:
        """Joins a pair; the endpoint's scheme chooses how. One that turns out to be unusable is not told of again.

        Raises:
            ChannelError: no such scheme here, or the pair did not come together.
        """
        name = scheme_of(endpoint)
        if name not in self._schemes:
            raise ChannelError(
                f"no channel for {name or 'an endpoint without a scheme'}; have {', '.join(self._schemes)}"
            )
        try:
            return self._schemes[name].connect(endpoint, pair_id)
        except ChannelUnusable as error:
            self._give_up(name, str(error))
            raise

    def _give_up(self, name: str, reason: str) -> None:
        log.warning("KV channel %s is given up by this worker's sender: %s", name, reason)
        self._schemes = {other: scheme for other, scheme in self._schemes.items() if other != name}
        self._reachable = tuple(text for text in self._reachable if text.partition(":")[0] != name)


def scheme_of(endpoint: str) -> str:
    """The part before `://`; empty if there is none."""
    name, separator, _ = endpoint.partition("://")
    return name if separator else ""
