"""OTLP: spans and metrics of this process go to a receiver, over gRPC or HTTP.

Flags come first, then the standard OTEL_* variables, then defaults. Without a receiver no exporter is imported and
nothing runs. Both exports have threads of their own: a receiver that is away or slow costs telemetry, never a request.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, TraceIdRatioBased
from prometheus_client import CollectorRegistry

from twostroke_chassis.otlp_metrics import metrics_data
from twostroke_chassis.settings import ServiceSettings
from twostroke_chassis.spans import NoTracing, OtelTracing, Tracing

_log = logging.getLogger(__name__)

_ENDPOINTS = {
    "traces": ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
    "metrics": ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
}
_INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"
_INTERVAL_MS = "15000"
_TIMEOUT_S = 5
_MAX_SPANS = 65_536
"""Spans that wait for their export: at 2,000 requests a second with five spans each, some seconds."""
_MAX_BATCH_SPANS = 2_048
_END_S = 3.0
"""What a receiver gets to take the last telemetry of a process that ends."""

Dropped = Callable[[str, int], None]
"""Told of a signal (traces, metrics) and how much of it was given up."""


class _Outcomes:
    """Counts what was given up of one signal, and tells the log when that begins and ends."""

    def __init__(self, signal: str, dropped: Dropped) -> None:
        self._signal = signal
        self._dropped = dropped
        self._is_failing = False

    def sent(self) -> None:
        """An export was taken."""
        if self._is_failing:
            _log.info("OTLP: the receiver takes %s again", self._signal)
        self._is_failing = False

    def lost(self, count: int) -> None:
        """An export failed for good."""
        self._dropped(self._signal, count)
        if not self._is_failing:
            _log.warning("OTLP: the receiver does not take %s; what waits too long for it is dropped", self._signal)
        self._is_failing = True


class Telemetry:
    """What this process exports; `close` sends the rest."""

    def __init__(self, tracing: Tracing, closers: Sequence[Callable[[], None]] = ()) -> None:
        self.tracing = tracing
        self._closers = closers

    def close(self) -> None:
        """Sends what waits and ends; takes a few seconds at most. Blocks: call it from a thread."""
        for close in self._closers:
            close()


def open_telemetry(settings: ServiceSettings, registry: CollectorRegistry, dropped: Dropped) -> Telemetry:
    """Starts the exports that settings and environment ask for."""
    resource = _resource(settings)
    closers: list[Callable[[], None]] = []
    tracing: Tracing = NoTracing()
    if _is_wanted(settings, "traces"):
        processor = _processor(_CountingSpans(_span_exporter(settings), _Outcomes("traces", dropped)))
        tracing = OtelTracing(processor, _sampler(settings.trace_sample), resource)
        closers.append(processor.shutdown)
    if _is_wanted(settings, "metrics"):
        exporter = RegistryExport(registry, _metric_exporter(settings), resource, _Outcomes("metrics", dropped))
        exporter.start()
        closers.append(exporter.close)
    return Telemetry(tracing, closers)


@asynccontextmanager
async def exporting(settings: ServiceSettings, registry: CollectorRegistry, dropped: Dropped) -> AsyncIterator[Tracing]:
    """Exports while the block runs; its end sends what waits, without holding the event loop up."""
    telemetry = open_telemetry(settings, registry, dropped)
    try:
        yield telemetry.tracing
    finally:
        await asyncio.to_thread(telemetry.close)


class RegistryExport:
    """Sends a prometheus_client registry every few seconds."""

    def __init__(
        self, registry: CollectorRegistry, exporter: MetricExporter, resource: Resource, outcomes: _Outcomes
    ) -> None:
        self._registry = registry
        self._exporter = exporter
        self._resource = resource
        self._outcomes = outcomes
        self._interval_s = float(os.environ.get(_INTERVAL) or _INTERVAL_MS) / 1000
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)

    def start(self) -> None:
        """Begins; the first export follows an interval later."""
        self._thread.start()

    def close(self) -> None:
        """Exports once more and ends."""
        self._stop.set()
        self._thread.join(_END_S)
        self._exporter.shutdown(timeout_millis=_END_S * 1000)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._export()
        self._export()

    def _export(self) -> None:
        try:
            result = self._exporter.export(metrics_data(self._registry, self._resource))
        except Exception:  # noqa: BLE001 - the thread's boundary: telemetry must not end with its first failure
            _log.exception("an export of metrics failed")
            result = MetricExportResult.FAILURE
        if result is MetricExportResult.SUCCESS:
            self._outcomes.sent()
        else:
            self._outcomes.lost(1)


class _CountingSpans(SpanExporter):
    """An exporter that tells what it could not send."""

    def __init__(self, exporter: SpanExporter, outcomes: _Outcomes) -> None:
        self._exporter = exporter
        self._outcomes = outcomes

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends spans; a failure is counted."""
        result = self._exporter.export(spans)
        if result is SpanExportResult.SUCCESS:
            self._outcomes.sent()
        else:
            self._outcomes.lost(len(spans))
        return result

    def shutdown(self) -> None:
        """Ends the exporter."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Passes it on."""
        return self._exporter.force_flush(timeout_millis)


