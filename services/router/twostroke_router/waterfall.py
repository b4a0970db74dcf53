"""Where the time before a request's first token went, and before its second. Pure.

Every stage is made of durations, each measured by one clock: the router's or a worker's. None is the difference
of two hosts' clocks. What no one measured is a stage of its own, so that the stages of a waterfall add up to its total.

    ttft          admission, placement, reserve, prefill_queue, prefill_compute, return, unattributed
    second_token  transfer, decode_admission, first_step, unattributed

docs/observability.md says what each stage includes. A stage that a request does not have is absent, not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

UNATTRIBUTED = "unattributed"


class Stage(msgspec.Struct, frozen=True):
    """One part of a waterfall."""

    stage: str
    seconds: float


class Waterfall(msgspec.Struct, frozen=True):
    """Stages in order; they add up to the total."""

    total_s: float
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class TtftParts:
    """What was measured from a request's arrival to its first token; None where a stage does not exist."""

    admission_s: float
    placement_s: float
    reserve_s: float | None = None
    sending_s: float = 0.0
    """The router had the prompt ready to send until it did."""
    link_s: float = 0.0
    """A round trip to the worker that computes the prompt, measured with this very prompt."""
    queue_s: float | None = None
    compute_s: float | None = None
    leaving_s: float = 0.0
    """The token existed until its message left the worker."""
    reading_s: float = 0.0
    """The router had the message until it had taken the token in."""
    unseen_s: float = 0.0
    """How much longer it may have had it, at most: its event loop was at work and did not look."""


@dataclass(frozen=True, slots=True)
class SecondParts:
    """What was measured between the first two tokens; None where a stage does not exist."""

    hand_off_s: float | None = None
    """The first token existed until decode had the KV."""
    returning_s: float = 0.0
    """How much of the hand-off went by while the first token was on its way to the client."""
    admission_s: float | None = None
    step_s: float | None = None
    leaving_s: float = 0.0
    reading_s: float = 0.0
    slack_s: float = 0.0
    """The second token's way, by the round trip last measured, and how long the router may not have seen it."""


def ttft_waterfall(total_s: float, parts: TtftParts) -> Waterfall:
    """The time to the first token by stage."""
    known_s = sum(
        part or 0.0
        for part in (
            parts.admission_s,
            parts.placement_s,
            parts.reserve_s,
            parts.sending_s,
            parts.queue_s,
            parts.compute_s,
            parts.leaving_s,
            parts.reading_s,
        )
    )
    # The round trip was measured a moment before the token came: it may have been a slower one.
    link_s = min(parts.link_s, max(0.0, total_s - known_s))
    unseen_s = min(parts.unseen_s, max(0.0, total_s - known_s - link_s))
    way_s = link_s / 2
    queue_s = None if parts.queue_s is None else parts.sending_s + way_s + parts.queue_s
    return _waterfall(
        total_s,
        [
            ("admission", parts.admission_s),
            ("placement", parts.placement_s),
            ("reserve", parts.reserve_s),
            ("prefill_queue", queue_s),
            ("prefill_compute", parts.compute_s),
            ("return", None if parts.compute_s is None else way_s + parts.leaving_s + parts.reading_s + unseen_s),
        ],
    )


def second_token_waterfall(total_s: float, parts: SecondParts) -> Waterfall:
    """The gap between the first two tokens by stage."""
    transfer_s = None if parts.hand_off_s is None else max(0.0, parts.hand_off_s - parts.returning_s)
    step_s = None if parts.step_s is None else parts.step_s + parts.leaving_s + parts.reading_s
    if step_s is not None:
        left_s = total_s - (transfer_s or 0.0) - (parts.admission_s or 0.0) - step_s
        step_s += min(parts.slack_s, max(0.0, left_s))
    return _waterfall(
        total_s,
        [("transfer", transfer_s), ("decode_admission", parts.admission_s), ("first_step", step_s)],
    )


def _waterfall(total_s: float, measured: Sequence[tuple[str, float | None]]) -> Waterfall:
    """Trims what was measured to the total, the earliest stages first: they began before the time that is explained."""
    left_s, stages = total_s, []
    for name, seconds in reversed(measured):
        if seconds is not None:
            shown_s = min(max(0.0, seconds), left_s)
            stages.append(Stage(name, shown_s))
            left_s -= shown_s
    return Waterfall(total_s, (*reversed(stages), Stage(UNATTRIBUTED, max(0.0, left_s))))
