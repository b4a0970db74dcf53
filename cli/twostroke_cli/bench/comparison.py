"""Two targets under one workload: the ratio of each figure, and how sure of it one may be.

Bootstrap: rounds are drawn with replacement, then requests within them, the same numbers on both sides, since both were
asked the same. What 95 % of the ratios lie between is the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from twostroke_cli.bench.figures import meets
from twostroke_cli.bench.outcome import Outcome, Run

RESAMPLES = 400
CONFIDENCE = (2.5, 97.5)
Numbers = npt.NDArray[np.int64]


class Ratio(msgspec.Struct, frozen=True):
    """One figure of a target over that of the first one."""

    figure: str
    base: float
    value: float
    ratio: float
    low: float
    high: float
    is_more_better: bool

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if self.low <= 1 <= self.high:
            return "unclear"
        return "better" if (self.ratio > 1) == self.is_more_better else "worse"


class Comparison(msgspec.Struct, frozen=True):
    """A target against the first one."""

    target: str
    base: str
    rounds: int
    """With one round the interval knows of requests alone, not of how a server differs from run to run."""
    ratios: list[Ratio]


LATENCIES: dict[str, Callable[[Outcome], Sequence[float]]] = {
    "TTFT": lambda outcome: _one(outcome.ttft_s),
    "ITL": lambda outcome: outcome.gaps_s,
    "TPOT": lambda outcome: _one(outcome.tpot_s),
    "E2E": lambda outcome: _one(outcome.e2e_s),
}
RANKS = (50, 99)


def _one(value: float | None) -> Sequence[float]:
    return () if value is None else (value,)


class Side:
    """All requests of one target, one round after another; each may count several times, or not at all."""

    def __init__(self, runs: Sequence[Run], size: int, slo: dict[str, float]) -> None:
        outcomes = [outcome for run in runs for outcome in _by_number(run, size)]
        self._durations_s = np.array([run.duration_s for run in runs])
        self._latencies = {name: _sorted(outcomes, of) for name, of in LATENCIES.items()}
        counts: dict[str, Callable[[Outcome], float]] = {
            "output tokens/s": lambda outcome: outcome.num_tokens,
            "requests/s": lambda outcome: 1,
        }
        if slo:
            counts["goodput"] = lambda outcome: meets(outcome, slo)
        self._counts = {
            name: np.array([float(of(outcome)) if outcome else 0.0 for outcome in outcomes])
            for name, of in counts.items()
        }

    def figures(self, times: Numbers, round_times: Numbers) -> dict[str, float]:
        """Each figure where request i counts `times[i]` times and round r `round_times[r]`; NaN where there is none."""
        found: dict[str, float] = {}
        for name, (values, owners) in self._latencies.items():
            reached = np.cumsum(times[owners])
            found |= {f"{name} p{rank}": _percentile(values, reached, rank) for rank in RANKS}
        seconds = float(self._durations_s @ round_times)
        for name, counts in self._counts.items():
            found[name] = float(counts @ times) / seconds if seconds else float("nan")
        return found


def compare(base: Sequence[Run], other: Sequence[Run], slo: dict[str, float], seed: int = 0) -> Comparison:
    """Every figure that both have. Runs stand in the order of their rounds on both sides."""
    rounds = len(base)
    size = 1 + max((outcome.number for run in (*base, *other) for outcome in run.outcomes), default=0)
    sides = Side(base, size, slo), Side(other, size, slo)
    once = np.ones(rounds * size, np.int64), np.ones(rounds, np.int64)
    whole = [side.figures(*once) for side in sides]
    drawn: dict[str, list[float]] = {name: [] for name in whole[0]}
    source = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        picked = source.integers(rounds, size=rounds)
        numbers = picked[:, None] * size + source.integers(size, size=(rounds, size))
        times = np.bincount(numbers.ravel(), minlength=rounds * size), np.bincount(picked, minlength=rounds)
        below, above = (side.figures(*times) for side in sides)
        for name, ratios in drawn.items():
            ratios.append(_divided(above[name], below[name]))
    found = [_ratio(name, whole[0][name], whole[1][name], drawn[name]) for name in drawn]
    known = [ratio for ratio in found if ratio is not None]
    return Comparison(other[0].target, base[0].target, rounds, known)


def _by_number(run: Run, size: int) -> list[Outcome | None]:
    found: list[Outcome | None] = [None] * size
    for outcome in run.outcomes:
        found[outcome.number] = None if outcome.error else outcome
    return found


def _sorted(
    outcomes: Sequence[Outcome | None], of: Callable[[Outcome], Sequence[float]]
) -> tuple[npt.NDArray[np.float64], Numbers]:
    """Every value, ascending, and the place of the request that it belongs to."""
    pairs = [(value, place) for place, outcome in enumerate(outcomes) if outcome for value in of(outcome)]
    values, owners = np.array([value for value, _ in pairs], float), np.array([place for _, place in pairs], np.int64)
    order = np.argsort(values)
    return values[order], owners[order]


def _percentile(values: npt.NDArray[np.float64], reached: Numbers, rank: float) -> float:
    """Of ascending values, the first i + 1 of which stand for `reached[i]`; in between it interpolates."""
    if not reached.size or not reached[-1]:
        return float("nan")
    place = rank / 100 * (int(reached[-1]) - 1)
    low, high = values[np.searchsorted(reached, (math.floor(place), math.ceil(place)), "right")]
    return float(low + (high - low) * (place - math.floor(place)))


def _divided(value: float, base: float) -> float:
    return value / base if base else float("nan")


def _ratio(name: str, base: float, value: float, drawn: Sequence[float]) -> Ratio | None:
    """None where a side has no such figure, or nothing of it: there is no ratio to nothing."""
    known = [ratio for ratio in drawn if not np.isnan(ratio)]
    ratio = _divided(value, base)
    if not known or not ratio > 0:
        return None
    low, high = np.percentile(known, CONFIDENCE)
    base, value, ratio, low, high = (round(float(number), 6) for number in (base, value, ratio, low, high))
    return Ratio(name, base, value, ratio, low, high, is_more_better=" p" not in name)
