"""worker.proto <-> the engine's structs. Generated types stop here.

What arrives is checked before the engine sees it: an engine serves many requests and must not fall over one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from twostroke_engine.messages import ChoiceDelta, EngineLoad, LeaseGrant, RequestEnd, RequestUpdate, StageTimes
from twostroke_engine.request import Request, SamplingParams, TokenOut
from twostroke_engine.transfer.messages import KVDestination
from twostroke_proto.v1 import types_pb2, worker_pb2

MAX_CHOICES = 128
MAX_LOGPROBS = 1024


class InvalidMessage(ValueError):
    """A message names something impossible; one line that names the field."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the loaded model allows."""

    vocab_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class LeaseHome:
    """This worker's part of a `KVDestination`."""

    worker_id: str
    endpoint: str
    kv_fingerprint: str


# ---- from the router -------------------------------------------------------------------------------------------------

_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("temperature", "a number >= 0", lambda value: value >= 0),
    ("top_k", ">= 0", lambda value: value >= 0),
    ("top_p", "in (0, 1]", lambda value: 0 < value <= 1),
    ("min_p", "in [0, 1)", lambda value: 0 <= value < 1),
    ("repetition_penalty", "> 0", lambda value: value > 0),
    ("presence_penalty", "in [-2, 2]", lambda value: -2 <= value <= 2),
    ("frequency_penalty", "in [-2, 2]", lambda value: -2 <= value <= 2),
    ("seed", ">= 0", lambda value: value >= 0),
    ("max_tokens", ">= 1", lambda value: value >= 1),
    ("logprobs", f"at most {MAX_LOGPROBS}", lambda value: value <= MAX_LOGPROBS),
)


def _require(is_fine: bool, field: str, what: str) -> None:
    if not is_fine:
        raise InvalidMessage(f"{field} must be {what}")


def sampling_from_proto(message: types_pb2.SamplingParams, limits: RequestLimits) -> SamplingParams:
    """Checked sampling parameters; absent ones take their defaults."""
    fields = {}
    for name, what, is_in_range in _RANGES:
        if message.HasField(name):  # type: ignore[arg-type]
            value = getattr(message, name)
            _require(math.isfinite(value) and is_in_range(value), f"sampling.{name}", what)
            fields[name] = value
    bias = tuple(sorted(message.logit_bias.items()))
    _require(all(token < limits.vocab_size for token, _ in bias), "sampling.logit_bias", "of known token ids")
    _require(all(math.isfinite(value) for _, value in bias), "sampling.logit_bias", "finite")
    _require(all(i < limits.vocab_size for i in message.stop_token_ids), "sampling.stop_token_ids", "known token ids")
    _require(not message.stop, "sampling.stop", "empty: stop strings are the router's")
    return SamplingParams(
        **fields,
        logit_bias=bias,
        min_tokens=message.min_tokens,
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
    )


def request_from_proto(message: worker_pb2.EngineRequest, traceparent: str, limits: RequestLimits) -> Request:
    """A checked request."""
    token_ids = tuple(message.token_ids)
    _require(bool(message.id), "request.id", "set")
    _require(bool(token_ids), "request.token_ids", "nonempty")
    _require(max(token_ids) < limits.vocab_size, "request.token_ids", f"below the vocabulary's {limits.vocab_size}")
    _require(
        len(token_ids) < limits.max_model_len, "request.token_ids", f"shorter than {limits.max_model_len}, the context"
    )
    _require(1 <= message.n <= MAX_CHOICES, "request.n", f"in [1, {MAX_CHOICES}]")
    return Request(
        id=message.id,
        token_ids=token_ids,
        sampling=sampling_from_proto(message.sampling, limits),
        n=message.n,
        priority=message.priority,
        deadline_s=message.deadline_ms / 1000 if message.deadline_ms else None,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        adapter=message.adapter,
        traceparent=traceparent,
    )


def destination_from_proto(message: types_pb2.KVDestination) -> KVDestination:
    """A checked destination."""
    for name in ("worker_id", "endpoint", "lease_id", "kv_fingerprint"):
        _require(bool(getattr(message, name)), f"destination.{name}", "set")
    return KVDestination(
        worker_id=message.worker_id,
        endpoint=message.endpoint,
        lease_id=message.lease_id,
        epoch=message.epoch,
        kv_fingerprint=message.kv_fingerprint,
        ttl_s=message.ttl_ms / 1000,
    )


# ---- to the router ---------------------------------------------------------------------------------------------------


def load_to_proto(load: EngineLoad, is_draining: bool) -> worker_pb2.WorkerLoad:
    """The engine's load; draining is the service's."""
    return worker_pb2.WorkerLoad(draining=is_draining, **msgspec.structs.asdict(load))


def update_to_proto(update: RequestUpdate, home: LeaseHome, now_s: float = 0.0) -> worker_pb2.RequestUpdate:
    """News of one request as it leaves now, on the host's clock; a granted lease becomes a destination at `home`."""
    return worker_pb2.RequestUpdate(
        request_id=update.request_id,
        deltas=[_delta_to_proto(delta) for delta in update.deltas],
        reserved=_grant_to_proto(update.reserved, home) if update.reserved else None,
        end=_end_to_proto(update.end) if update.end else None,
        stages=_stages_to_proto(update.stages, now_s) if update.stages else None,
    )


def receipt_to_proto(request_id: str, held_s: float) -> worker_pb2.RequestUpdate:
    """A submission has come, so long ago."""
    return worker_pb2.RequestUpdate(request_id=request_id, receipt=worker_pb2.Receipt(held_s=held_s))


def _stages_to_proto(stages: StageTimes, now_s: float) -> worker_pb2.StageTimes:
    return worker_pb2.StageTimes(
        queue_s=stages.queue_s,
        compute_s=stages.compute_s,
        ready_s=stages.ready_s,
        leaving_s=max(0.0, now_s - stages.made_s),
    )


def _delta_to_proto(delta: ChoiceDelta) -> worker_pb2.ChoiceDelta:
    return worker_pb2.ChoiceDelta(
        choice=delta.choice,
        offset=delta.offset,
        tokens=[_token_to_proto(token) for token in delta.tokens],
        finish=types_pb2.FinishReason.ValueType(delta.finish or 0),
    )


def _token_to_proto(token: TokenOut) -> types_pb2.Token:
    top = [types_pb2.TopLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top]
    return types_pb2.Token(id=token.id, logprob=token.logprob, top=top)


def _grant_to_proto(grant: LeaseGrant, home: LeaseHome) -> types_pb2.KVDestination:
    return types_pb2.KVDestination(
        worker_id=home.worker_id,
        endpoint=home.endpoint,
        lease_id=grant.lease_id,
        epoch=grant.epoch,
        kv_fingerprint=home.kv_fingerprint,
        ttl_ms=math.ceil(grant.ttl_s * 1000),
    )


def _end_to_proto(end: RequestEnd) -> worker_pb2.RequestEnd:
    return worker_pb2.RequestEnd(
        error=worker_pb2.ErrorCode.ValueType(end.error or 0),
        message=end.message,
        facts=worker_pb2.RequestFacts(**msgspec.structs.asdict(end.facts)),
    )
