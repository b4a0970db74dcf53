"""W3C trace context: what ties the log lines and spans of one request together, over every process it visits.

Spans are made in `spans` and sent by `otlp`; the context flows regardless, so that a trace id is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import grpc.aio
from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

TRACEPARENT = "traceparent"

_propagator = TraceContextTextMapPropagator()
_ids = RandomIdGenerator()


def context_of(traceparent: str | None) -> Context:
    """The context a `traceparent` names; a new random one if there is none, or it is malformed."""
    extracted = _propagator.extract({TRACEPARENT: traceparent}, Context()) if traceparent else Context()
    if trace.get_current_span(extracted).get_span_context().is_valid:
        return extracted
    random = trace.SpanContext(_ids.generate_trace_id(), _ids.generate_span_id(), is_remote=False)
    return trace.set_span_in_context(trace.NonRecordingSpan(random), Context())


def traceparent_of(where: Context | None = None) -> str:
    """The `traceparent` of a context, by default the current one; of a new random one if no span is active there."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, where)
    if TRACEPARENT not in carrier:
        _propagator.inject(carrier, context_of(None))
    return carrier[TRACEPARENT]


def trace_id_of(traceparent: str) -> str:
    """The trace's id in a well-formed `traceparent`, 32 hexadecimal digits."""
    return traceparent.split("-")[1]


def given_traceparent(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    """The `traceparent` in a call's metadata or a request's headers; None if it is absent or malformed."""
    for name, value in metadata or ():
        if name.lower() == TRACEPARENT:
            text = value.decode("latin-1") if isinstance(value, bytes) else value
            extracted = _propagator.extract({TRACEPARENT: text}, Context())
            return traceparent_of(extracted) if trace.get_current_span(extracted).get_span_context().is_valid else None
    return None


def call_metadata(traceparent: str | None = None, *more: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Metadata for an outgoing gRPC call: a trace context (the current one by default) and what else is given."""
    return ((TRACEPARENT, traceparent or traceparent_of()), *more)


def received_traceparent(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The `traceparent` in a call's metadata or a request's headers; a new one if it is absent or malformed."""
    return given_traceparent(metadata) or traceparent_of(context_of(None))


@contextmanager
def in_trace(traceparent: str | None) -> Iterator[str]:
    """Makes a trace context the current one for the length of a block; yields its `traceparent`."""
    where = context_of(traceparent)
    token = context.attach(where)
    try:
        yield traceparent_of(where)
    finally:
        context.detach(token)


@contextmanager
def in_trace_of_call(call: grpc.aio.ServicerContext) -> Iterator[str]:
    """Makes the trace context of an incoming gRPC call the current one for the length of a block."""
    with in_trace(received_traceparent(call.invocation_metadata())) as traceparent:
        yield traceparent
