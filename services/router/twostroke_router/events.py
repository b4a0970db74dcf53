"""What a worker's stream tells the saga of a request."""

from __future__ import annotations

import msgspec
from twostroke_engine.request import ErrorCode, FinishReason, RequestFacts, TokenOut


class Destination(msgspec.Struct, frozen=True, kw_only=True):
    """A lease granted by a decode worker; the router only passes it on. Fields as KVDestination in types.proto."""

    worker_id: str
    endpoint: str
    lease_id: str
    epoch: int
    kv_fingerprint: str
    ttl_ms: int


class Delta(msgspec.Struct, frozen=True):
    """New tokens of one choice; `offset` counts generated tokens before them."""

    choice: int
    offset: int
    tokens: tuple[TokenOut, ...]
    finish: FinishReason | None = None


class Ended(msgspec.Struct, frozen=True):
    """The request is over on this worker; `error` is None if it ended well."""

    error: ErrorCode | None
    message: str
    facts: RequestFacts


class Stages(msgspec.Struct, frozen=True):
    """What passed on a worker before a token, in seconds; fields as StageTimes in worker.proto."""

    queue_s: float
    compute_s: float
    ready_s: float
    leaving_s: float


class Update(msgspec.Struct, frozen=True):
    """News of one request from one worker, in one message."""

    request_id: str
    worker_id: str
    deltas: tuple[Delta, ...] = ()
    reserved: Destination | None = None
    end: Ended | None = None
    stages: Stages | None = None
    held_s: float | None = None
    """Of a receipt: how long the worker had had the request when it said so."""
    sent_s: float | None = None
    """When this router sent the request there, on its monotonic clock."""
    read_s: float = 0.0
    """When this message was there to be read here."""
    unseen_s: float = 0.0
    """How long before that it may have come, at most: the event loop was at work."""


class Lost(msgspec.Struct, frozen=True):
    """The worker is gone, and its part of the request with it."""

    request_id: str
    worker_id: str
    reason: str


class DeadlinePassed(msgspec.Struct, frozen=True):
    """The request ran out of time."""


Event = Update | Lost | DeadlinePassed


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True):
    """How busy a worker is; fields as in worker.proto."""

    waiting: int = 0
    running: int = 0
    queued_tokens: int = 0
    blocks_total: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    blocks_leased: int = 0
    blocks_promised: int = 0
    leases_open: int = 0
    step_s: float = 0.0
    steps: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    kv_bytes: int = 0
    draining: bool = False
    longest_wait_s: float = 0.0
    digest_failures: int = 0
    kv_resends: int = 0
    kv_stale: int = 0
    kv_broken_pairs: int = 0
    kv_failed: int = 0
    kv_quarantined: int = 0
