"""Which workers run a request: pure functions of the request's shape and a view of the cluster.

Cost is counted in tokens, so that waiting, computing and moving can be added up:

    prefill   queued tokens + tokens placed but not yet reported + prompt tokens not in its cache
    decode    SEQUENCE_TOKENS for each sequence that runs or waits, + queued tokens
              + MOVE_WEIGHT for each prompt token it does not hold
              + SHORTFALL_WEIGHT for each token of KV that it has no room for now
    colocated both, of one worker; its prompt is computed and not moved
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

SEQUENCE_TOKENS = 32
MOVE_WEIGHT = 0.125
SHORTFALL_WEIGHT = 4.0
GROWTH_TOKENS = 256
"""Output tokens that are counted as KV to come; requests often ask for more than they use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A connected worker that takes new work."""

    worker_id: str
    role: Literal["prefill", "decode"]
    model_fingerprint: str
    kv_fingerprint: str
    block_size: int
    max_model_len: int
    channels: tuple[str, ...]
    """KV channels; two workers can use one that both name, text for text."""
    tokenizer_hash: str = ""
    waiting: int = 0
    running: int = 0
    queued_tokens: int = 0
    blocks_available: int = 0
    """Free and evictable, less what is promised."""
    own_requests: int = 0
    """Placed here by this router, not yet part of the load above."""
    own_tokens: int = 0
    """Prompt tokens of those that are to be computed here."""
    own_blocks: int = 0
    hit_tokens: int = 0
    """Leading prompt tokens of this request in its prefix cache."""

    @property
    def kind(self) -> tuple[str, str, str]:
        """Only workers of one kind can hand KV over. Block sizes may differ: KV is converted on its way."""
        return (self.model_fingerprint, self.kv_fingerprint, self.tokenizer_hash)

    def hands_over_to(self, decode: Candidate) -> bool:
        """Whether KV can go from this worker to that one: they are of one kind, and have a channel in common."""
        return self.kind == decode.kind and not set(self.channels).isdisjoint(decode.channels)


@dataclass(frozen=True, slots=True)
class View:
    """The cluster as one request sees it."""

    candidates: tuple[Candidate, ...]
    turn: int = 0
    """Grows by one for each placement: breaks ties evenly."""


@dataclass(frozen=True, slots=True)
class RequestShape:
    """What placement needs to know of a request."""

    num_prompt_tokens: int
    max_tokens: int
    n: int = 1
    avoid: frozenset[str] = frozenset()
    """Workers that failed this request before: used only if there is no other."""


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


@dataclass(frozen=True, slots=True)
class _Scored:
    worker: Candidate
    cost: float


def prefill_cost(shape: RequestShape, worker: Candidate) -> float:
    """Tokens computed on this worker before the request's first token."""
    return worker.queued_tokens + worker.own_tokens + shape.num_prompt_tokens - worker.hit_tokens


def decode_cost(shape: RequestShape, worker: Candidate) -> float:
    """Token-equivalents of running the request's decode on this worker."""
    sequences = worker.running + worker.waiting + worker.own_requests
    kv_tokens = shape.num_prompt_tokens + shape.n * min(shape.max_tokens, GROWTH_TOKENS) - worker.hit_tokens
    room_tokens = max(0, worker.blocks_available - worker.own_blocks) * worker.block_size
    return (
        SEQUENCE_TOKENS * sequences
        + worker.queued_tokens
        + MOVE_WEIGHT * (shape.num_prompt_tokens - worker.hit_tokens)
        + SHORTFALL_WEIGHT * max(0, kv_tokens - room_tokens)
    )


def _colocated_cost(shape: RequestShape, worker: Candidate) -> float:
    return decode_cost(shape, worker) + worker.own_tokens + shape.num_prompt_tokens - worker.hit_tokens


def _fits(shape: RequestShape, worker: Candidate) -> bool:
    # Prefill makes one token; decode has to hold the whole.
    tokens = 1 if worker.role == "prefill" else shape.max_tokens
    return shape.num_prompt_tokens + tokens <= worker.max_model_len


