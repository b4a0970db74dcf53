"""What is published of a request when it is over: metrics, spans, an explanation, a line in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from twostroke_chassis.request_metrics import OPERATIONS
from twostroke_chassis.spans import Moment, NoTracing, OpenSpan, SpanFacts, Tracing, Value
from twostroke_chassis.telemetry import RouterMetrics
from twostroke_chassis.tracing import trace_id_of
from twostroke_engine.request import LifeEvent, Request, RequestFacts

from twostroke_router.explanation import (
    Entry,
    Explanation,
    PlacementFacts,
    TransferFacts,
    Usage,
    Waterfalls,
)
from twostroke_router.intake import Caller
from twostroke_router.placement import Placement
from twostroke_router.timing import Timing
from twostroke_router.waterfall import Waterfall

_log = logging.getLogger(__name__)

WELL = ("stop", "length")
"""Outcomes of an answer that ended well."""
CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A request that is over."""

    caller: Caller
    request: Request
    outcome: str
    timing: Timing
    usage: Usage
    placement: Placement | None
    facts: Mapping[str, RequestFacts]
    """By worker, of those that have said their end."""
    finishes: Sequence[str]
    num_retries: int

    @property
    def is_handed_over(self) -> bool:
        """Whether prefill and decode ran on two workers."""
        return self.placement is not None and None not in (self.placement.prefill, self.placement.decode)

    @property
    def first_worker(self) -> str | None:
        """Which worker was to compute the prompt."""
        return None if self.placement is None else self.placement.prefill or self.placement.decode


class Conclusions:
    """Publishes, for one router and its one model."""

    def __init__(
        self,
        router_id: str,
        model_name: str,
        metrics: RouterMetrics,
        tracing: Tracing | None = None,
        keep: Callable[[Entry], None] = lambda entry: None,
    ) -> None:
        self._router_id = router_id
        self._model_name = model_name
        self._metrics = metrics
        self._tracing = tracing or NoTracing()
        self._keep = keep

    def begin(self, caller: Caller) -> OpenSpan:
        """The span of a request that begins to run; its workers' spans go under it."""
        arrival = caller.arrival
        name = f"{OPERATIONS[caller.endpoint]} {self._model_name}"
        return self._tracing.begin(name, arrival.traceparent, arrival.at_s, is_root=not arrival.is_trace_given)

    def end(self, record: Record, span: OpenSpan) -> None:
        """The request is over: says everything there is to say of it."""
        record.timing.end()
        explanation = self.explain(record, span.traceparent)
        self._count(record, explanation)
        if span.is_recording:
            self._trace(record, explanation, span)
        self._keep(Entry(record.request.tenant, explanation))
        level = logging.DEBUG if record.outcome in (*WELL, CANCELLED) else logging.INFO
        _log.log(
            level,
            "%s: %s after %.3f s, %d tokens",
            record.caller.endpoint,
            record.outcome,
            explanation.e2e_s or 0.0,
            record.usage.completion_tokens,
            extra={"request_id": record.caller.request_id},
        )

    def explain(self, record: Record, traceparent: str) -> Explanation:
        """The request as others may see it."""
        timing, placement, facts = record.timing, record.placement, list(record.facts.values())
        return Explanation(
            request_id=record.caller.request_id,
            trace_id=trace_id_of(traceparent),
            endpoint=record.caller.endpoint,
            arrived_unix_s=record.caller.arrival.unix_s,
            outcome=record.outcome,
            router_id=self._router_id,
            retries=record.num_retries,
            placement=_placement_facts(placement, record.usage.prompt_tokens),
            usage=record.usage,
            ttft_s=timing.ttft_s,
            second_token_s=timing.second_token_s,
            itl_s=timing.itl_s,
            e2e_s=timing.e2e_s,
            waterfalls=_waterfalls(record),
            transfer=TransferFacts(
                kv_bytes=max((each.kv_bytes for each in facts), default=0),
                kv_segments=max((each.kv_segments for each in facts), default=0),
                kv_resends=max((each.kv_resends for each in facts), default=0),
                skipped_tokens=max((each.skipped_tokens for each in facts), default=0),
            ),
            preemptions=sum(each.preemptions for each in facts),
            first_token_worker=record.first_worker if timing.ttft_s is not None else None,
            token_worker=_token_worker(record),
        )

    def _count(self, record: Record, explanation: Explanation) -> None:
        metrics, usage, outcome = self._metrics, record.usage, record.outcome
        metrics.requests.labels(record.caller.endpoint, outcome).inc()
        metrics.tenants.ended(record.request.tenant, outcome)
        for name, waterfall in (
            ("ttft", explanation.waterfalls.ttft),
            ("second_token", explanation.waterfalls.second_token),
        ):
            if waterfall is not None:
                metrics.stages.observe(name, ((each.stage, each.seconds) for each in waterfall.stages))
        error = "" if outcome in WELL else outcome
        e2e_s, ttft_s = explanation.e2e_s or 0.0, explanation.ttft_s
        decode_s = None if ttft_s is None else e2e_s - ttft_s
        more = usage.completion_tokens - 1
        per_token_s = decode_s / more if decode_s is not None and more > 0 else None
        metrics.gen_ai.ended(record.caller.endpoint, error, e2e_s, ttft_s, per_token_s)
        if usage.completion_tokens:
            for kind in ("prompt", "cached", "completion"):
                num_tokens = getattr(usage, f"{kind}_tokens")
                metrics.tokens.labels(kind).inc(num_tokens)
                metrics.tenants.used(record.request.tenant, kind, num_tokens)
            metrics.vllm.ended(usage.prompt_tokens, usage.completion_tokens, decode_s)

    # ---- spans -------------------------------------------------------------------------------------------------------

    def _trace(self, record: Record, explanation: Explanation, span: OpenSpan) -> None:
        timing = record.timing
        end_s = timing.ended_s or timing.arrived_s
        starts = (("admission", timing.arrived_s, timing.admitted_s), ("placement", timing.admitted_s, timing.placed_s))
        for name, start_s, until_s in (*starts, ("reserve", timing.placed_s, timing.granted_s)):
            if start_s is not None and until_s is not None:
                span.child(name, start_s, SpanFacts(until_s, _of_child(name, record)))
        error = "" if record.outcome in (*WELL, CANCELLED) else record.outcome
        span.end(SpanFacts(end_s, self._attributes(record), [*_moments(record, explanation)], error))

    def _attributes(self, record: Record) -> dict[str, Value]:
        usage, sampling = record.usage, record.request.sampling
        attributes: dict[str, Value] = {
            "gen_ai.operation.name": OPERATIONS[record.caller.endpoint],
            "gen_ai.provider.name": "twostroke",
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
            "gen_ai.response.id": record.caller.request_id,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.choice.count": record.request.n,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "twostroke.usage.cached_tokens": usage.cached_tokens,
            "twostroke.outcome": record.outcome,
            "twostroke.router.id": self._router_id,
            "twostroke.retries": record.num_retries,
        }
        if record.finishes:
            attributes["gen_ai.response.finish_reasons"] = tuple(record.finishes)
        if record.outcome not in WELL:
            attributes["error.type"] = record.outcome
        return attributes


