"""`ActiveRequest`: a request while an engine has it. Its choices are `Sequence`s; this is what they have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from twostroke_engine.messages import StageTimes
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
    num_stages_due: int = 1
    """Tokens still to come whose stages are told: the first one made here, and where both of the request's first two
    are made here, the second."""
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

    def token_made(self, now_s: float) -> StageTimes:
        """A token whose stages are due is there; says what passed before it."""
        self.num_stages_due -= 1
        if self.first_token_s is not None:
            return StageTimes(compute_s=now_s - self.first_token_s, made_s=now_s)
        self.first_token_s = now_s
        started_s = self._started_s(now_s)
        return StageTimes(
            queue_s=started_s - self.arrived_s,
            compute_s=now_s - started_s,
            ready_s=self.facts.ready_s,
            made_s=now_s,
        )

    def _started_s(self, now_s: float) -> float:
        started = [entry.started_s for entry in self.sequences if entry.started_s is not None]
        return min(started, default=now_s)

    def add_outcome(self, outcome: HandOffOutcome) -> None:
        """Takes in what the sender measured."""
        committed_s = outcome.committed_s
        has_both = committed_s is not None and self.first_token_s is not None
        self.facts = replace(
            self.facts,
            commit_wait_s=max(0.0, (committed_s or 0.0) - (self.first_token_s or 0.0)) if has_both else 0.0,
            commit_ack_s=outcome.closed_s - (committed_s or 0.0) if has_both else 0.0,
            transfer_s=outcome.transfer_s,
            kv_bytes=outcome.kv_bytes,
            kv_segments=outcome.kv_segments,
            kv_resends=outcome.kv_resends,
            skipped_tokens=outcome.skipped_tokens,
        )

    def measured(self, now_s: float) -> RequestFacts:
        """All facts, with what this engine adds to those it was given."""
        started_s = self._started_s(now_s)
        first_token_s = started_s if self.first_token_s is None else self.first_token_s
        return replace(
            self.facts,
            cached_tokens=self.facts.cached_tokens + max((entry.cached_tokens for entry in self.sequences), default=0),
            preemptions=self.facts.preemptions + sum(entry.preemptions for entry in self.sequences),
            queue_s=self.facts.queue_s + started_s - self.arrived_s,
            prefill_s=self.facts.prefill_s + first_token_s - started_s,
        )