def _fitting(shape: RequestShape, view: View, role: str) -> list[Candidate]:
    """Workers of a role that can hold the request, rotated by turn; those to avoid only if there is no other."""
    fitting = [worker for worker in view.candidates if worker.role == role and _fits(shape, worker)]
    fitting = [worker for worker in fitting if worker.worker_id not in shape.avoid] or fitting
    start = view.turn % len(fitting) if fitting else 0
    return fitting[start:] + fitting[:start]


def _best(workers: Iterable[Candidate], cost: Callable[[Candidate], float]) -> _Scored | None:
    return min((_Scored(worker, cost(worker)) for worker in workers), key=_cost, default=None)


def _cost(scored: _Scored) -> float:
    return scored.cost


def _groups(workers: Sequence[Candidate]) -> list[list[Candidate]]:
    """Workers that can hand over to, or take from, the same others."""
    groups: dict[tuple[object, ...], list[Candidate]] = defaultdict(list)
    for worker in workers:
        groups[(*worker.kind, *sorted(worker.channels))].append(worker)
    return list(groups.values())


def _best_pair(
    shape: RequestShape, prefills: Sequence[Candidate], decodes: Sequence[Candidate]
) -> tuple[_Scored, _Scored] | None:
    """The cheapest possible pair: within two groups the choices are independent."""
    pairs = []
    for givers, takers in product(_groups(prefills), _groups(decodes)):
        if givers[0].hands_over_to(takers[0]):
            prefill = min((_Scored(worker, prefill_cost(shape, worker)) for worker in givers), key=_cost)
            decode = min((_Scored(worker, decode_cost(shape, worker)) for worker in takers), key=_cost)
            pairs.append((prefill, decode))
    return min(pairs, key=lambda pair: pair[0].cost + pair[1].cost, default=None)


def place(shape: RequestShape, view: View) -> Placement | None:
    """Least loaded plus longest prefix: the cheapest workers by the costs above; None if no worker fits."""
    prefills, decodes = _fitting(shape, view, "prefill"), _fitting(shape, view, "decode")
    if shape.max_tokens == 1 and (alone := _best(prefills, lambda worker: prefill_cost(shape, worker))):
        return _prefill_only(alone.worker, f"one token, prefill cost {alone.cost:.0f}")
    if pair := _best_pair(shape, prefills, decodes):
        prefill, decode = pair
        reason = f"prefill cost {prefill.cost:.0f}, decode cost {decode.cost:.0f}"
        return Placement(prefill.worker.worker_id, decode.worker.worker_id, prefill.worker.hit_tokens, reason)
    if alone := _best(decodes, lambda worker: _colocated_cost(shape, worker)):
        return _colocated(alone.worker, f"no prefill worker fits, colocated cost {alone.cost:.0f}")
    return None


def round_robin(shape: RequestShape, view: View) -> Placement | None:
    """The null policy: workers in turn, whatever their load."""
    prefills, decodes = _fitting(shape, view, "prefill"), _fitting(shape, view, "decode")
    if shape.max_tokens == 1 and prefills:
        return _prefill_only(prefills[0], "round robin, one token")
    for decode in decodes:
        prefill = next((worker for worker in prefills if worker.hands_over_to(decode)), None)
        if prefill:
            return Placement(prefill.worker_id, decode.worker_id, prefill.hit_tokens, "round robin")
    return _colocated(decodes[0], "round robin, no prefill worker fits") if decodes else None


def _prefill_only(worker: Candidate, reason: str) -> Placement:
    return Placement(worker.worker_id, None, worker.hit_tokens, reason)


def _colocated(worker: Candidate, reason: str) -> Placement:
    return Placement(None, worker.worker_id, worker.hit_tokens, reason)


POLICIES: dict[str, Policy] = {"least-loaded": place, "round-robin": round_robin}
