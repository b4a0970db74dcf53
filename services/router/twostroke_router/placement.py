"""Which workers run a request: pure functions of the request's shape and a view of the cluster.

`cost`, the default, and `conditional` count the seconds that a placement adds to all requests, this one included:

    prefill    (queued tokens + prompt tokens not in its cache) x seconds per token
    decode     prompt tokens that wait there x seconds per token
               + prompt tokens it does not hold x MOVE_S
               + expected tokens x (step + sequences x seconds per sequence)      this request's own steps
               + expected tokens x sequences x seconds per sequence               what it adds to the others' steps
               + KV tokens that it has no room for now x SHORTFALL_S
    colocated  the same without the move
               + prompt tokens not in its cache x seconds per token x (1 + sequences)   their tokens wait for its prompt

Prefill and decode are chosen together. `conditional` chooses too whether to part them: a prompt that is short, or
mostly cached where it would be decoded, is computed there as soon as that adds less than the hand-off; `cost` parts
them wherever it can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from math import inf
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from twostroke_router.pools import Pool, View

MOVE_S = 2e-6
"""Seconds that handing over one prompt token adds: what is left of it beside the layers still being computed."""
SHORTFALL_S = 1e-3
_LAST_S = 1e9
GROWTH_TOKENS = 256
"""Output tokens that are counted on; requests often ask for more than they use."""


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What placement needs to know of a request."""

    num_prompt_tokens: int
    max_tokens: int
    n: int = 1
    avoid: frozenset[str] = frozenset()
    """Workers that failed this request before: used only if there is no other."""
    session: str = ""
    """Requests of one session prefer one place; empty: none."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request runs. Without `prefill` decode runs all of it; without `decode` it has one token only."""

    prefill: str | None
    decode: str | None
    expected_hit: int
    """Prompt tokens expected in the cache of the worker that computes the prompt."""
    reason: str


Policy = Callable[[RequestShape, View], Placement | None]
"""A placement, or None if no worker fits."""

Costs = npt.NDArray[np.float64]
"""One number a worker, shape [workers]."""


class Scores(NamedTuple):
    """What workers would cost; only the order matters, unless pairs and colocated workers are compared."""

    prefill: Costs
    decode: Costs
    colocated: Costs


class _Pick(NamedTuple):
    row: int
    cost: float


# ---- what it costs, in seconds ---------------------------------------------------------------------------------------


def added_seconds(shape: RequestShape, view: View) -> Scores:
    """The formulas of this module's docstring."""
    expected = shape.n * min(shape.max_tokens, GROWTH_TOKENS)
    prefill, decode = view.prefill, view.decode
    missing = shape.num_prompt_tokens - decode.hit_tokens
    steps_s = expected * (decode.step_s + 2 * decode.sequences * decode.sequence_s)
    steps_s += decode.queued_tokens * decode.token_s
    lacking = missing + expected - decode.free_tokens
    if (lacking > 0).any():
        steps_s += np.maximum(lacking, 0) * SHORTFALL_S
    return Scores(
        (prefill.queued_tokens + (shape.num_prompt_tokens - prefill.hit_tokens)) * prefill.token_s,
        steps_s + missing * MOVE_S,
        steps_s + missing * (1 + decode.sequences) * decode.token_s,
    )


# ---- choosing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lowest:
    """A policy: the workers of the lowest scores take the request."""

    name: str
    scores: Callable[[RequestShape, View], Scores]
    is_conditional: bool = False
    """Whether scores of a pair and of a colocated worker can be compared; else a pair is taken where there is one."""

    def __call__(self, shape: RequestShape, view: View) -> Placement | None:
        """A placement, or None if no worker fits."""
        scores = self.scores(shape, view)
        prefill = _among_fitting(scores.prefill, shape, view.prefill, 1)
        if shape.max_tokens == 1 and (alone := _least(prefill, view.turn)):
            return self._placement(view, alone, None)
        pair = _least_pair(prefill, _among_fitting(scores.decode, shape, view.decode, shape.max_tokens), view)
        if pair and not self.is_conditional:
            return self._placement(view, *pair)
        alone = _least(_among_fitting(scores.colocated, shape, view.decode, shape.max_tokens), view.turn)
        if pair and not (alone and alone.cost < pair[0].cost + pair[1].cost):
            return self._placement(view, *pair)
        return self._placement(view, None, alone) if alone else None

    def _placement(self, view: View, prefill: _Pick | None, decode: _Pick | None) -> Placement:
        computes, pool = (prefill, view.prefill) if prefill else (decode, view.decode)
        return Placement(
            view.prefill.ids[prefill.row] if prefill else None,
            view.decode.ids[decode.row] if decode else None,
            int(pool.hit_tokens[computes.row]) if computes else 0,
            f"{self.name}: {_reason(view, prefill, decode)}",
        )


