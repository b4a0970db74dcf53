"""What a service tells its engine, and what the engine reports back. Pure data, msgpack: the two are processes.

Inbox messages may come in any order; unknown request ids are ignored. The outbox carries one `StepReport` per engine
step that has news, and `EngineReady` once, first. Peer messages do not wait for a step's end (KV is sent layer by
layer): a report between two steps may carry nothing else. Torch-free.
"""

from __future__ import annotations

import msgspec

from twostroke_engine.kv.spec import KVSpec
from twostroke_engine.request import ErrorCode, FinishReason, Request, RequestFacts, TokenOut
from twostroke_engine.transfer.messages import KVDestination, ReceiverMessage, SenderMessage

# ---- inbox -----------------------------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """Run a request to its end, or, with a destination, up to its first token and push its KV there."""

    request: Request
    destination: KVDestination | None = None
    received_s: float | None = None
    """When it came to this host, on the host's monotonic clock, which service and engine share; None: now."""


class Reserve(msgspec.Struct, frozen=True, kw_only=True, tag="reserve"):
    """Promise KV capacity for a request that another worker prefills; answered by `RequestUpdate.reserved`."""

    request: Request
    ttl_s: float


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """End a request in whatever phase it is; answered by `RequestUpdate.end`, unless it is unknown."""

    request_id: str
    reason: str = ""


class PeerMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="peer"):
    """A transfer control message from (inbox) or for (outbox) a peer.

    `peer` is a decode worker's Transfer endpoint on the prefill side, and a name the service gave an incoming stream
    on the decode side.
    """

    peer: str
    message: SenderMessage | ReceiverMessage
    received_s: float | None = None
    """Of one that came: when it was at this host, on the host's monotonic clock."""


class PeerLost(msgspec.Struct, frozen=True, kw_only=True, tag="peer_lost"):
    """A peer's control stream ended; everything open with it must be cleaned up. A later stream is a new pair."""

    peer: str
    reason: str = ""


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """End the engine's thread; running requests are dropped."""


InboxMessage = Submit | Reserve | Cancel | PeerMessage | PeerLost | Stop

# ---- outbox ----------------------------------------------------------------------------------------------------------


class ChoiceDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one choice; `offset` counts generated tokens before them."""

    choice: int
    offset: int
    tokens: tuple[TokenOut, ...]
    finish: FinishReason | None = None


class RequestEnd(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The end of a request on this worker. `message` is one line that may be shown to a client."""

    error: ErrorCode | None = None
    message: str = ""
    facts: RequestFacts


class LeaseGrant(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's part of a `KVDestination`; the service adds who and where."""

    lease_id: str
    epoch: int
    ttl_s: float


class StageTimes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What passed before a request's first token here; on a colocated worker again for its second."""

    queue_s: float = 0.0
    """From the request's arrival (after a transfer: from the last of its KV) until it was first scheduled."""
    compute_s: float = 0.0
    """From there to the token; for a second token from the first one."""
    ready_s: float = 0.0
    """After a transfer: from the sender's commit to the last of the KV."""
    made_s: float
    """When the token was there, on the host's monotonic clock: how long it takes to leave is the service's to say."""


class RequestUpdate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """News of one request."""

    request_id: str
    deltas: tuple[ChoiceDelta, ...] = ()
    reserved: LeaseGrant | None = None
    end: RequestEnd | None = None
    stages: StageTimes | None = None
    """Comes with the token that it is about."""


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How busy the engine is; fields as WorkerLoad in worker.proto (its `draining` is the service's)."""

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
    longest_wait_s: float = 0.0
    digest_failures: int = 0
    kv_resends: int = 0
    kv_stale: int = 0
    kv_broken_pairs: int = 0
    kv_failed: int = 0
    kv_quarantined: int = 0


class BlockEvents(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Changes of the prefix cache since the last report: hashes that can now be hit, and that no longer can."""

    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()


class StepReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="report"):
    """Everything one step has to say."""

    step: int
    load: EngineLoad
    requests: tuple[RequestUpdate, ...] = ()
    peers: tuple[PeerMessage, ...] = ()
    blocks: BlockEvents | None = None


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The model is loaded; what others must know of it."""

    kv_spec: KVSpec
    num_blocks: int
    max_model_len: int
    """Most tokens a request may have; never more than the pool holds."""
    model_fingerprint: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    tokenizer_hash: str = ""
    """Of tokenizer.json; empty if the folder has none."""
    channels: tuple[str, ...] = ()
    """What its KV channels tell peers, best first; see `transfer/channel.py`."""


class EngineFailed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The engine cannot start or go on; `message` is one clear line."""

    message: str


OutboxMessage = EngineReady | StepReport | EngineFailed
