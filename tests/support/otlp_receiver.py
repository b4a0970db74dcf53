"""An OTLP receiver in this process, over gRPC and HTTP: keeps what services send, for tests to look at.

Use it as a context manager: `receiver.grpc` and `receiver.http` are URLs for `--otlp-endpoint`.
"""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

UNIT_SUFFIXES = {"s": "seconds", "By": "bytes"}


@dataclass(frozen=True)
class Span:
    """A span as it came."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    """Empty for a root."""
    service: str
    kind: int
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[str]
    facts: dict[str, dict[str, Any]]
    """Attributes of its events that have any, by name."""
    is_error: bool

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(frozen=True)
class Point:
    """One series of a metric as it came last."""

    value: float
    """A histogram's count."""
    total: float
    """A histogram's sum."""
    attributes: dict[str, Any]
    service: str


@dataclass
class OtlpReceiver:
    """Both servers and what they received."""

    spans: list[Span] = field(default_factory=list)
    points: dict[str, list[Point]] = field(default_factory=dict)
    """By the name that a translation for Prometheus makes: of each export the latest."""
    num_exports: dict[str, int] = field(default_factory=lambda: {"traces": 0, "metrics": 0})
    _news: threading.Condition = field(default_factory=threading.Condition)

    def __enter__(self) -> Self:
        self._grpc = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Traces(self), self._grpc)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Metrics(self), self._grpc)
        self.grpc = f"http://127.0.0.1:{self._grpc.add_insecure_port('127.0.0.1:0')}"
        self._grpc.start()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _http_of(self))
        self.http = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._grpc.stop(0)
        self._http.shutdown()
        self._http.server_close()

    # ---- what tests look at ------------------------------------------------------------------------------------------

    def until(self, condition: Callable[[], bool], seconds: float = 20, what: str = "telemetry") -> None:
        """Waits until what came fulfils a condition."""
        deadline = time.monotonic() + seconds
        with self._news:
            while not condition():
                left = deadline - time.monotonic()
                assert left > 0, f"{what}: not within {seconds} s; {len(self.spans)} spans, {sorted(self.points)}"
                self._news.wait(min(left, 0.5))

    def trace(self, trace_id: str) -> list[Span]:
        """The spans of one trace, by start."""
        return sorted((span for span in self.spans if span.trace_id == trace_id), key=lambda span: span.start_ns)

    def orphans(self) -> list[Span]:
        """Spans whose parent never came."""
        known = {span.span_id for span in self.spans}
        return [span for span in self.spans if span.parent_id and span.parent_id not in known]

    def metric_names(self) -> set[str]:
        """Names of everything that came, as a translation for Prometheus makes them."""
        return set(self.points)

    # ---- what the servers call ---------------------------------------------------------------------------------------

    def take_traces(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        with self._news:
            self.num_exports["traces"] += 1
            for resource in request.resource_spans:
                service = _attributes(resource.resource.attributes).get("service.instance.id", "")
                self.spans += [_span(span, service) for scope in resource.scope_spans for span in scope.spans]
            self._news.notify_all()

    def take_metrics(self, request: metrics_service_pb2.ExportMetricsServiceRequest) -> None:
        with self._news:
            self.num_exports["metrics"] += 1
            for resource in request.resource_metrics:
                service = _attributes(resource.resource.attributes).get("service.instance.id", "")
                for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
                    name, points = prometheus_name(metric), list(_points(metric, service))
                    others = [point for point in self.points.get(name, ()) if point.service != service]
                    self.points[name] = [*others, *points]
            self._news.notify_all()


def prometheus_name(metric: metrics_pb2.Metric) -> str:
    """What OpenTelemetry's translation for Prometheus calls a metric."""
    name = "".join(char if char.isalnum() or char in "_:" else "_" for char in metric.name)
    suffix = UNIT_SUFFIXES.get(metric.unit, "")
    if suffix and not name.endswith(f"_{suffix}"):
        name += f"_{suffix}"
    is_counter = metric.WhichOneof("data") == "sum" and metric.sum.is_monotonic
    return f"{name}_total" if is_counter and not name.endswith("_total") else name


def _points(metric: metrics_pb2.Metric, service: str) -> Iterator[Point]:
    kind = metric.WhichOneof("data")
    for point in getattr(metric, kind or "gauge").data_points:
        attributes = _attributes(point.attributes)
        if kind == "histogram":
            assert sum(point.bucket_counts) == point.count, metric.name
            assert len(point.bucket_counts) == len(point.explicit_bounds) + 1, metric.name
            yield Point(point.count, point.sum, attributes, service)
        else:
            value = point.as_double if point.HasField("as_double") else float(point.as_int)
            yield Point(value, value, attributes, service)


def _span(span: trace_pb2.Span, service: str) -> Span:
    return Span(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        service=service,
        kind=span.kind,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=[event.name for event in span.events],
        facts={event.name: _attributes(event.attributes) for event in span.events if event.attributes},
        is_error=span.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
    )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


class _Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, context: Any) -> trace_service_pb2.ExportTraceServiceResponse:
        self._receiver.take_traces(request)
        return trace_service_pb2.ExportTraceServiceResponse()


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(self, request: Any, context: Any) -> metrics_service_pb2.ExportMetricsServiceResponse:
        self._receiver.take_metrics(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()


def _http_of(receiver: OtlpReceiver) -> type[BaseHTTPRequestHandler]:
    class Exports(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                receiver.take_traces(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
            elif self.path == "/v1/metrics":
                receiver.take_metrics(metrics_service_pb2.ExportMetricsServiceRequest.FromString(body))
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    return Exports
