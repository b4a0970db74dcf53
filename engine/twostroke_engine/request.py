"""What a request is, and the words for its life. Torch-free: the router imports this module too."""

from __future__ import annotations

from enum import Enum, IntEnum

import msgspec


class FinishReason(IntEnum):
    """Why a choice ended; the numbers are those of types.proto."""

    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 4


class ErrorCode(IntEnum):
    """Why a request failed; the numbers are those of worker.proto."""

    CANCELLED = 1
    INVALID = 2
    OVERLOADED = 3
    DEADLINE = 4
    TRANSFER = 5
    NUMERIC = 6
    DRAINING = 7
    INTERNAL = 8


class LifeEvent(Enum):
    """The named moments of a request's life; spans, metrics, chaos triggers and benchmark tables all use them."""

    RECEIVED = "received"
    ADMITTED = "admitted"
    PLACED = "placed"
    RESERVED = "reserved"
    PREFILL_QUEUED = "prefill_queued"
    PREFILL_STARTED = "prefill_started"
    PREFILL_FINISHED = "prefill_finished"
    FIRST_TOKEN = "first_token"
    TRANSFER_OPENED = "transfer_opened"
    SEGMENT_SENT = "segment_sent"
    TRANSFER_COMMITTED = "transfer_committed"
    DECODE_STARTED = "decode_started"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are chosen and when a choice stops. Ranges are checked by `check`, at the router's door."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps every token."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Relative to the best token's probability, after temperature."""
    repetition_penalty: float = 1.0
    """Over prompt and output: positive logits are divided by it, negative ones multiplied."""
    presence_penalty: float = 0.0
    """Subtracted once from every token that the output contains."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the output."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit)."""
    seed: int = 0
    """64 bits, unsigned. Sampling noise is a function of (seed, choice, position, token id) and of nothing else."""
    max_tokens: int = 16
    min_tokens: int = 0
    """End tokens and stop ids are masked before this many tokens were generated."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: no logprobs; k: the chosen token's and those of the k best."""

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on which tokens came before, beyond what the model makes of them."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request, created once at the router's door."""

    id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    """Choices; one prefill serves them all."""
    priority: int = 0
    """Smaller runs first."""
    deadline_s: float | None = None
    """Time left when the message that carries the request was made; never a wall-clock time."""
    tenant: str = ""
    cache_salt: bytes = b""
    """Keys the block hashes: requests share prefixes only within one salt."""
    adapter: str = ""
    traceparent: str = ""

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt in tokens."""
        return len(self.token_ids)


class TokenOut(msgspec.Struct, frozen=True, array_like=True):
    """One generated token; `logprob` is NaN-free and meaningful only if logprobs were asked for."""

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), most likely first."""


class RequestFacts(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the engine measured of one request, as durations of one clock; fields as in worker.proto."""

    cached_tokens: int = 0
    preemptions: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    kv_bytes: int = 0
    kv_segments: int = 0
    kv_resends: int = 0
    skipped_tokens: int = 0
    commit_wait_s: float = 0.0
    commit_ack_s: float = 0.0
    ready_s: float = 0.0
