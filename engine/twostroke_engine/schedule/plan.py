"""`StepPlan`: all a runner needs for one step. `StepOutput`: all it gives back. Pure data, msgpack.

A runner keeps what it was told before: a plan carries whole sequences only when they are new to the runner, and
afterwards only the blocks added. A sequence that was preempted is new again.
"""

from __future__ import annotations

import msgspec

from twostroke_engine.request import SamplingParams, TokenOut


class NewSequence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A sequence the runner does not know yet."""

    sequence_id: int
    choice: int = 0
    token_ids: tuple[int, ...]
    """Prompt and what was generated so far."""
    num_prompt_tokens: int
    sampling: SamplingParams
    block_ids: tuple[int, ...] = ()
    """Blocks it has already; those of `Scheduled.new_block_ids` come after them."""


class Scheduled(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What to compute of one sequence: tokens [start, start + count)."""

    sequence_id: int
    start: int
    count: int
    new_block_ids: tuple[int, ...] = ()
    choices: tuple[int, ...] = ()
    """Choices to sample from the last token's logits; empty while more of the prompt is to come. More than one only
    at the end of a prompt with n > 1: the others then arrive as `NewSequence`s that share its blocks."""
    sink_id: int = 0
    """Names the `KVSink` that hears of each finished layer; 0 is none."""


class BlockCopy(msgspec.Struct, frozen=True, array_like=True):
    """Copy block `source` to `target`, all layers, before anything else in the step."""

    source: int
    target: int


class StepPlan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step: drop `finished`, copy blocks, learn `new`, then compute `scheduled` as one batch."""

    step: int
    scheduled: tuple[Scheduled, ...] = ()
    new: tuple[NewSequence, ...] = ()
    finished: tuple[int, ...] = ()
    """Sequences the runner may forget (ended or preempted)."""
    copies: tuple[BlockCopy, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(entry.count for entry in self.scheduled)


class Sampled(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Tokens chosen for one scheduled sequence, one per entry of its `choices`, in that order."""

    sequence_id: int
    tokens: tuple[TokenOut, ...]
    finite: bool = True
    """False: the logits held NaN or infinity; the tokens mean nothing."""


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The runner's only output."""

    step: int
    sampled: tuple[Sampled, ...] = ()
