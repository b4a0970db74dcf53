"""Every metric's name, label and bucket, in one place; services measure, this module publishes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from twostroke_proto.v1 import worker_pb2

from twostroke_chassis.cluster_metrics import OUTCOMES, TOKEN_KINDS, ClusterMetrics, TenantMetrics
from twostroke_chassis.loop_clock import turns_of_this_loop
from twostroke_chassis.request_metrics import GenAiMetrics, StageMetrics, dropped_counter
from twostroke_chassis.vllm_metrics import EngineFamilies, NoVllmMetrics, RequestFamilies, VllmRequestMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

ENDPOINTS = ("chat", "completions", "generate")
PLACEMENT_KINDS = ("disaggregated", "colocated", "prefill_only")

_LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)


class RouterMetrics:
    """What a router measures itself, and what its workers report."""

    def __init__(self, model_name: str = "", *, has_vllm_names: bool = True) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "twostroke_requests", "Requests by their end.", ("endpoint", "outcome"), registry=self.registry
        )
        """endpoint: chat, completions, generate; outcome: stop, length, cancelled, or an error code in lower case."""
        self.requests_active = Gauge("twostroke_requests_active", "Requests not yet ended.", registry=self.registry)
        self.tokens = Counter("twostroke_tokens", "Tokens billed.", ("kind",), registry=self.registry)
        """kind: prompt, cached (of the prompt), completion."""
        self.placements = Counter("twostroke_placements", "Placements by reason.", ("reason",), registry=self.registry)
        self.retries = Counter(
            "twostroke_retries",
            "Requests placed again after a failure, by its kind.",
            ("fault",),
            registry=self.registry,
        )
        self.ttft_s = self._histogram("twostroke_ttft_seconds", "Arrival to the first token.", _LATENCY_S)
        self.itl_s = self._histogram("twostroke_itl_seconds", "Between tokens of one choice.", _TOKEN_S)
        self.second_token_s = self._histogram("twostroke_second_token_seconds", "First token to second.", _LATENCY_S)
        self.e2e_s = self._histogram("twostroke_e2e_seconds", "Arrival to the end.", _LATENCY_S)
        self.stages = StageMetrics(self.registry)
        self.gen_ai = GenAiMetrics(self.registry, model_name)
        self.cluster = ClusterMetrics(self.registry)
        self.tenants = TenantMetrics(self.registry)
        self.workers = WorkerCollector()
        self.registry.register(self.workers)
        self.registry.register(turns_of_this_loop())
        self._start()
        self.vllm: VllmRequestMetrics = (
            RequestFamilies(self.registry, model_name, _View(self)) if has_vllm_names else NoVllmMetrics()
        )

    def _start(self) -> None:
        """Makes every series that a rate needs to exist before its first event."""
        for endpoint in ENDPOINTS:
            for outcome in OUTCOMES:
                self.requests.labels(endpoint, outcome)
        for counter, values in (
            (self.tokens, TOKEN_KINDS),
            (self.placements, PLACEMENT_KINDS),
            (self.retries, ("overloaded", "unavailable", "internal")),
        ):
            for value in values:
                counter.labels(value)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, documentation, buckets=buckets, registry=self.registry)


class _View:
    """What the router's metrics hold now, for vLLM's names."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        self._latencies: Mapping[str, tuple[Histogram, Mapping[str, str]]] = {
            "ttft": (metrics.ttft_s, {}),
            "itl": (metrics.itl_s, {}),
            "e2e": (metrics.e2e_s, {}),
            "queue": (metrics.stages.seconds, {"waterfall": "ttft", "stage": "prefill_queue"}),
            "prefill": (metrics.stages.seconds, {"waterfall": "ttft", "stage": "prefill_compute"}),
        }

    def outcomes(self) -> Mapping[str, float]:
        """Requests by outcome."""
        return _totals(self._metrics.requests, "outcome")

    def tokens(self) -> Mapping[str, float]:
        """Tokens by kind."""
        return _totals(self._metrics.tokens, "kind")

    def latency(self, what: str) -> tuple[list[tuple[str, float]], float]:
        """Cumulative buckets and sum."""
        histogram, wanted = self._latencies[what]
        buckets, total_s = [], 0.0
        for sample in next(iter(histogram.collect())).samples:
            bound = sample.labels.get("le")
            if {key: value for key, value in sample.labels.items() if key != "le"} != wanted:
                continue
            if bound is not None:
                buckets.append((bound, sample.value))
            elif sample.name.endswith("_sum"):
                total_s = sample.value
        return buckets, total_s


