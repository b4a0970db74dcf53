"""`WriterFence`: which leases a writer in another process may still write to. Pure; its owner holds a lock.

    granted --end, acknowledged--> gone
    granted --end--> ending --acknowledged, or the writer is over--> gone, and reported

A writer is over when it has said that it has unmapped the pool, or its process has ended. No clock appears here.
"""

from __future__ import annotations

LeaseKey = tuple[str, int]
"""Lease id and epoch."""


class WriterFence:
    """What one writer was granted and has not been seen to let go."""

    def __init__(self) -> None:
        self.is_over = False
        """It cannot write at all any more."""
        self._granted: set[LeaseKey] = set()
        self._ending: set[LeaseKey] = set()

    @property
    def num_ending(self) -> int:
        """Leases that were taken back, of which the writer has said nothing yet."""
        return len(self._ending)

    def grant(self, key: LeaseKey) -> None:
        """It may write from now on."""
        self._granted.add(key)

    def end(self, key: LeaseKey, *, is_acknowledged: bool) -> bool:
        """The grant is taken back; whether it is known that the writer has let go of it. A lease that was never
        granted has no writer."""
        was_granted = key in self._granted
        self._granted.discard(key)
        if is_acknowledged or self.is_over or not was_granted:
            return True
        self._ending.add(key)
        return False

    def acknowledged(self, key: LeaseKey) -> bool:
        """The writer says that it has let go; whether that was waited for."""
        was_ending = key in self._ending
        self._ending.discard(key)
        return was_ending

    def over(self) -> tuple[LeaseKey, ...]:
        """The writer is over; the leases that were waited for, once."""
        self.is_over = True
        ended, self._ending = tuple(sorted(self._ending)), set()
        return ended
