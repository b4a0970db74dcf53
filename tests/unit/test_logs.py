"""Log lines for machines: one object each, whatever a message holds."""

from __future__ import annotations

import json
import logging
from typing import Any

from twostroke_chassis.logs import about_request, formatter
from twostroke_chassis.tracing import in_trace

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def line(message: str, *args: Any, error: Exception | None = None) -> dict[str, Any]:
    info = (type(error), error, None) if error else None
    record = logging.LogRecord("twostroke_x", logging.WARNING, "file", 1, message, args, info)
    text = formatter("json", "router", "r0").format(record)
    assert "\n" not in text
    parsed: dict[str, Any] = json.loads(text)
    return parsed


def test_a_record_has_its_fields() -> None:
    shown = line("said %s", 'a "thing"\n{"level": "critical"}')
    assert shown["message"] == 'said a "thing"\n{"level": "critical"}'
    assert (shown["level"], shown["role"], shown["id"], shown["logger"]) == ("warning", "router", "r0", "twostroke_x")
    assert shown["time"].endswith("Z")
    assert not {"trace_id", "span_id", "request_id", "exception"} & set(shown)


def test_within_a_request_its_ids_are_there() -> None:
    with in_trace(TRACEPARENT), about_request("abc"):
        shown = line("x")
    assert (shown["trace_id"], shown["span_id"]) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    assert shown["request_id"] == "abc"
    assert "request_id" not in line("x")


def test_a_traceback_stays_in_its_line() -> None:
    assert "ValueError: no\nmore" in line("failed", error=ValueError("no\nmore"))["exception"]
