"""How long to wait before trying again."""

from __future__ import annotations

import asyncio
import random


class Backoff:
    """Exponential delays with jitter, so that a cluster's processes do not all knock at the same moment."""

    def __init__(self, initial_s: float = 0.1, max_s: float = 2.0, factor: float = 2.0) -> None:
        self._initial_s, self._max_s, self._factor = initial_s, max_s, factor
        self._next_s = initial_s

    def reset(self) -> None:
        """Starts over: the last attempt worked."""
        self._next_s = self._initial_s

    def next_s(self) -> float:
        """The next delay: between half and all of an exponentially growing bound."""
        bound = self._next_s
        self._next_s = min(bound * self._factor, self._max_s)
        return bound * random.uniform(0.5, 1.0)

    async def sleep(self) -> None:
        """Waits for the next delay."""
        await asyncio.sleep(self.next_s())
