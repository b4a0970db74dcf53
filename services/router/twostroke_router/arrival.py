"""The moment a request came to the router's door, and the trace that it belongs to from then on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from twostroke_chassis.tracing import TRACEPARENT, context_of, given_traceparent, traceparent_of


@dataclass(frozen=True, slots=True)
class Arrival:
    """When and in which trace."""

    traceparent: str
    is_trace_given: bool = False
    """The client named the trace: its span is the parent. Else the trace begins here."""
    at_s: float = field(default_factory=time.monotonic)
    """On this host's monotonic clock: what every duration of the request is counted from."""
    unix_s: float = field(default_factory=time.time)
    """For people."""

    @classmethod
    def of(cls, headers: Mapping[str, str]) -> Arrival:
        """Now, in the trace that the headers name, or in a new one."""
        named = headers.get(TRACEPARENT)
        given = given_traceparent([(TRACEPARENT, named)]) if named else None
        return cls(given or traceparent_of(context_of(None)), given is not None)
