"""Every metric's name, label and bucket, in one place; services measure, this module publishes."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from twostroke_proto.v1 import worker_pb2

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)


class RouterMetrics:
    """What a router measures itself, and what its workers report."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "twostroke_requests", "Requests by their end.", ("endpoint", "outcome"), registry=self.registry
        )
        """endpoint: chat, completions, generate; outcome: stop, length, cancelled, or an error code in lower case."""
        self.requests_active = Gauge("twostroke_requests_active", "Requests not yet ended.", registry=self.registry)
        self.tokens = Counter("twostroke_tokens", "Tokens billed.", ("kind",), registry=self.registry)
        """kind: prompt, cached (of the prompt), completion."""
        self.placements = Counter("twostroke_placements", "Placements by reason.", ("reason",), registry=self.registry)
        self.ttft_s = self._histogram("twostroke_ttft_seconds", "Arrival to the first token.", _LATENCY_S)
        self.itl_s = self._histogram("twostroke_itl_seconds", "Between tokens of one choice.", _TOKEN_S)
        self.second_token_s = self._histogram("twostroke_second_token_seconds", "First token to second.", _LATENCY_S)
        self.e2e_s = self._histogram("twostroke_e2e_seconds", "Arrival to the end.", _LATENCY_S)
        self.workers = WorkerCollector()
        self.registry.register(self.workers)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, documentation, buckets=buckets, registry=self.registry)


class WorkerCollector(Collector):
    """Metrics of workers from the load each reported last; a worker that has left leaves no series behind."""

    def __init__(self) -> None:
        self._loads: dict[tuple[str, str], worker_pb2.WorkerLoad] = {}

    def report(self, worker_id: str, role: str, load: worker_pb2.WorkerLoad) -> None:
        """Takes a worker's latest load."""
        self._loads[worker_id, role] = load

    def forget(self, worker_id: str) -> None:
        """The worker has left."""
        self._loads = {key: load for key, load in self._loads.items() if key[0] != worker_id}

    def describe(self) -> Iterator[Metric]:
        """The families, empty; lets the registry see clashes without a scrape."""
        return iter(_families())

    def collect(self) -> Iterator[Metric]:
        """The families with a sample of every worker."""
        families = _families()
        for worker, load in self._loads.items():
            for family, values in zip(families, _values(load), strict=True):
                for more, value in values.items():
                    family.add_metric((*worker, *more), value)
        return iter(families)


def _families() -> list[GaugeMetricFamily | CounterMetricFamily]:
    gauge, counter = GaugeMetricFamily, CounterMetricFamily
    worker = ("worker", "role")
    return [
        gauge("twostroke_kv_blocks", "KV blocks by state.", labels=(*worker, "state")),
        gauge("twostroke_kv_leases_open", "KV leases not yet closed.", labels=worker),
        gauge("twostroke_sequences", "Sequences by state.", labels=(*worker, "state")),
        gauge("twostroke_queued_tokens", "Prompt tokens still to compute.", labels=worker),
        gauge("twostroke_step_seconds", "Moving average of a step's time.", labels=worker),
        gauge("twostroke_longest_wait_seconds", "Longest arrival to first scheduled so far.", labels=worker),
        counter("twostroke_steps", "Engine steps.", labels=worker),
        counter("twostroke_kv_transferred_bytes", "KV payload sent or received.", labels=worker),
        counter("twostroke_kv_digest_failures", "Segments whose digest did not match.", labels=worker),
        counter("twostroke_preemptions", "Sequences preempted.", labels=worker),
        counter("twostroke_prefix_tokens", "Prompt tokens by prefix cache result.", labels=(*worker, "result")),
    ]


def _values(load: worker_pb2.WorkerLoad) -> tuple[dict[tuple[str, ...], float], ...]:
    """A worker's samples, in the order of `_families`."""
    missed = max(0, load.prefix_query_tokens - load.prefix_hit_tokens)
    return (
        {
            ("free",): load.blocks_free,
            ("cached",): load.blocks_cached,
            ("leased",): load.blocks_leased,
            ("promised",): load.blocks_promised,
        },
        {(): load.leases_open},
        {("waiting",): load.waiting, ("running",): load.running},
        {(): load.queued_tokens},
        {(): load.step_s},
        {(): load.longest_wait_s},
        {(): load.steps},
        {(): load.kv_bytes},
        {(): load.digest_failures},
        {(): load.preemptions},
        {("hit",): load.prefix_hit_tokens, ("miss",): missed},
    )


def metrics_text(registry: CollectorRegistry) -> bytes:
    """What a scrape gets, in Prometheus' text format (`CONTENT_TYPE`)."""
    return generate_latest(registry)
