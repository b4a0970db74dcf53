"""W3C trace context: kept where it is given, drawn where it is not."""

from __future__ import annotations

import re

import pytest
from opentelemetry.sdk.trace import TracerProvider
from twostroke_chassis.tracing import call_metadata, in_trace, received_traceparent, traceparent_of

GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SHAPE = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-0[01]")


def test_a_given_context_travels_on() -> None:
    assert received_traceparent([("traceparent", GIVEN)]) == GIVEN
    assert received_traceparent([("Traceparent", GIVEN.encode())]) == GIVEN
    assert call_metadata(GIVEN, ("x", "y")) == (("traceparent", GIVEN), ("x", "y"))
    with in_trace(GIVEN) as inner:
        assert inner == GIVEN == traceparent_of() == call_metadata()[0][1]


@pytest.mark.parametrize("bad", ["", "junk", "00-" + "0" * 32 + "-b7ad6b7169203331-01", GIVEN[:-1], "\xff" * 55])
def test_an_absent_or_malformed_one_is_drawn_anew(bad: str) -> None:
    drawn = {received_traceparent([("traceparent", bad)]), received_traceparent(None), traceparent_of()}
    assert len(drawn) == 3
    assert all(SHAPE.fullmatch(traceparent) for traceparent in drawn)


def test_blocks_nest_and_end() -> None:
    with in_trace(None) as outer:
        assert traceparent_of() == outer
        with in_trace(GIVEN):
            assert traceparent_of() == GIVEN
        assert traceparent_of() == outer
    assert traceparent_of() != outer


def test_an_active_span_is_the_parent() -> None:
    tracer = TracerProvider().get_tracer("test")
    with in_trace(GIVEN), tracer.start_as_current_span("work") as span:
        trace_id, span_id = traceparent_of().split("-")[1:3]
        assert trace_id == GIVEN.split("-")[1]
        assert span_id == f"{span.get_span_context().span_id:016x}" != GIVEN.split("-")[2]
