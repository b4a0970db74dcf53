"""`Flight`: scheduled sequences whose next tokens a device is still choosing, perhaps a step ahead of the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from twostroke_engine.schedule.plan import Scheduled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from twostroke_engine.runner.sequence import RunnerSequence
    from twostroke_engine.runner.upload import Upload
    from twostroke_engine.sample.sampler import Choosing


@dataclass(frozen=True, slots=True)
class Flight:
    """What was launched: entries that are sampled, and the row of each one's first choice among the tokens."""

    entries: tuple[Scheduled, ...]
    sequences: tuple[RunnerSequence, ...]
    rows: tuple[int, ...]
    choosing: Choosing | None

    def split(
        self, scheduled: Sequence[Scheduled], sequences: Mapping[int, RunnerSequence]
    ) -> tuple[Flight, list[Scheduled]]:
        """(the part of a flight ahead that a plan asks for, the rest of the plan)."""
        if not self.entries:
            return self, list(scheduled)
        at_of = {entry.sequence_id: at for at, entry in enumerate(self.entries)}
        found, rest = [], []
        for entry in scheduled:
            at = at_of.get(entry.sequence_id)
            # A sequence that was preempted and came back is another one, though its id is the same.
            if at is None or self.sequences[at] is not sequences[entry.sequence_id] or not self._is(at, entry):
                rest.append(entry)
            else:
                found.append(at)
        return self._only(found), rest

    def own_token_ids(self, upload: Upload) -> Tensor:
        """The tokens, on the device, one for each entry."""
        assert self.choosing is not None, "nothing was launched"
        tokens = self.choosing.token_ids
        if len(self.rows) == len(tokens):
            return tokens
        return tokens[upload(np.array(self.rows, dtype=np.int64))]

    def _is(self, at: int, entry: Scheduled) -> bool:
        ahead = self.entries[at]
        return (entry.start, entry.count, entry.choices, entry.sink_id) == (ahead.start, 1, ahead.choices, 0)

    def _only(self, found: Sequence[int]) -> Flight:
        return Flight(
            tuple(self.entries[at] for at in found),
            tuple(self.sequences[at] for at in found),
            tuple(self.rows[at] for at in found),
            self.choosing,
        )


NOTHING = Flight((), (), (), None)
"""Nothing was launched."""


def following_step(flight: Flight, sequences: Mapping[int, RunnerSequence], block_size: int) -> tuple[Scheduled, ...]:
    """The decode step after a flight that only decodes; nothing if a sequence cannot go on before its token is known.

    That is one that is handed over, that several choices begin from, whose logits are adjusted by what was generated,
    or that has no block for its next token yet.
    """
    for entry, sequence in zip(flight.entries, flight.sequences, strict=True):
        has_block = (entry.start + 1) // block_size < len(sequence.blocks)
        if entry.count > 1 or entry.sink_id or entry.choices != (sequence.choice,) or not has_block:
            return ()
        if sequence.adjustments is not None or sequences.get(entry.sequence_id) is not sequence:
            return ()
    return tuple(
        Scheduled(sequence_id=entry.sequence_id, start=entry.start + 1, count=1, choices=entry.choices)
        for entry in flight.entries
    )
