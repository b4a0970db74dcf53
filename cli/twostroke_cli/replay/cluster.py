"""What a replay simulates, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from twostroke_cli.replay.worker import Limits, StepTimes


class Delays(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How late news is, in seconds."""

    message_s: float = 0.001
    """Between a router and a worker, either way."""
    index_s: float = 0.1
    """From a change of a prefix cache to every router, through Redis."""
    snapshot_s: float = 10.0
    """How often routers ask the workers themselves while Redis is away."""
    move_s: float = 2e-6
    """What handing over one prompt token adds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The workers and routers of a replay.

    Without decode workers requests end with their first token; without prefill workers they run colocated.
    """

    prefill: int
    decode: int
    routers: int = 1
    times: StepTimes = field(default_factory=StepTimes)
    limits: Limits = field(default_factory=Limits)
    delays: Delays = field(default_factory=Delays)
    redis_away: tuple[float, float] | None = None
    """From when until when, in seconds of the trace."""

    @property
    def num_workers(self) -> int:
        """Prefill workers first, then decode workers."""
        return self.prefill + self.decode


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times in seconds."""

    prompt_len: int
    output_len: int
    arrived_s: float
    hit_tokens: int = 0
    num_moves: int = 0
    """How often a worker sent it back, because its queue was longer than the router knew."""
    first_s: float | None = None
    ended_s: float | None = None

    @property
    def ttft_s(self) -> float | None:
        """Arrival to the first token; None: refused."""
        return None if self.first_s is None else self.first_s - self.arrived_s

    @property
    def itl_s(self) -> float | None:
        """Mean time between tokens; None: refused, or one token."""
        if self.first_s is None or self.ended_s is None or self.output_len < 2:
            return None
        return (self.ended_s - self.first_s) / (self.output_len - 1)

    def meets(self, ttft_s: float, itl_s: float) -> bool:
        """Whether it was answered, and in time."""
        return self.ttft_s is not None and self.ttft_s <= ttft_s and (self.itl_s or 0.0) <= itl_s