def _is_wanted(settings: ServiceSettings, signal: str) -> bool:
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if os.environ.get(f"OTEL_{signal.upper()}_EXPORTER", "otlp") == "none":
        return False
    return bool(settings.otlp_endpoint) or any(os.environ.get(name) for name in _ENDPOINTS[signal])


def _protocol(settings: ServiceSettings, signal: str) -> str:
    named = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL"
    )
    return settings.otlp_protocol or named or "grpc"


def _target(settings: ServiceSettings, signal: str) -> Mapping[str, Any]:
    """Where to: a flag's URL; else the exporter reads its variables itself."""
    if not settings.otlp_endpoint:
        return {"timeout": _TIMEOUT_S}
    url = settings.otlp_endpoint.rstrip("/")
    if _protocol(settings, signal) == "grpc":
        return {"endpoint": url, "insecure": url.startswith("http://"), "timeout": _TIMEOUT_S}
    return {"endpoint": f"{url}/v1/{signal}", "timeout": _TIMEOUT_S}


def _span_exporter(settings: ServiceSettings) -> SpanExporter:
    exporter: type[Any]
    if _protocol(settings, "traces") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as exporter
    else:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as exporter
    made: SpanExporter = exporter(**_target(settings, "traces"))
    return made


def _metric_exporter(settings: ServiceSettings) -> MetricExporter:
    exporter: type[Any]
    if _protocol(settings, "metrics") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as exporter
    else:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as exporter
    made: MetricExporter = exporter(**_target(settings, "metrics"))
    return made


def _processor(exporter: SpanExporter) -> BatchSpanProcessor:
    """The SDK's, with a queue that takes a burst; the standard variables come first."""
    return BatchSpanProcessor(
        exporter,
        max_queue_size=_from_environment("OTEL_BSP_MAX_QUEUE_SIZE", _MAX_SPANS),
        max_export_batch_size=_from_environment("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", _MAX_BATCH_SPANS),
    )


def _from_environment(name: str, default: int) -> int | None:
    """None where the variable is set: the SDK reads it."""
    return None if os.environ.get(name) else default


def _sampler(ratio: float) -> Sampler:
    """What OTEL_TRACES_SAMPLER names, as the SDK reads it; else ours."""
    if os.environ.get("OTEL_TRACES_SAMPLER"):
        return TracerProvider(shutdown_on_exit=False).sampler
    return ParentBased(TraceIdRatioBased(ratio))


def _resource(settings: ServiceSettings) -> Resource:
    """Who we are; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES come first."""
    ours = {
        "service.name": f"twostroke-{settings.role}",
        "service.namespace": settings.cluster,
        "service.instance.id": settings.id,
        "service.version": importlib.metadata.version("twostroke"),
    }
    return Resource(ours).merge(OTELResourceDetector().detect())
