"""When requests are sent: by a clock of their own (open loop), by a trace, or as answers come (closed loop)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate, count, repeat
from typing import Literal

import msgspec


class Open(msgspec.Struct, frozen=True, tag="open"):
    """A sender that does not wait for answers."""

    rate: float | None
    """Requests a second on average; None: all at once."""
    shape: Literal["poisson", "gamma", "constant"] = "poisson"
    burstiness: float = 1.0
    """Of `gamma`: the shape of the gaps' distribution; 1 is Poisson, less comes in bursts, more is even."""

    def due_s(self, seed: int) -> Iterator[float]:
        """Seconds after the begin at which each request is due, without end."""
        return accumulate(self._gaps_s(random.Random(f"{seed}/arrivals")), initial=0.0)

    def _gaps_s(self, source: random.Random) -> Iterator[float]:
        if self.rate is None:
            return repeat(0.0)
        if self.shape == "constant":
            return repeat(1 / self.rate)
        shape = self.burstiness if self.shape == "gamma" else 1.0
        scale_s = 1 / (self.rate * shape)
        return (source.gammavariate(shape, scale_s) for _ in count())


class Replay(msgspec.Struct, frozen=True, tag="replay"):
    """The times of a trace, `speed` times as fast."""

    speed: float = 1.0

    def due_s(self, times_s: Sequence[float]) -> Iterator[float]:
        """Seconds after the begin at which each row of the trace is due."""
        return ((time_s - times_s[0]) / self.speed for time_s in times_s)


class Closed(msgspec.Struct, frozen=True, tag="closed"):
    """`clients` that each send a request when they have the answer to the one before."""

    clients: int


Arrivals = Open | Replay | Closed


def describe(arrivals: Arrivals) -> str:
    """The load in words."""
    if isinstance(arrivals, Closed):
        return f"closed loop, {arrivals.clients} client{'s' if arrivals.clients > 1 else ''}"
    if isinstance(arrivals, Replay):
        return f"open loop, times of the trace at {arrivals.speed:g} x"
    if arrivals.rate is None:
        return "open loop, all at once"
    shape = f"gamma, burstiness {arrivals.burstiness:g}" if arrivals.shape == "gamma" else arrivals.shape
    return f"open loop, {arrivals.rate:g} requests/s, {shape}"