def _of_child(name: str, record: Record) -> dict[str, Value]:
    placement = record.placement
    if name != "placement" or placement is None:
        return {}
    return {
        "twostroke.placement.prefill": placement.prefill or "",
        "twostroke.placement.decode": placement.decode or "",
        "twostroke.placement.reason": placement.reason,
        "twostroke.placement.expected_hit_tokens": placement.expected_hit,
    }


def _moments(record: Record, explanation: Explanation) -> Iterator[Moment]:
    timing = record.timing
    end_s = timing.ended_s or timing.arrived_s
    last = LifeEvent.FINISHED if record.outcome in WELL else LifeEvent.FAILED
    for event, at_s in (
        (LifeEvent.RECEIVED, timing.arrived_s),
        (LifeEvent.ADMITTED, timing.admitted_s),
        (LifeEvent.PLACED, timing.placed_s),
        (LifeEvent.RESERVED, timing.granted_s),
        (LifeEvent.FIRST_TOKEN, timing.first_token_s),
        (LifeEvent.CANCELLED if record.outcome == CANCELLED else last, end_s),
    ):
        if at_s is not None:
            yield Moment(event.value, at_s)
    for name in ("ttft", "second_token"):
        waterfall: Waterfall | None = getattr(explanation.waterfalls, name)
        if waterfall is not None:
            stages = {f"twostroke.stage.{each.stage}_s": each.seconds for each in waterfall.stages}
            yield Moment(f"waterfall.{name}", end_s, {"twostroke.total_s": waterfall.total_s, **stages})


# ---- facts -----------------------------------------------------------------------------------------------------------


def _waterfalls(record: Record) -> Waterfalls:
    placement = record.placement
    sender = None
    if placement is not None and record.is_handed_over:
        sender = record.facts.get(placement.prefill or "", RequestFacts())
    return Waterfalls(ttft=record.timing.ttft_waterfall(), second_token=record.timing.second_token_waterfall(sender))


def _placement_facts(placement: Placement | None, num_prompt_tokens: int) -> PlacementFacts:
    if placement is None:
        return PlacementFacts()
    return PlacementFacts(
        prefill=placement.prefill,
        decode=placement.decode,
        reason=_in_words(placement, num_prompt_tokens),
        expected_hit_tokens=placement.expected_hit,
    )


def _in_words(placement: Placement, num_prompt_tokens: int) -> str:
    if placement.prefill is None:
        where = f"all of it on {placement.decode}"
    elif placement.decode is None:
        where = f"prefill alone, on {placement.prefill}"
    else:
        where = f"prefill on {placement.prefill}, decode on {placement.decode}"
    hit = f"{placement.expected_hit} of {num_prompt_tokens} prompt tokens were expected in its prefix cache"
    return f"{where}: {placement.reason}; {hit}"


def _token_worker(record: Record) -> str | None:
    """Which worker made the tokens after the first."""
    if record.placement is None or record.usage.completion_tokens < 2:
        return None
    return record.placement.decode or record.placement.prefill
