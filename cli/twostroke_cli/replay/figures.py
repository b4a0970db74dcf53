"""What a replay comes to."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from twostroke_cli.bench.figures import Spread, spread
from twostroke_cli.bench.trace import Row
from twostroke_cli.replay.cluster import Outcome


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One policy on one cluster. Times in seconds."""

    policy: str
    prefill: int
    decode: int
    routers: int
    requests: int
    refused: int
    hit_share: float
    """Of all prompt tokens, those found in the cache of the worker that computed the prompt."""
    moves: float
    """How often a request was sent back by a worker, on average."""
    ttft_s: Spread | None
    itl_s: Spread | None
    """Over requests, each with the mean of its own."""
    goodput: float | None
    """Share of all requests, the refused included, that met the objectives; None if there are none."""


def figures_of(policy: str, sizes: tuple[int, int, int], outcomes: Sequence[Outcome], slo: dict[str, float]) -> Figures:
    """Figures of a replay on so many prefill workers, decode workers and routers."""
    prefill, decode, routers = sizes
    num_prompt_tokens = sum(outcome.prompt_len for outcome in outcomes)
    met = sum(meets(outcome, slo) for outcome in outcomes)
    return Figures(
        policy=policy,
        prefill=prefill,
        decode=decode,
        routers=routers,
        requests=len(outcomes),
        refused=sum(outcome.first_s is None for outcome in outcomes),
        hit_share=sum(outcome.hit_tokens for outcome in outcomes) / max(1, num_prompt_tokens),
        moves=sum(outcome.num_moves for outcome in outcomes) / max(1, len(outcomes)),
        ttft_s=spread(outcome.ttft_s for outcome in outcomes),
        itl_s=spread(outcome.itl_s for outcome in outcomes),
        goodput=met / max(1, len(outcomes)) if slo else None,
    )


def meets(outcome: Outcome, slo: dict[str, float]) -> bool:
    """Whether a request was answered in time: `ttft`, `itl` or `tpot` (here the same), `e2e`, in seconds."""
    if outcome.first_s is None or outcome.ended_s is None:
        return False
    itl_s = outcome.itl_s or 0.0
    measured = {"ttft": outcome.ttft_s, "itl": itl_s, "tpot": itl_s, "e2e": outcome.ended_s - outcome.arrived_s}
    return all((value := measured[name]) is not None and value <= limit for name, limit in slo.items())


def ideal_hit_share(rows: Sequence[Row], block_len: int) -> float:
    """Hits of one worker that forgets nothing and has had every earlier request."""
    seen: set[int] = set()
    hit = 0
    for row in rows:
        leading = next((at for at, block in enumerate(row.blocks) if block not in seen), len(row.blocks))
        hit += min(leading * block_len, row.prompt_len - 1)
        seen.update(row.blocks)
    return hit / max(1, sum(row.prompt_len for row in rows))
