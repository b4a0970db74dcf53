"""Spans from what was measured: whose they are, when they were, and whether they are sent at all."""

from __future__ import annotations

import time

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from twostroke_chassis.spans import Moment, NoTracing, OtelTracing, SpanFacts
from twostroke_chassis.tracing import context_of, trace_id_of, traceparent_of

SENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SENT = SENT[:-1] + "0"


class Bench:
    def __init__(self, ratio: float = 1.0) -> None:
        self.exporter = InMemorySpanExporter()
        processor: SpanProcessor = SimpleSpanProcessor(self.exporter)
        self.tracing = OtelTracing(processor, ParentBased(TraceIdRatioBased(ratio)), Resource({"service.name": "x"}))

    @property
    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


def test_a_root_begins_the_trace_that_was_drawn_for_it() -> None:
    bench, drawn = Bench(), traceparent_of(context_of(None))
    span = bench.tracing.begin("root", drawn, time.monotonic(), is_root=True)
    span.end(SpanFacts(time.monotonic()))
    root = bench.spans["root"]
    assert root.parent is None
    assert root.context is not None
    assert f"{root.context.trace_id:032x}" == trace_id_of(drawn) == trace_id_of(span.traceparent)
    assert span.traceparent.endswith(f"-{root.context.span_id:016x}-01")


def test_children_here_and_elsewhere_hang_on_it_and_times_are_told_on_the_wall() -> None:
    bench, now_s = Bench(), time.monotonic()
    span = bench.tracing.begin("root", SENT, now_s - 2)
    span.child("inner", now_s - 1.5, SpanFacts(now_s - 1, {"a": 1}, error="why"))
    bench.tracing.add("elsewhere", span.traceparent, now_s - 1, SpanFacts(now_s, moments=[Moment("m", now_s - 0.5)]))
    span.end(SpanFacts(now_s))
    spans = bench.spans
    root = spans["root"]
    assert root.parent is not None
    assert root.context is not None
    assert f"{root.parent.span_id:016x}" == "b7ad6b7169203331"
    for name in ("inner", "elsewhere"):
        parent = spans[name].parent
        assert parent is not None
        assert parent.span_id == root.context.span_id
    assert (root.end_time or 0) - (root.start_time or 0) == pytest.approx(2e9, abs=1e3)
    assert abs((root.end_time or 0) - time.time_ns()) < 5e9
    assert not spans["inner"].status.is_ok
    assert (spans["inner"].status.description, dict(spans["inner"].attributes or {})) == ("why", {"a": 1})
    (moment,) = spans["elsewhere"].events
    assert (spans["elsewhere"].end_time or 0) - moment.timestamp == pytest.approx(0.5e9, abs=1e3)


@pytest.mark.parametrize(("traceparent", "ratio", "is_sent"), [(NOT_SENT, 1.0, False), (SENT, 0.0, True)])
def test_a_callers_decision_is_kept(traceparent: str, ratio: float, is_sent: bool) -> None:
    bench = Bench(ratio)
    span = bench.tracing.begin("root", traceparent, 0.0)
    bench.tracing.add("elsewhere", span.traceparent, 0.0, SpanFacts(1.0))
    span.child("inner", 0.0, SpanFacts(1.0))
    span.end(SpanFacts(1.0))
    assert span.is_recording is is_sent
    assert set(bench.spans) == ({"root", "inner", "elsewhere"} if is_sent else set())
    assert span.traceparent.endswith("-01" if is_sent else "-00")


def test_a_share_of_own_traces_is_sent() -> None:
    bench = Bench(0.5)
    for _ in range(200):
        bench.tracing.begin("r", traceparent_of(context_of(None)), 0.0, is_root=True).end(SpanFacts(1.0))
    assert 50 < len(bench.exporter.get_finished_spans()) < 150


def test_without_a_receiver_the_context_travels_on() -> None:
    tracing = NoTracing()
    span = tracing.begin("root", SENT, 0.0)
    span.child("inner", 0.0, SpanFacts(1.0))
    span.end(SpanFacts(1.0))
    tracing.add("elsewhere", SENT, 0.0, SpanFacts(1.0))
    assert (span.traceparent, span.is_recording) == (SENT, False)
