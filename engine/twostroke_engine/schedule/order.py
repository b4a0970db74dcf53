"""Who goes first. Smaller is earlier; arrival numbers make every order total and first come, first served."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from twostroke_engine.sequence import Sequence


def rank(sequence: Sequence) -> tuple[int, int, int]:
    """Importance: computes first, and is preempted last."""
    return (sequence.request.priority, sequence.arrival, sequence.choice)


def turn(sequence: Sequence) -> tuple[bool, bool, tuple[int, int, int]]:
    """Order of waiting: those that hold their KV (they need only a place), then interrupted streams, then the rest."""
    return (not sequence.block_ids, not sequence.is_interrupted, rank(sequence))


class WaitingQueue:
    """Sequences without a place in the batch, in the order of their turns."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def head(self) -> Sequence | None:
        """Whose turn it is."""
        return self._sequences[0] if self._sequences else None

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence where its turn is; what its turn depends on must not change while it waits."""
        insort(self._sequences, sequence, key=turn)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it stands."""
        self._sequences.remove(sequence)
