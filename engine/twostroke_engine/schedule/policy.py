"""Who may take blocks when there are not enough for everyone.

Three parties want KV memory: running sequences grow, waiting ones want to start, reservations want a promise. Running
ones come first: a watermark is kept back for them. Between waiting sequences and reservations it is first come, first
served, as far as they can be compared: a reservation is refused while a stream waits to be resumed, or while a sequence
waits that came before the reservation was first refused; sequences that came after that leave it the room it asked for.
Neither kind can keep the other out for ever. And memory is not promised faster than it can be used: a sequence whose KV
is here and that still waits for a place in the batch holds up reservations too.
"""

from __future__ import annotations

from collections.abc import Iterable

from twostroke_engine.kv.block_pool import BlockPool
from twostroke_engine.sequence import Sequence


class Headroom:
    """The growth watermark, and the place of refused promises in the queue."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.watermark = max(1, pool.num_blocks // 100)
        self._refused_blocks = 0
        self._refused_before: int | None = None
        self._is_fresh = False

    def admits(self, sequence: Sequence, cost: int, alone: bool) -> bool:
        """Whether a waiting sequence may take `cost` blocks; alone, it has no one's growth to spare."""
        owed = 0 if sequence.is_interrupted or self._came_first(sequence) else self._refused_blocks
        return self._pool.num_available - cost - owed >= (0 if alone else self.watermark)

    def may_promise(self, num_blocks: int, waiting: Iterable[Sequence], next_arrival: int, alone: bool) -> bool:
        """Whether a reservation may have `num_blocks` now; a refusal keeps its place while it is asked again."""
        before = next_arrival if self._refused_before is None else self._refused_before
        owed_to_others = any(
            sequence.block_ids or sequence.is_interrupted or sequence.arrival < before for sequence in waiting
        )
        spare = self._pool.num_available - num_blocks
        granted = not owed_to_others and spare >= (0 if alone else self.watermark)
        self._refused_before = None if granted else before
        self._refused_blocks = 0 if granted else num_blocks
        self._is_fresh = True
        return granted

    def begin_plan(self) -> None:
        """Forgets a refusal that was not asked again since the last plan: its reservation is gone."""
        if not self._is_fresh:
            self._refused_before, self._refused_blocks = None, 0
        self._is_fresh = False

    def _came_first(self, sequence: Sequence) -> bool:
        return self._refused_before is None or sequence.arrival < self._refused_before