def _among_fitting(costs: Costs, shape: RequestShape, pool: Pool, max_tokens: int) -> Costs:
    """Infinite where the request does not fit, or has failed while there are others."""
    num_tokens = shape.num_prompt_tokens + max_tokens
    if num_tokens > pool.shortest_len:
        costs = np.where(pool.max_model_len >= num_tokens, costs, np.inf)
    if shape.avoid:
        others = np.where([worker in shape.avoid for worker in pool.ids], np.inf, costs)
        costs = others if np.isfinite(others).any() else costs
    return costs


def _least(costs: Costs, turn: int) -> _Pick | None:
    """The lowest; among equals, the next in turn."""
    if not len(costs):
        return None
    start = turn % len(costs)
    row = start + int(costs[start:].argmin())
    if start and costs[earlier := int(costs[:start].argmin())] < costs[row]:
        row = earlier
    cost = float(costs[row])
    return _Pick(row, cost) if cost < inf else None


def _least_pair(prefill: Costs, decode: Costs, view: View) -> tuple[_Pick, _Pick] | None:
    """The cheapest pair that can hand over: between two kinds the choices are independent."""
    if view.hands_over.size == 1 and view.hands_over[0, 0]:
        givers, takers = _least(prefill, view.turn), _least(decode, view.turn)
        return (givers, takers) if givers and takers else None
    best = None
    for giver, taker in np.argwhere(view.hands_over):
        first = _least(np.where(view.prefill.kinds == giver, prefill, np.inf), view.turn)
        second = _least(np.where(view.decode.kinds == taker, decode, np.inf), view.turn)
        if first and second and (best is None or first.cost + second.cost < best[0].cost + best[1].cost):
            best = first, second
    return best


def _reason(view: View, prefill: _Pick | None, decode: _Pick | None) -> str:
    """Why, in words: each worker's score, what waits there, and what of the prompt it has."""
    parts = []
    for role, pick, pool in (("prefill", prefill, view.prefill), ("decode", decode, view.decode)):
        if pick:
            name = role if prefill else "colocated"
            load = f"{pool.queued_tokens[pick.row]:.0f} tokens queued, {pool.sequences[pick.row]:.0f} sequences"
            parts.append(f"{name} {pick.cost:.3g} ({load}, {pool.hit_tokens[pick.row]} cached)")
    return "; ".join(parts)


# ---- policies --------------------------------------------------------------------------------------------------------


def _equal(shape: RequestShape, view: View) -> Scores:
    prefill, decode = np.zeros(len(view.prefill)), np.zeros(len(view.decode))
    return Scores(prefill, decode, decode)


def _waiting(shape: RequestShape, view: View) -> Scores:
    """Seconds of work that wait there."""
    prefill, decode = (pool.queued_tokens * pool.token_s + pool.sequences * pool.sequence_s for pool in view)
    return Scores(prefill, decode, decode)


def _missing(shape: RequestShape, view: View) -> Scores:
    prefill, decode = ((shape.num_prompt_tokens - pool.hit_tokens).astype(np.float64) for pool in view)
    return Scores(prefill, decode, decode)


def _less_loaded_of_two(shape: RequestShape, view: View) -> Scores:
    """Mitzenmacher, "The power of two choices", 2001. The two are drawn by the turn: the choice stays a function."""
    waiting = _waiting(shape, view)
    drawn = np.random.default_rng(view.turn)
    for costs in waiting[:2]:
        if len(costs) > 2:
            costs[drawn.permutation(len(costs))[2:]] += _LAST_S  # only if neither of the two fits
    return waiting


def _session(shape: RequestShape, view: View) -> Scores:
    """Rendezvous hashing (Thaler and Ravishankar, 1996): a worker that leaves moves only its own sessions."""
    if not shape.session:
        return added_seconds(shape, view)
    prefill, decode = (np.array([_weight(shape.session, worker) for worker in pool.ids]) for pool in view)
    return Scores(prefill, decode, decode)


def _weight(session: str, worker: str) -> float:
    return float(int.from_bytes(blake2b(f"{session}\0{worker}".encode(), digest_size=6).digest(), "big"))


POLICIES: dict[str, Policy] = {
    "cost": Lowest("cost", added_seconds),
    "conditional": Lowest("conditional", added_seconds, is_conditional=True),
    "least-loaded": Lowest("least loaded", _waiting),
    "power-of-two": Lowest("power of two", _less_loaded_of_two),
    "prefix-only": Lowest("prefix only", _missing),
    "round-robin": Lowest("round robin", _equal),
    "session": Lowest("session", _session),
}
