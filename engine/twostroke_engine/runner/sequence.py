"""`RunnerSequence`: what the runner keeps of a sequence between steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from twostroke_engine.runner.growing import GrowingInts

if TYPE_CHECKING:
    from twostroke_engine.sample.logits import LogitAdjustments
    from twostroke_engine.schedule.plan import NewSequence


class RunnerSequence:
    """The runner's copy of a sequence's tokens, its blocks, and how it is sampled."""

    def __init__(self, new: NewSequence, adjustments: LogitAdjustments | None) -> None:
        self.choice = new.choice
        self.sampling = new.sampling
        self.num_prompt_tokens = new.num_prompt_tokens
        self.tokens = GrowingInts(new.token_ids)
        self.blocks = GrowingInts(new.block_ids)
        self.adjustments = adjustments

    def append_token(self, token_id: int) -> None:
        """A token was sampled for this sequence's own choice."""
        self.tokens.append(token_id)
        if self.adjustments is not None:
            self.adjustments.append(token_id)
