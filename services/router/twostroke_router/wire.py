"""worker.proto <-> the router's structs. Generated types stop here."""

from __future__ import annotations

import math
from typing import NamedTuple

from twostroke_engine.request import ErrorCode, FinishReason, Request, RequestFacts, SamplingParams, TokenOut
from twostroke_proto.v1 import types_pb2, worker_pb2

from twostroke_router.events import Delta, Destination, Ended, Stages, Update, WorkerLoad

PROTOCOL_VERSION = 1


class Reading(NamedTuple):
    """When a message was there, on the monotonic clock, and how much earlier at most."""

    at_s: float
    unseen_s: float


_UNREAD = Reading(0.0, 0.0)


def sampling_to_proto(sampling: SamplingParams) -> types_pb2.SamplingParams:
    """Every field is set: the router's defaults are the request's."""
    return types_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        ignore_eos=sampling.ignore_eos,
        logprobs=sampling.logprobs,
    )


def request_to_proto(request: Request, left_s: float | None) -> worker_pb2.EngineRequest:
    """The request as it is sent; `left_s` is the time left now, None without a deadline."""
    return worker_pb2.EngineRequest(
        id=request.id,
        token_ids=request.token_ids,
        sampling=sampling_to_proto(request.sampling),
        n=request.n,
        priority=request.priority,
        # 0 means no deadline on the wire, so a deadline that has just passed is sent as 1 ms.
        deadline_ms=0 if left_s is None else max(1, min(math.ceil(left_s * 1000), 2**32 - 1)),
        tenant=request.tenant,
        cache_salt=request.cache_salt,
        adapter=request.adapter,
    )


def submit_to_proto(
    request: Request, destination: Destination | None, left_s: float | None
) -> worker_pb2.RouterMessage:
    """Run a request, or prefill it for a destination."""
    return worker_pb2.RouterMessage(
        submit=worker_pb2.Submit(
            request=request_to_proto(request, left_s),
            destination=_destination_to_proto(destination) if destination else None,
            traceparent=request.traceparent,
        )
    )


def reserve_to_proto(request: Request, ttl_s: float, left_s: float | None) -> worker_pb2.RouterMessage:
    """Promise capacity for a request."""
    return worker_pb2.RouterMessage(
        reserve=worker_pb2.Reserve(
            request=request_to_proto(request, left_s), ttl_ms=int(ttl_s * 1000), traceparent=request.traceparent
        )
    )


def cancel_to_proto(request_id: str, reason: str) -> worker_pb2.RouterMessage:
    """End a request."""
    return worker_pb2.RouterMessage(cancel=worker_pb2.Cancel(request_id=request_id, reason=reason))


def hello_to_proto(router_id: str, resume: dict[str, list[int]]) -> worker_pb2.RouterMessage:
    """Opens or resumes a stream."""
    resumes = [worker_pb2.Resume(request_id=key, next_offsets=offsets) for key, offsets in resume.items()]
    hello = worker_pb2.RouterHello(router_id=router_id, version=PROTOCOL_VERSION, resume=resumes)
    return worker_pb2.RouterMessage(hello=hello)


def _destination_to_proto(destination: Destination) -> types_pb2.KVDestination:
    return types_pb2.KVDestination(
        worker_id=destination.worker_id,
        endpoint=destination.endpoint,
        lease_id=destination.lease_id,
        epoch=destination.epoch,
        kv_fingerprint=destination.kv_fingerprint,
        ttl_ms=destination.ttl_ms,
    )


def _destination_from_proto(message: types_pb2.KVDestination) -> Destination:
    return Destination(
        worker_id=message.worker_id,
        endpoint=message.endpoint,
        lease_id=message.lease_id,
        epoch=message.epoch,
        kv_fingerprint=message.kv_fingerprint,
        ttl_ms=message.ttl_ms,
    )


def _token(message: types_pb2.Token) -> TokenOut:
    top = tuple((each.token_id, each.logprob) for each in message.top) if message.top else ()
    return TokenOut(message.id, message.logprob, top)


def _delta(message: worker_pb2.ChoiceDelta) -> Delta:
    finish = FinishReason(message.finish) if message.finish else None
    return Delta(message.choice, message.offset, tuple(map(_token, message.tokens)), finish)


def _error(code: int) -> ErrorCode | None:
    if not code:
        return None
    try:
        return ErrorCode(code)
    except ValueError:
        return ErrorCode.INTERNAL  # a code of a later version


def _ended(message: worker_pb2.RequestEnd) -> Ended:
    facts = message.facts
    return Ended(
        _error(message.error),
        message.message,
        RequestFacts(
            cached_tokens=facts.cached_tokens,
            preemptions=facts.preemptions,
            queue_s=facts.queue_s,
            prefill_s=facts.prefill_s,
            transfer_s=facts.transfer_s,
            kv_bytes=facts.kv_bytes,
            kv_segments=facts.kv_segments,
            kv_resends=facts.kv_resends,
            skipped_tokens=facts.skipped_tokens,
            commit_wait_s=facts.commit_wait_s,
            commit_ack_s=facts.commit_ack_s,
            ready_s=facts.ready_s,
        ),
    )


def _stages(message: worker_pb2.StageTimes) -> Stages:
    return Stages(message.queue_s, message.compute_s, message.ready_s, message.leaving_s)


def update_from_proto(
    message: worker_pb2.RequestUpdate, worker_id: str, sent_s: float | None = None, reading: Reading = _UNREAD
) -> Update:
    """News of one request, which was sent at this time of the monotonic clock."""
    return Update(
        message.request_id,
        worker_id,
        tuple(map(_delta, message.deltas)),
        _destination_from_proto(message.reserved) if message.HasField("reserved") else None,
        _ended(message.end) if message.HasField("end") else None,
        _stages(message.stages) if message.HasField("stages") else None,
        message.receipt.held_s if message.HasField("receipt") else None,
        sent_s,
        reading.at_s,
        reading.unseen_s,
    )


def load_from_proto(message: worker_pb2.WorkerLoad) -> WorkerLoad:
    """A worker's load."""
    return WorkerLoad(**{name: getattr(message, name) for name in WorkerLoad.__struct_fields__})
