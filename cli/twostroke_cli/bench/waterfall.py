"""Where the time of a run's requests went, as the router explains it: the mean of each stage."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import msgspec

LIMIT = 1000
"""Most requests that a router tells of at once, the newest; of longer runs these are a sample."""
TRIES, PAUSE_S = 5, 0.3
NAMES = ("ttft", "second_token")
Explanation = Mapping[str, Any]
"""Of one request, as `GET /requests` has it."""


class Stage(msgspec.Struct, frozen=True):
    """One stage, its seconds as a mean over the requests."""

    stage: str
    seconds: float


class Waterfall(msgspec.Struct, frozen=True):
    """The stages of one latency, in order; they add up to `total_s`."""

    name: str
    """`ttft` or `second_token`."""
    requests: int
    total_s: float
    stages: list[Stage]


def explanations_of(base_url: str, headers: Mapping[str, str], id_prefix: str, expected: int) -> list[Explanation]:
    """What a Twostroke router says of the requests whose ids begin with `id_prefix`; nothing of any other server.

    A router may write of a request a moment after its client has the answer: asked again until `expected` are there.
    """
    found: list[Explanation] = []
    for _ in range(TRIES):
        told = _fetch(base_url.removesuffix("/v1") + "/requests", headers)
        if told is None:
            return []
        found = [each for each in told if str(each.get("request_id", "")).startswith(f"{id_prefix}-")]
        if len(found) >= min(expected, LIMIT):
            break
        time.sleep(PAUSE_S)
    return found


def _fetch(url: str, headers: Mapping[str, str]) -> list[Explanation] | None:
    try:
        response = httpx.get(url, params={"limit": LIMIT}, headers=dict(headers), timeout=60, trust_env=False)
        found = response.json()["requests"] if response.is_success else None
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, list) else None


def mean_waterfalls(explanations: Sequence[Explanation]) -> list[Waterfall]:
    """Each latency's stages, where there are any."""
    return [waterfall for name in NAMES if (waterfall := _mean(name, explanations))]


def _mean(name: str, explanations: Sequence[Explanation]) -> Waterfall | None:
    found = [one for each in explanations if (one := (each.get("waterfalls") or {}).get(name))]
    if not found:
        return None
    sums: dict[str, float] = {}
    for one in found:
        for stage in one["stages"]:
            sums[stage["stage"]] = sums.get(stage["stage"], 0.0) + stage["seconds"]
    stages = [Stage(stage, round(seconds / len(found), 6)) for stage, seconds in sums.items()]
    return Waterfall(name, len(found), round(sum(one["total_s"] for one in found) / len(found), 6), stages)
