"""Log records as lines: for people, or as JSON for a log store, with the ids of the trace and the request."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import msgspec
from opentelemetry import trace

_request_id: ContextVar[str] = ContextVar("twostroke_request_id", default="")


@contextmanager
def about_request(request_id: str) -> Iterator[None]:
    """Log records of the block, and of tasks that it starts, carry the request's id."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def formatter(kind: Literal["text", "json"], role: str, process_id: str) -> logging.Formatter:
    """What `--log-format` names."""
    return _LineFormatter(process_id) if kind == "text" else _JsonFormatter(role, process_id)


def _utc(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


class _LineFormatter(logging.Formatter):
    """`time LEVEL id[pid] logger: message`; a record is one line, and a traceback follows indented."""

    def __init__(self, process_id: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {process_id}[%(process)d] %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return _utc(record)

    def formatMessage(self, record: logging.LogRecord) -> str:
        # A message may quote what a client sent: it must not be able to forge a record.
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "    " + super().formatException(ei).replace("\n", "\n    ")


class _JsonFormatter(logging.Formatter):
    """One object a line; fields that have nothing to say are left out."""

    def __init__(self, role: str, process_id: str) -> None:
        super().__init__()
        self._who = {"role": role, "id": process_id}

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON: a newline in a message cannot end its line."""
        line: dict[str, Any] = {"time": _utc(record), "level": record.levelname.lower(), **self._who}
        line |= {"pid": record.process, "logger": record.name, "message": record.getMessage()}
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            line |= {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}
        if request_id := getattr(record, "request_id", "") or _request_id.get():
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode(errors="replace")
