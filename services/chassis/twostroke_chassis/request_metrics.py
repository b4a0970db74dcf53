"""Metrics of requests beyond the router's own names: stages of the waterfalls, and the GenAI semantic conventions.

They are observed once per request, at its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram

TTFT_STAGES = (
    "admission",
    "placement",
    "reserve",
    "prefill_queue",
    "prefill_compute",
    "return",
    "unattributed",
)
SECOND_TOKEN_STAGES = ("transfer", "decode_admission", "first_step", "unattributed")
STAGES: Mapping[str, tuple[str, ...]] = {"ttft": TTFT_STAGES, "second_token": SECOND_TOKEN_STAGES}
"""The stages of each waterfall, in order."""

_STAGE_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

# The buckets that the GenAI semantic conventions recommend.
_DURATION_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)

OPERATIONS: Mapping[str, str] = {"chat": "chat", "completions": "text_completion", "generate": "text_completion"}
"""`gen_ai.operation.name` by endpoint."""

_LABELS = ("gen_ai_operation_name", "gen_ai_request_model", "gen_ai_response_model", "error_type")


class StageMetrics:
    """Where the time went, over all requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.seconds = Histogram(
            "twostroke_stage_seconds",
            "Time by stage of a request's way to its first token, and from there to its second.",
            ("waterfall", "stage"),
            buckets=_STAGE_S,
            registry=registry,
        )
        """By waterfall and stage."""
        # Looking a child up by its labels costs more than observing.
        self._children = {
            (waterfall, stage): self.seconds.labels(waterfall, stage)
            for waterfall, stages in STAGES.items()
            for stage in stages
        }
        self._dropped = dropped_counter(registry)

    def dropped(self, signal: str, count: int) -> None:
        """Some telemetry was given up."""
        self._dropped.labels(signal).inc(count)

    def observe(self, waterfall: str, stages: Iterable[tuple[str, float]]) -> None:
        """Takes a request's waterfall in."""
        for stage, seconds in stages:
            self._children[waterfall, stage].observe(seconds)


def dropped_counter(registry: CollectorRegistry) -> Counter:
    """Counts telemetry that did not get where it was to go; routers and workers have one each."""
    counter = Counter(
        "twostroke_telemetry_dropped",
        "Spans, metric exports and explanations given up because a receiver was away or slow.",
        ("signal",),
        registry=registry,
    )
    for signal in ("traces", "metrics", "explanations"):
        counter.labels(signal)
    return counter


class GenAiMetrics:
    """The server metrics of OpenTelemetry's GenAI conventions."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._model_name = model_name
        self._duration_s = Histogram(
            "gen_ai_server_request_duration_seconds",
            "Duration of a request, from its arrival to its end.",
            _LABELS,
            buckets=_DURATION_S,
            registry=registry,
        )
        self._first_token_s = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "Time to the first token of an answer that ended well.",
            _LABELS,
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self._per_token_s = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Time per token after the first, of an answer that ended well.",
            _LABELS,
            buckets=_PER_TOKEN_S,
            registry=registry,
        )
        for endpoint in OPERATIONS:
            for metric in (self._duration_s, self._first_token_s, self._per_token_s):
                metric.labels(*self._values(endpoint, ""))

    def ended(
        self, endpoint: str, error: str, e2e_s: float, ttft_s: float | None = None, per_token_s: float | None = None
    ) -> None:
        """A request is over; `error` is empty if it ended well."""
        values = self._values(endpoint, error)
        self._duration_s.labels(*values).observe(e2e_s)
        if not error and ttft_s is not None:
            self._first_token_s.labels(*values).observe(ttft_s)
        if not error and per_token_s is not None:
            self._per_token_s.labels(*values).observe(per_token_s)

    def _values(self, endpoint: str, error: str) -> tuple[str, str, str, str]:
        return OPERATIONS[endpoint], self._model_name, self._model_name, error
