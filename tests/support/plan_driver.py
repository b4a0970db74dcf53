"""`PlanDriver`: plays the scheduler's part by hand, so that a runner can be tested alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from twostroke_engine.request import SamplingParams
from twostroke_engine.schedule.plan import BlockCopy, NewSequence, Sampled, Scheduled, StepPlan

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from twostroke_engine.runner.model_runner import LoadedModel

GREEDY = SamplingParams(temperature=0.0)


class RecordingSink:
    """Remembers the layers it heard of."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def layer_written(self, layer: int) -> None:
        self.layers.append(layer)


@dataclass
class Driven:
    """The driver's copy of a sequence."""

    id: int
    tokens: list[int]
    num_prompt_tokens: int
    choice: int
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0


@dataclass(frozen=True)
class Take:
    """Compute `count` more tokens of a sequence, and sample if `choices` are named."""

    sequence: Driven
    count: int
    choices: tuple[int, ...] = ()


class PlanDriver:
    """Gives out blocks in a shuffled order, so that nothing works by lying side by side."""

    def __init__(self, model: LoadedModel, seed: int = 0) -> None:
        self.model = model
        self.sink = RecordingSink()
        self._free = list(range(model.num_blocks))
        random.Random(seed).shuffle(self._free)
        self._new: list[NewSequence] = []
        self._finished: list[int] = []
        self._copies: list[BlockCopy] = []
        self._next_id = 1
        self._step = 0

    def add(
        self,
        tokens: Sequence[int],
        sampling: SamplingParams = GREEDY,
        num_prompt_tokens: int | None = None,
        choice: int = 0,
        blocks: Sequence[int] = (),
        num_computed: int = 0,
    ) -> Driven:
        """A sequence that the next step makes known to the runner."""
        num_prompt_tokens = len(tokens) if num_prompt_tokens is None else num_prompt_tokens
        sequence = Driven(self._next_id, list(tokens), num_prompt_tokens, choice, list(blocks), num_computed)
        self._next_id += 1
        self._announce(sequence, sampling)
        return sequence

    def preempt(self, sequence: Driven, sampling: SamplingParams = GREEDY) -> None:
        """Takes a sequence's blocks away and makes it new again, all in the next plan."""
        self.finish(sequence)
        sequence.num_computed = 0
        self._announce(sequence, sampling)

    def finish(self, sequence: Driven) -> None:
        """The next step drops the sequence; its blocks are free."""
        self._finished.append(sequence.id)
        self._free.extend(sequence.blocks)
        sequence.blocks = []

    def copy(self, source: int) -> int:
        """The next step copies a block; returns the copy's id."""
        target = self._free.pop()
        self._copies.append(BlockCopy(source, target))
        return target

    def step(self, *takes: Take) -> list[Sampled]:
        """Runs one plan and notes the sampled tokens of each sequence's own choice."""
        self._step += 1
        plan = StepPlan(
            step=self._step,
            scheduled=tuple(self._schedule(take) for take in takes),
            new=tuple(self._new),
            finished=tuple(self._finished),
            copies=tuple(self._copies),
        )
        self._new, self._finished, self._copies = [], [], []
        output = self.model.runner.execute(plan, self.sink)
        assert output.step == self._step
        by_id = {take.sequence.id: take.sequence for take in takes}
        for sampled in output.sampled:
            sequence = by_id[sampled.sequence_id]
            choices = next(entry.choices for entry in plan.scheduled if entry.sequence_id == sequence.id)
            if sequence.choice in choices:
                sequence.tokens.append(sampled.tokens[choices.index(sequence.choice)].id)
        return list(output.sampled)

    def prefill(self, sequence: Driven, chunks: Iterable[int] = (), choices: tuple[int, ...] | None = None) -> Sampled:
        """Computes what is left of the tokens, first in the given chunks, and samples at the end."""
        for count in chunks:
            assert self.step(Take(sequence, count)) == []
        left = len(sequence.tokens) - sequence.num_computed
        (sampled,) = self.step(Take(sequence, left, choices or (sequence.choice,)))
        return sampled

    def decode(self, sequence: Driven, num_tokens: int) -> list[Sampled]:
        """One token a step."""
        return [self.step(Take(sequence, 1, (sequence.choice,)))[0] for _ in range(num_tokens)]

    def _announce(self, sequence: Driven, sampling: SamplingParams) -> None:
        self._new.append(
            NewSequence(
                sequence_id=sequence.id,
                choice=sequence.choice,
                token_ids=tuple(sequence.tokens),
                num_prompt_tokens=sequence.num_prompt_tokens,
                sampling=sampling,
                block_ids=tuple(sequence.blocks),
            )
        )

    def _schedule(self, take: Take) -> Scheduled:
        sequence = take.sequence
        start = sequence.num_computed
        sequence.num_computed += take.count
        missing = -(-sequence.num_computed // self.model.spec.block_size) - len(sequence.blocks)
        new_blocks = [self._free.pop() for _ in range(max(0, missing))]
        sequence.blocks.extend(new_blocks)
        return Scheduled(
            sequence_id=sequence.id,
            start=start,
            count=take.count,
            new_block_ids=tuple(new_blocks),
            choices=take.choices,
        )
