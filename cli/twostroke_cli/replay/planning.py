"""How many workers a trace needs: the fewest, and the best parting of them, whose replay meets the objectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from twostroke_cli.errors import CommandError
from twostroke_cli.replay.figures import Figures

Try = Callable[[int, int], Figures]
"""The figures of so many prefill and decode workers."""

MOST_WORKERS = 4096


@dataclass
class Plan:
    """Searches, and remembers every replay it made."""

    replay: Try
    share: float
    """Of the requests, so many must meet the objectives."""

    def __post_init__(self) -> None:
        self.tried: dict[tuple[int, int], Figures] = {}

    def fewest(self) -> Figures:
        """The smallest cluster that is enough; of equals, the one with the best goodput.

        Raises:
            CommandError: not even `MOST_WORKERS` are: the objectives cannot be met by adding workers.
        """
        enough = 1
        while not self._is_enough(enough):
            enough *= 2
            if enough > MOST_WORKERS:
                raise CommandError(f"--plan: {MOST_WORKERS} workers do not meet the objectives either")
        too_few = enough // 2
        while enough - too_few > 1:
            middle = (enough + too_few) // 2
            if self._is_enough(middle):
                enough = middle
            else:
                too_few = middle
        return self._best(enough)

    def _is_enough(self, num_workers: int) -> bool:
        return (self._best(num_workers).goodput or 0.0) >= self.share

    def _best(self, num_workers: int) -> Figures:
        return max((self._try(prefill, num_workers - prefill) for prefill in _partings(num_workers)), key=_goodput)

    def _try(self, prefill: int, decode: int) -> Figures:
        if (prefill, decode) not in self.tried:
            self.tried[prefill, decode] = self.replay(prefill, decode)
        return self.tried[prefill, decode]


def _partings(num_workers: int) -> Iterator[int]:
    """Prefill workers to try: none (colocated), and some six parts of the whole."""
    yield 0
    yield from sorted({round(num_workers * part / 7) for part in range(1, 7)} - {0, num_workers})


def _goodput(figures: Figures) -> float:
    return figures.goodput or 0.0
