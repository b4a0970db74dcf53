"""What a router can say of a request that has ended: where it ran, why there, and where its time went.

The shape is an interface: `GET /requests`, `twostroke explain` and the live page read it. Prompts and answers are no
part of it.
"""

from __future__ import annotations

import msgspec

from twostroke_router.waterfall import Waterfall


class PlacementFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Where the request ran, by worker id."""

    prefill: str | None = None
    decode: str | None = None
    reason: str = ""
    expected_hit_tokens: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens billed."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Waterfalls(msgspec.Struct, frozen=True, kw_only=True):
    """Both waterfalls; None for a token that never came."""

    ttft: Waterfall | None = None
    second_token: Waterfall | None = None


class TransferFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What moved between the workers."""

    kv_bytes: int = 0
    kv_segments: int = 0
    kv_resends: int = 0
    skipped_tokens: int = 0


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """One request."""

    request_id: str
    trace_id: str
    endpoint: str
    arrived_unix_s: float
    outcome: str
    router_id: str
    retries: int = 0
    placement: PlacementFacts = PlacementFacts()
    usage: Usage = Usage()
    ttft_s: float | None = None
    second_token_s: float | None = None
    itl_s: float | None = None
    e2e_s: float | None = None
    waterfalls: Waterfalls = Waterfalls()
    transfer: TransferFacts = TransferFacts()
    preemptions: int = 0
    first_token_worker: str | None = None
    token_worker: str | None = None


class Entry(msgspec.Struct, frozen=True):
    """An explanation and whose request it was; the tenant is not shown."""

    tenant: str
    explanation: Explanation
