"""What a run comes to: latencies as percentiles, rates, goodput, failures by kind, and what to be wary of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
import numpy as np

from twostroke_cli.bench.outcome import Outcome, Run
from twostroke_cli.errors import CommandError

LATE_S = 0.005
"""A client that is later than this ..."""
LATE_SHARE = 0.05
"""... and than this share of the median TTFT, at its 99th percentile, measures itself."""
SLO_NAMES = ("ttft", "itl", "tpot", "e2e")


class Spread(msgspec.Struct, frozen=True):
    """How a latency is spread, in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    most: float


class Goodput(msgspec.Struct, frozen=True):
    """Requests that met every objective. Those that were refused or failed did not."""

    slo: dict[str, float]
    """Longest `ttft`, `itl` (99th percentile of the request's own gaps), `tpot`, `e2e`, in seconds."""
    met: int
    share: float
    """Of all requests that were sent."""
    rate: float
    """Requests a second."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What one target did, over all its rounds."""

    target: str
    rounds: int
    requests: int
    answered: int
    errors: dict[str, int]
    duration_s: float
    request_rate: float
    """Answered requests a second."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    input_rate: float
    """Prompt tokens a second."""
    output_rate: float
    """Completion tokens a second."""
    token_source: Literal["usage", "pieces", "both"]
    """Whether tokens were counted by the server's `usage` or as pieces of text that came."""
    ttft_s: Spread | None
    itl_s: Spread | None
    tpot_s: Spread | None
    e2e_s: Spread | None
    lateness_s: Spread | None
    goodput: Goodput | None
    warnings: list[str]


def parse_slo(text: str) -> dict[str, float]:
    """`ttft=0.5,itl=0.05` as limits in seconds; nothing for an empty text.

    Raises:
        CommandError: a name is not known or a limit is no positive number.
    """
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            limit = float(value)
        except ValueError:
            limit = 0.0
        if name not in SLO_NAMES or not 0 < limit < float("inf"):
            raise CommandError(f"--slo {part}: expected NAME=SECONDS with a NAME of {', '.join(SLO_NAMES)}")
        found[name] = limit
    return found


def meets(outcome: Outcome, slo: dict[str, float]) -> bool:
    """Whether a request was answered in time in every way that is asked for. What could not be measured did not."""
    if outcome.error:
        return False
    gaps = outcome.gaps_s
    measured = {
        "ttft": outcome.ttft_s,
        "e2e": outcome.e2e_s,
        "itl": float(np.percentile(gaps, 99)) if gaps else 0.0,
        "tpot": outcome.tpot_s if outcome.num_tokens > 1 else 0.0,
    }
    return all((value := measured[name]) is not None and value <= limit for name, limit in slo.items())


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of those that are there; None of none."""
    found = np.array([value for value in values if value is not None])
    if not found.size:
        return None
    p50, p90, p99 = np.percentile(found, (50, 90, 99))
    rounded = (round(float(value), 6) for value in (found.mean(), p50, p90, p99, found.max()))
    return Spread(found.size, *rounded)


def summarize(target: str, runs: Sequence[Run], slo: dict[str, float]) -> Summary:
    """Everything about one target's runs."""
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    answered = [outcome for outcome in outcomes if not outcome.error]
    duration_s = sum(run.duration_s for run in runs) or 1e-9
    tokens = sum(outcome.num_tokens for outcome in answered)
    prompt_tokens = sum(outcome.prompt_tokens or 0 for outcome in answered)
    ttft_s = spread(outcome.ttft_s for outcome in answered)
    lateness_s = spread(outcome.lateness_s for outcome in outcomes)
    return Summary(
        target=target,
        rounds=len(runs),
        requests=len(outcomes),
        answered=len(answered),
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common()),
        duration_s=round(duration_s, 3),
        request_rate=round(len(answered) / duration_s, 4),
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(outcome.cached_tokens or 0 for outcome in answered),
        completion_tokens=tokens,
        input_rate=round(prompt_tokens / duration_s, 2),
        output_rate=round(tokens / duration_s, 2),
        token_source=_token_source(answered),
        ttft_s=ttft_s,
        itl_s=spread(gap for outcome in answered for gap in outcome.gaps_s),
        tpot_s=spread(outcome.tpot_s for outcome in answered),
        e2e_s=spread(outcome.e2e_s for outcome in answered),
        lateness_s=lateness_s,
        goodput=_goodput(outcomes, slo, duration_s),
        warnings=_warnings(outcomes, answered, ttft_s, lateness_s),
    )


def _token_source(answered: Sequence[Outcome]) -> Literal["usage", "pieces", "both"]:
    by_usage = sum(outcome.completion_tokens is not None for outcome in answered)
    if by_usage == len(answered):
        return "usage"
    return "both" if by_usage else "pieces"


def _goodput(outcomes: Sequence[Outcome], slo: dict[str, float], duration_s: float) -> Goodput | None:
    if not slo:
        return None
    met = sum(meets(outcome, slo) for outcome in outcomes)
    return Goodput(slo, met, round(met / max(1, len(outcomes)), 4), round(met / duration_s, 4))


def _warnings(
    outcomes: Sequence[Outcome], answered: Sequence[Outcome], ttft_s: Spread | None, lateness_s: Spread | None
) -> list[str]:
    found = []
    if lateness_s and lateness_s.p99 > max(LATE_S, LATE_SHARE * (ttft_s.p50 if ttft_s else 0.0)):
        found.append(
            f"the client itself was late: 1 % of the requests left {1000 * lateness_s.p99:.1f} ms or more after they "
            "were due; latencies include that; use more --processes or another machine"
        )
    if len(answered) < len(outcomes):
        found.append(f"{len(outcomes) - len(answered)} of {len(outcomes)} requests were not answered")
    if answered and _token_source(answered) != "usage":
        found.append("the server sent no usage: pieces of text are counted as tokens, which may hold more than one")
    pieces, tokens = (sum(getattr(o, name) for o in answered) for name in ("num_pieces", "num_tokens"))
    if pieces and tokens > 1.5 * pieces:
        found.append(
            f"{tokens / pieces:.1f} tokens came in one piece on average: ITL is between pieces, TPOT per token"
        )
    if len(answered) < 100:
        found.append(f"p99 of {len(answered)} answers is little more than the longest of them")
    return found
