"""The worker's spans of a request, made when it is over from what the engine measured.

A prefill worker makes `prefill` and `transfer`, a decode worker `decode`, and one that does both parts `prefill` and
`decode`. The engine tells durations and when a token was there; service and engine share a clock, so moments follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from twostroke_chassis.spans import Moment, SpanFacts, Tracing, Value
from twostroke_engine.messages import RequestEnd, Reserve, StageTimes, Submit
from twostroke_engine.request import ErrorCode, LifeEvent, RequestFacts


@dataclass(slots=True)
class _Begun:
    """A request that runs here."""

    traceparent: str
    received_s: float
    is_handed_over: bool = False
    """Decode goes on elsewhere."""
    is_taken_over: bool = False
    """Prefill was elsewhere."""
    granted_s: float | None = None
    stages: StageTimes | None = None


class RequestSpans:
    """Follows requests from their arrival to their end; `tracing` makes what comes of it."""

    def __init__(self, tracing: Tracing, worker_id: str) -> None:
        self._tracing = tracing
        self._worker_id = worker_id
        self._begun: dict[str, _Begun] = {}

    def begun(self, message: Submit | Reserve, received_s: float) -> None:
        """The engine is about to get a request."""
        request = message.request
        begun = _Begun(request.traceparent, received_s)
        begun.is_taken_over = isinstance(message, Reserve)
        begun.is_handed_over = isinstance(message, Submit) and message.destination is not None
        self._begun[request.id] = begun

    def granted(self, request_id: str, now_s: float) -> None:
        """Capacity was promised."""
        if begun := self._begun.get(request_id):
            begun.granted_s = now_s

    def stages(self, request_id: str, stages: StageTimes) -> None:
        """A first token was made here; what is told of a second one is in the metrics."""
        if (begun := self._begun.get(request_id)) and begun.stages is None:
            begun.stages = stages

    def ended(self, request_id: str, end: RequestEnd, now_s: float) -> None:
        """The request is over here."""
        begun = self._begun.pop(request_id, None)
        if begun is None:
            return
        for name, start_s, facts in self._spans(begun, request_id, end, now_s):
            self._tracing.add(name, begun.traceparent, start_s, facts)

    def _spans(
        self, begun: _Begun, request_id: str, end: RequestEnd, now_s: float
    ) -> Iterator[tuple[str, float, SpanFacts]]:
        who: dict[str, Value] = {"twostroke.worker.id": self._worker_id, "twostroke.worker.request_id": request_id}
        last = Moment(_last_event(end), now_s)
        error = "" if end.error in (None, ErrorCode.CANCELLED) else (end.message or _last_event(end))
        first_s = begun.stages.made_s if begun.stages else None
        if begun.is_taken_over:
            yield (
                "decode",
                begun.received_s,
                SpanFacts(
                    now_s, who | _decode_attributes(end.facts), [*_decode_moments(begun, end.facts), last], error
                ),
            )
            return
        prefill = SpanFacts(
            first_s or now_s,
            who | _prefill_attributes(end.facts),
            [*_prefill_moments(begun, end.facts), *([] if first_s else [last])],
            "" if first_s else error,
        )
        yield "prefill", begun.received_s, prefill
        if begun.is_handed_over and end.facts.transfer_s:
            moments = [*_transfer_moments(begun, end.facts, now_s), last]
            facts = SpanFacts(now_s, who | _transfer_attributes(end.facts), moments, error)
            yield "transfer", now_s - end.facts.transfer_s, facts
        elif first_s and not begun.is_handed_over:
            yield "decode", first_s, SpanFacts(now_s, who | _decode_attributes(end.facts), [last], error)


class NoSpans:
    """Nobody receives spans: nothing is remembered for them."""

    def begun(self, message: Submit | Reserve, received_s: float) -> None:
        """Does nothing."""

    def granted(self, request_id: str, now_s: float) -> None:
        """Does nothing."""

    def stages(self, request_id: str, stages: StageTimes) -> None:
        """Does nothing."""

    def ended(self, request_id: str, end: RequestEnd, now_s: float) -> None:
        """Does nothing."""


def _last_event(end: RequestEnd) -> str:
    if end.error is None:
        return LifeEvent.FINISHED.value
    event = LifeEvent.CANCELLED if end.error is ErrorCode.CANCELLED else LifeEvent.FAILED
    return str(event.value)


def _prefill_moments(begun: _Begun, facts: RequestFacts) -> Iterator[Moment]:
    yield Moment(LifeEvent.PREFILL_QUEUED.value, begun.received_s)
    if stages := begun.stages:
        yield Moment(LifeEvent.PREFILL_STARTED.value, stages.made_s - stages.compute_s)
        yield Moment(LifeEvent.PREFILL_FINISHED.value, stages.made_s)
        yield Moment(LifeEvent.FIRST_TOKEN.value, stages.made_s)
    elif facts.prefill_s:
        yield Moment(LifeEvent.PREFILL_STARTED.value, begun.received_s + facts.queue_s)


def _transfer_moments(begun: _Begun, facts: RequestFacts, now_s: float) -> Sequence[Moment]:
    moments = [Moment(LifeEvent.TRANSFER_OPENED.value, now_s - facts.transfer_s)]
    if begun.stages and facts.commit_ack_s:
        committed_s = begun.stages.made_s + facts.commit_wait_s
        moments.append(Moment(LifeEvent.TRANSFER_COMMITTED.value, committed_s))
    return moments


def _decode_moments(begun: _Begun, facts: RequestFacts) -> Iterator[Moment]:
    if begun.granted_s is not None:
        yield Moment(LifeEvent.RESERVED.value, begun.granted_s)
    if stages := begun.stages:
        started_s = stages.made_s - stages.compute_s
        ready_s = started_s - stages.queue_s
        yield Moment(LifeEvent.TRANSFER_OPENED.value, ready_s - facts.transfer_s)
        yield Moment(LifeEvent.TRANSFER_COMMITTED.value, ready_s)
        yield Moment(LifeEvent.DECODE_STARTED.value, started_s)


def _prefill_attributes(facts: RequestFacts) -> dict[str, Value]:
    return {"twostroke.cached_tokens": facts.cached_tokens, "twostroke.queue_s": facts.queue_s}


def _transfer_attributes(facts: RequestFacts) -> dict[str, Value]:
    return {
        "twostroke.kv.bytes": facts.kv_bytes,
        "twostroke.kv.segments": facts.kv_segments,
        "twostroke.kv.resends": facts.kv_resends,
        "twostroke.kv.skipped_tokens": facts.skipped_tokens,
    }


def _decode_attributes(facts: RequestFacts) -> dict[str, Value]:
    return {"twostroke.preemptions": facts.preemptions, "twostroke.transfer_s": facts.transfer_s}