def _totals(counter: Counter, label: str) -> Mapping[str, float]:
    totals: dict[str, float] = {}
    for sample in next(iter(counter.collect())).samples:
        if sample.name.endswith("_total"):
            totals[sample.labels[label]] = totals.get(sample.labels[label], 0.0) + sample.value
    return totals


class WorkerMetrics(Collector):
    """What a worker shows of itself: the families that a router shows of all its workers, for one."""

    def __init__(self, worker_id: str, role: str, model_name: str, *, has_vllm_names: bool = True) -> None:
        self.registry = CollectorRegistry()
        self.load: Callable[[], worker_pb2.WorkerLoad] = worker_pb2.WorkerLoad
        """Asked at every scrape and export, from any thread."""
        self._worker = (worker_id, role)
        self._dropped = dropped_counter(self.registry)
        self.registry.register(self)
        self.registry.register(turns_of_this_loop())
        if has_vllm_names:
            self.registry.register(EngineFamilies(model_name, lambda: self.load()))

    def dropped(self, signal: str, count: int) -> None:
        """Some telemetry was given up."""
        self._dropped.labels(signal).inc(count)

    def collect(self) -> Iterator[Metric]:
        """The worker's families now."""
        families = WorkerCollector()
        families.report(*self._worker, self.load())
        return families.collect()


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
        for worker, load in list(self._loads.items()):  # an export runs in a thread of its own
            for family, values in zip(families, _values(load), strict=True):
                for more, value in values.items():
                    family.add_metric((*worker, *more), value)
        return iter(families)


def _families() -> list[GaugeMetricFamily | CounterMetricFamily]:
    gauge, counter = GaugeMetricFamily, CounterMetricFamily
    worker = ("worker", "role")
    return [
        gauge("twostroke_kv_blocks", "KV blocks by state.", labels=(*worker, "state")),
        gauge("twostroke_kv_usage_ratio", "Share of KV blocks that sequences hold.", labels=worker),
        gauge("twostroke_kv_leases_open", "KV leases not yet closed.", labels=worker),
        gauge("twostroke_sequences", "Sequences by state.", labels=(*worker, "state")),
        gauge("twostroke_queued_tokens", "Prompt tokens still to compute.", labels=worker),
        gauge("twostroke_step_seconds", "Moving average of a step's time.", labels=worker),
        gauge("twostroke_longest_wait_seconds", "Longest arrival to first scheduled so far.", labels=worker),
        counter("twostroke_steps", "Engine steps.", labels=worker),
        counter("twostroke_kv_transferred_bytes", "KV payload sent or received.", labels=worker),
        counter("twostroke_kv_digest_failures", "Segments whose digest did not match.", labels=worker),
        counter("twostroke_kv_faults", "Faults of KV hand-offs that were noticed.", labels=(*worker, "fault")),
        gauge("twostroke_kv_blocks_quarantined", "KV blocks given up that may still be written to.", labels=worker),
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
        {(): load.blocks_leased / load.blocks_total if load.blocks_total else 0.0},
        {(): load.leases_open},
        {("waiting",): load.waiting, ("running",): load.running},
        {(): load.queued_tokens},
        {(): load.step_s},
        {(): load.longest_wait_s},
        {(): load.steps},
        {(): load.kv_bytes},
        {(): load.digest_failures},
        {
            ("resent",): load.kv_resends,
            ("stale",): load.kv_stale,
            ("broken_pair",): load.kv_broken_pairs,
            ("failed",): load.kv_failed,
        },
        {(): load.kv_quarantined},
        {(): load.preemptions},
        {("hit",): load.prefix_hit_tokens, ("miss",): missed},
    )


def metrics_text(registry: CollectorRegistry) -> bytes:
    """What a scrape gets, in Prometheus' text format (`CONTENT_TYPE`)."""
    return generate_latest(registry)
