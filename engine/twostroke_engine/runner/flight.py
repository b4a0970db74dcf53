"""`Flight`: a step that was launched, whose tokens a device is still choosing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twostroke_engine.runner.sequence import RunnerSequence
    from twostroke_engine.sample.sampler import Choosing
    from twostroke_engine.schedule.plan import Scheduled


@dataclass(frozen=True, slots=True)
class Flight:
    """Entries that are sampled, and the row of each one's first choice among the tokens."""

    entries: tuple[Scheduled, ...]
    sequences: tuple[RunnerSequence, ...]
    rows: tuple[int, ...]
    choosing: Choosing | None
    """None: nothing is sampled."""

    def own_rows(self) -> dict[RunnerSequence, int]:
        """The row of each sequence's own choice, where it is one of those that are sampled."""
        return {
            sequence: row + entry.choices.index(sequence.choice)
            for entry, sequence, row in zip(self.entries, self.sequences, self.rows, strict=True)
            if sequence.choice in entry.choices
        }


NOTHING = Flight((), (), (), None)
"""No step, or one that samples nothing."""
