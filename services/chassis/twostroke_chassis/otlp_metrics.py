"""A prometheus_client registry as OTLP data: counters as sums, gauges as gauges, histograms as histograms.

Names are chosen so that a receiver which translates them for Prometheus gets the names of `/metrics` back: a counter
loses its `_total`, a unit is told where a name ends with one, and the GenAI metrics have their conventions' names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.samples import Sample

_SCOPE = InstrumentationScope("twostroke")
_UNITS = (("_seconds", "s"), ("_bytes", "By"))
_GEN_AI = {
    "gen_ai_server_request_duration_seconds": "gen_ai.server.request.duration",
    "gen_ai_server_time_to_first_token_seconds": "gen_ai.server.time_to_first_token",
    "gen_ai_server_time_per_output_token_seconds": "gen_ai.server.time_per_output_token",
}
_ATTRIBUTES = {
    "gen_ai_operation_name": "gen_ai.operation.name",
    "gen_ai_request_model": "gen_ai.request.model",
    "gen_ai_response_model": "gen_ai.response.model",
    "error_type": "error.type",
}
_STARTED_NS = time.time_ns()
_Key = tuple[tuple[str, str], ...]


def metrics_data(registry: CollectorRegistry, resource: Resource) -> MetricsData:
    """Everything that the registry holds now."""
    now_ns = time.time_ns()
    metrics = [metric for family in registry.collect() for metric in _converted(family, now_ns)]
    scope = ScopeMetrics(scope=_SCOPE, metrics=metrics, schema_url="")
    return MetricsData([ResourceMetrics(resource=resource, scope_metrics=[scope], schema_url="")])


def _converted(family: Family, now_ns: int) -> Iterator[Metric]:
    """One metric, or none for a family without samples or of a type that is not used here."""
    unit = next((unit for ending, unit in _UNITS if family.name.endswith(ending)), "")
    data = _DATA[family.type](family.samples, now_ns) if family.type in _DATA else None
    if data is not None and data.data_points:
        yield Metric(_GEN_AI.get(family.name, family.name), family.documentation, unit, data)


def _sum(samples: Iterable[Sample], now_ns: int) -> Sum:
    points = [_number(sample, now_ns) for sample in samples if sample.name.endswith("_total")]
    return Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)


def _gauge(samples: Iterable[Sample], now_ns: int) -> Gauge:
    return Gauge([_number(sample, now_ns) for sample in samples])


def _number(sample: Sample, now_ns: int) -> NumberDataPoint:
    return NumberDataPoint(_attributes(sample.labels), _STARTED_NS, now_ns, sample.value)


def _histogram(samples: Iterable[Sample], now_ns: int) -> Histogram:
    buckets: dict[_Key, list[tuple[float, float]]] = {}
    totals: dict[_Key, float] = {}
    for sample in samples:
        key = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
        if sample.name.endswith("_bucket"):
            buckets.setdefault(key, []).append((float(sample.labels["le"]), sample.value))
        elif sample.name.endswith("_sum"):
            totals[key] = sample.value
    points = [_histogram_point(key, counts, totals.get(key, 0.0), now_ns) for key, counts in buckets.items()]
    return Histogram(points, AggregationTemporality.CUMULATIVE)


def _histogram_point(key: _Key, counts: Sequence[tuple[float, float]], total: float, now_ns: int) -> HistogramDataPoint:
    """Prometheus counts what is below each bound, OTLP what lies between two."""
    ordered = sorted(counts)
    below = [0.0, *(count for _, count in ordered)]
    return HistogramDataPoint(
        attributes=_attributes(dict(key)),
        start_time_unix_nano=_STARTED_NS,
        time_unix_nano=now_ns,
        count=int(below[-1]),
        sum=total,
        bucket_counts=[int(upper - lower) for lower, upper in pairwise(below)],
        explicit_bounds=[bound for bound, _ in ordered[:-1]],
        min=None,  # type: ignore[arg-type]  # absent in OTLP: Prometheus does not know it
        max=None,  # type: ignore[arg-type]
    )


def _attributes(labels: Mapping[str, str]) -> dict[str, str]:
    return {_ATTRIBUTES.get(name, name): value for name, value in labels.items() if value}


_DATA: Mapping[str, Callable[[Iterable[Sample], int], Sum | Gauge | Histogram]] = {
    "counter": _sum,
    "gauge": _gauge,
    "histogram": _histogram,
}
