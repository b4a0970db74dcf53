"""`PlanDraft`: a step's plan while it is being made."""

from __future__ import annotations

from collections.abc import Sequence as Items

from twostroke_engine.schedule.plan import BlockCopy, NewSequence, Scheduled, StepPlan
from twostroke_engine.sequence import Sequence


class PlanDraft:
    """Collects what a step computes, within a token budget."""

    def __init__(self, step: int, max_tokens: int, known: set[int], batch_invariant: bool = False) -> None:
        self._step = step
        self._batch_invariant = batch_invariant
        self._known = known
        self._scheduled: list[Scheduled] = []
        self._new: list[NewSequence] = []
        self.num_tokens_left = max_tokens

    @property
    def is_empty(self) -> bool:
        """Nothing is to be computed."""
        return not self._scheduled

    def add(self, sequence: Sequence, new_block_ids: Items[int] = ()) -> None:
        """Computes as much of a sequence as the budget allows; tells the runner all of it if it is new there."""
        count = min(self._num_wanted(sequence), self.num_tokens_left)
        if not count:
            return
        self.num_tokens_left -= count
        if sequence.sequence_id not in self._known:
            self._introduce(sequence)
            new_block_ids = ()
        self._scheduled.append(
            Scheduled(
                sequence_id=sequence.sequence_id,
                start=sequence.num_computed,
                count=count,
                new_block_ids=tuple(new_block_ids),
                choices=sequence.choices if count == sequence.num_remaining else (),
                sink_id=sequence.sink_id,
            )
        )

    def finish(self, finished: Items[int], copies: Items[BlockCopy]) -> StepPlan:
        """The plan, frozen."""
        return StepPlan(
            step=self._step,
            scheduled=tuple(self._scheduled),
            new=tuple(self._new),
            finished=tuple(finished),
            copies=tuple(copies),
        )

    def _num_wanted(self, sequence: Sequence) -> int:
        """Tokens that one step may compute; in batch-invariant mode what is left of the prompt, or one generated."""
        if not self._batch_invariant:
            return sequence.num_remaining
        return min(sequence.num_remaining, max(1, sequence.num_prompt_tokens - sequence.num_computed))

    def _introduce(self, sequence: Sequence) -> None:
        self._known.add(sequence.sequence_id)
        self._new.append(
            NewSequence(
                sequence_id=sequence.sequence_id,
                choice=sequence.choice,
                token_ids=tuple(sequence.token_ids),
                num_prompt_tokens=sequence.request.num_prompt_tokens,
                sampling=sequence.request.sampling,
                block_ids=tuple(sequence.block_ids),
            )
        )
