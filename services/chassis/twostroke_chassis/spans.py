"""Spans of requests, made from what was measured: nothing is done for them while tokens flow.

A span's start and end are read on this host's monotonic clock and told as wall-clock times. Where no receiver is
configured, `NoTracing` passes trace contexts on and makes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, Sampler
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from twostroke_chassis.tracing import context_of

Value = str | int | float | bool | Sequence[str]
_SCOPE = InstrumentationScope("twostroke")


@dataclass(frozen=True, slots=True)
class Moment:
    """A named moment within a span."""

    name: str
    at_s: float
    """On this host's monotonic clock."""
    attributes: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SpanFacts:
    """What is known of a span when it is over."""

    end_s: float
    attributes: Mapping[str, Value] = field(default_factory=dict)
    moments: Sequence[Moment] = ()
    error: str = ""
    """Empty if it ended well."""


class OpenSpan(Protocol):
    """A span whose end is not yet known."""

    traceparent: str
    """What its children, here and elsewhere, name as their parent."""
    is_recording: bool
    """Whether anyone will see it: if not, nothing need be put together for it."""

    def child(self, name: str, start_s: float, facts: SpanFacts) -> None:
        """Adds a span within this one that is over."""
        ...

    def end(self, facts: SpanFacts) -> None:
        """Ends it, once."""
        ...


class Tracing(Protocol):
    """Makes the spans of requests."""

    def begin(self, name: str, traceparent: str, start_s: float, *, is_root: bool = False) -> OpenSpan:
        """Begins a request's span; as a root, its trace is that of `traceparent` and its parent nobody."""
        ...

    def add(self, name: str, traceparent: str, start_s: float, facts: SpanFacts) -> None:
        """Adds a span that is over, under another process's."""
        ...


class NoTracing:
    """No receiver: contexts travel on, spans are not made."""

    def begin(self, name: str, traceparent: str, start_s: float, *, is_root: bool = False) -> OpenSpan:
        """Makes nothing."""
        return _NoSpan(traceparent)

    def add(self, name: str, traceparent: str, start_s: float, facts: SpanFacts) -> None:
        """Makes nothing."""


class _NoSpan:
    is_recording = False

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def child(self, name: str, start_s: float, facts: SpanFacts) -> None:
        """Makes nothing."""

    def end(self, facts: SpanFacts) -> None:
        """Makes nothing."""


class OtelTracing:
    """Spans for a processor of the SDK.

    They are handed to it as what they are, finished: a span of the SDK that is begun, filled and ended costs five times
    as much, with locks and checks for what cannot happen here.
    """

    def __init__(self, processor: SpanProcessor, sampler: Sampler, resource: Resource) -> None:
        self._processor = processor
        self._sampler = sampler
        self._resource = resource
        self._ids = RandomIdGenerator()

    def begin(self, name: str, traceparent: str, start_s: float, *, is_root: bool = False) -> OpenSpan:
        """Begins a request's span; the caller's trace, or the sampler, says whether it will be sent."""
        named = _span_context(traceparent)
        decided = self._sampler.should_sample(
            Context() if is_root else context_of(traceparent), named.trace_id, name, SpanKind.SERVER
        )
        is_sent = decided.decision is Decision.RECORD_AND_SAMPLE
        flags = TraceFlags(TraceFlags.SAMPLED if is_sent else TraceFlags.DEFAULT)
        context = SpanContext(named.trace_id, self._ids.generate_span_id(), is_remote=False, trace_flags=flags)
        return _Span(self, _Begun(name, context, None if is_root else named, start_s, _offset_ns()))

    def add(self, name: str, traceparent: str, start_s: float, facts: SpanFacts) -> None:
        """Adds a span under another process's, if that is sent."""
        self.child(name, _span_context(traceparent), start_s, facts, _offset_ns())

    def child(self, name: str, parent: SpanContext, start_s: float, facts: SpanFacts, offset_ns: int) -> None:
        """Sends a span under another."""
        if parent.trace_flags.sampled:
            span_id = self._ids.generate_span_id()
            context = SpanContext(parent.trace_id, span_id, is_remote=False, trace_flags=parent.trace_flags)
            self.send(_Begun(name, context, parent, start_s, offset_ns), facts, SpanKind.INTERNAL)

    def send(self, begun: _Begun, facts: SpanFacts, kind: SpanKind) -> None:
        """Hands a span to the processor, which sends it if it is sampled."""
        offset_ns = begun.offset_ns
        self._processor.on_end(
            ReadableSpan(
                name=begun.name,
                context=begun.context,
                parent=begun.parent,
                resource=self._resource,
                attributes=facts.attributes,
                events=[Event(each.name, each.attributes, _ns(each.at_s, offset_ns)) for each in facts.moments],
                kind=kind,
                instrumentation_scope=_SCOPE,
                status=Status(StatusCode.ERROR, facts.error) if facts.error else Status(),
                start_time=_ns(begun.start_s, offset_ns),
                end_time=_ns(facts.end_s, offset_ns),
            )
        )


@dataclass(frozen=True, slots=True)
class _Begun:
    name: str
    context: SpanContext
    parent: SpanContext | None
    start_s: float
    offset_ns: int


class _Span:
    def __init__(self, tracing: OtelTracing, begun: _Begun) -> None:
        self._tracing = tracing
        self._begun = begun
        context = begun.context
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
        self.is_recording = context.trace_flags.sampled

    def child(self, name: str, start_s: float, facts: SpanFacts) -> None:
        """Adds a span within this one."""
        self._tracing.child(name, self._begun.context, start_s, facts, self._begun.offset_ns)

    def end(self, facts: SpanFacts) -> None:
        """Ends it."""
        self._tracing.send(self._begun, facts, SpanKind.SERVER)


def _span_context(traceparent: str) -> SpanContext:
    return trace.get_current_span(context_of(traceparent)).get_span_context()


def _offset_ns() -> int:
    """Wall clock minus monotonic clock."""
    return time.time_ns() - time.monotonic_ns()


def _ns(at_s: float, offset_ns: int) -> int:
    return int(at_s * 1e9) + offset_ns
