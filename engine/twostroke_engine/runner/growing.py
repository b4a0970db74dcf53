"""`GrowingInts`: a list of integers that numpy can read without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MIN_CAPACITY = 16


class GrowingInts:
    """Append-only int64 array; entries may be added to."""

    __slots__ = ("_data", "_len")

    def __init__(self, values: Sequence[int] = ()) -> None:
        self._len = len(values)
        self._data = np.zeros(max(MIN_CAPACITY, 2 * self._len), dtype=np.int64)
        self._data[: self._len] = values

    def __len__(self) -> int:
        return self._len

    def append(self, value: int) -> None:
        """Adds one entry at the end."""
        self._reserve(self._len + 1)
        self._data[self._len] = value
        self._len += 1

    def extend(self, values: Sequence[int]) -> None:
        """Adds entries at the end."""
        self._reserve(self._len + len(values))
        self._data[self._len : self._len + len(values)] = values
        self._len += len(values)

    def add(self, index: int, amount: int) -> None:
        """Adds to one entry."""
        self._data[index] += amount

    def at(self, index: int) -> int:
        """One entry.

        Raises:
            IndexError: there is none.
        """
        if index >= self._len:
            raise IndexError(f"entry {index} asked of {self._len}")
        return int(self._data[index])

    def view(self, start: int = 0, end: int | None = None) -> NDArray[np.int64]:
        """Entries [start, end); valid until the next append.

        Raises:
            IndexError: there are fewer than `end`.
        """
        end = self._len if end is None else end
        if end > self._len:
            raise IndexError(f"{end} entries asked of {self._len}")
        return self._data[start:end]

    def _reserve(self, size: int) -> None:
        if size > len(self._data):
            grown = np.zeros(2 * size, dtype=np.int64)
            grown[: self._len] = self._data[: self._len]
            self._data = grown
