"""What became of one request, and of a run of many: the raw figures, as the JSON file holds them."""

from __future__ import annotations

from itertools import accumulate

import msgspec


class Outcome(msgspec.Struct, omit_defaults=True):
    """One request. Times are seconds; those that end in `_at_s` count from the begin of the run."""

    number: int
    due_at_s: float
    """When it was to be sent: open loop by the schedule, closed loop when its client was free."""
    sent_at_s: float
    end_at_s: float = 0.0
    request_id: str = ""
    status: int = 0
    """Of HTTP; 0: there was no answer."""
    error: str = ""
    """Kind of failure; empty: answered whole."""
    message: str = ""
    """The beginning of what the server said about it."""
    ttft_s: float | None = None
    """From `due_at_s` to the first text."""
    e2e_s: float | None = None
    """From `due_at_s` to the end of the answer."""
    gaps_s: list[float] = []
    """Between one piece of text and the next."""
    num_pieces: int = 0
    """Pieces of text that came."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    """Of the server's `usage`; None where it sent none."""
    finish_reason: str = ""

    @property
    def lateness_s(self) -> float:
        """How long after it was due it was sent: the client's own delay."""
        return self.sent_at_s - self.due_at_s

    @property
    def piece_times_s(self) -> list[float]:
        """When each piece of text came, after the begin of the run."""
        if self.ttft_s is None:
            return []
        return list(accumulate(self.gaps_s, initial=self.due_at_s + self.ttft_s))

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer: by `usage`, else one for each piece."""
        return self.num_pieces if self.completion_tokens is None else self.completion_tokens

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first."""
        if self.ttft_s is None or self.e2e_s is None or self.num_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_tokens - 1)


class Run(msgspec.Struct):
    """One load on one server."""

    target: str
    round: int
    begin_unix_s: float
    duration_s: float
    """From the begin to the end of the last request."""
    outcomes: list[Outcome]
