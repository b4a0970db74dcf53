"""`ActiveRequest`: a request while an engine has it. Its choices are `Sequence`s; this is what they have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from twostroke_engine.request import ErrorCode, Request, RequestFacts
from twostroke_engine.sequence import Sequence
from twostroke_engine.transfer.end import HandOffOutcome


@dataclass(slots=True)
class ActiveRequest:
    """Book-keeping of one request: who of its choices still runs, and what was measured."""

    request: Request
    arrived_s: float
    sink_id: int = 0
    """The hand-off's name at the sender; 0: the request runs to its end here."""
    facts: RequestFacts = field(default_factory=RequestFacts)
    """What was measured before the engine got it."""
    sequences: list[Sequence] = field(default_factory=list)
    first_token_s: float | None = None
    verdict: tuple[ErrorCode, str] | None = None
    """Why it must end, while a transfer still reads its blocks."""

    @property
    def live(self) -> list[Sequence]:
        """Choices that have not ended."""
        return [sequence for sequence in self.sequences if not sequence.is_ended]

    @property
    def deadline_s(self) -> float | None:
        """On the engine's clock."""
        left_s = self.request.deadline_s
        return None if left_s is None else self.arrived_s + left_s

    def add_outcome(self, outcome: HandOffOutcome) -> None:
        """Takes in what the sender measured."""
        self.facts = replace(
            self.facts,
            transfer_s=outcome.transfer_s,
            kv_bytes=outcome.kv_bytes,
            kv_segments=outcome.kv_segments,
            kv_resends=outcome.kv_resends,
            skipped_tokens=outcome.skipped_tokens,
        )

    def measured(self, now_s: float) -> RequestFacts:
        """All facts, with what this engine adds to those it was given."""
        started = [entry.started_s for entry in self.sequences if entry.started_s is not None]
        started_s = min(started, default=now_s)
        first_token_s = started_s if self.first_token_s is None else self.first_token_s
        return replace(
            self.facts,
            cached_tokens=self.facts.cached_tokens + max((entry.cached_tokens for entry in self.sequences), default=0),
            preemptions=self.facts.preemptions + sum(entry.preemptions for entry in self.sequences),
            queue_s=self.facts.queue_s + started_s - self.arrived_s,
            prefill_s=self.facts.prefill_s + first_token_s - started_s,
        )
