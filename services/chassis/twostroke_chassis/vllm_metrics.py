"""The names that dashboards, autoscalers and endpoint pickers know from vLLM, over what is measured here.

Routers show what concerns requests, workers what concerns an engine, so that whoever scrapes both counts nothing twice.
Most are views: a family that exists under our name is shown again under vLLM's, and costs nothing until a scrape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from twostroke_proto.v1 import worker_pb2

_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
_FINISHED = {"stop": "stop", "length": "length", "cancelled": "abort"}
"""vLLM's word for an outcome; every other is an error."""

_LABEL = ("model_name",)
LATENCIES = (
    ("vllm:time_to_first_token_seconds", "Time to the first token.", "ttft"),
    ("vllm:inter_token_latency_seconds", "Time between tokens of one choice.", "itl"),
    ("vllm:time_per_output_token_seconds", "The same as vllm:inter_token_latency_seconds, by its older name.", "itl"),
    ("vllm:e2e_request_latency_seconds", "Arrival of a request to its end.", "e2e"),
    ("vllm:request_queue_time_seconds", "Wait for the first step with a prompt.", "queue"),
    ("vllm:request_prefill_time_seconds", "First step with a prompt to its first token.", "prefill"),
)
"""Views of latencies: name, help, and what of ours is shown."""


class RequestView(Protocol):
    """What is shown under vLLM's names of requests."""

    def outcomes(self) -> Mapping[str, float]:
        """Requests by outcome."""
        ...

    def tokens(self) -> Mapping[str, float]:
        """Tokens by kind."""
        ...

    def latency(self, what: str) -> tuple[list[tuple[str, float]], float]:
        """Cumulative buckets (upper bound, count) and sum of a latency of `LATENCIES`."""
        ...


class VllmRequestMetrics(Protocol):
    """Takes in what only vLLM's names show of a request."""

    def ended(self, prompt_tokens: int, completion_tokens: int, decode_s: float | None) -> None:
        """A request with an answer is over; `decode_s` is from its first token to its end."""
        ...


class NoVllmMetrics:
    """`--no-vllm-metrics`."""

    def ended(self, prompt_tokens: int, completion_tokens: int, decode_s: float | None) -> None:
        """Does nothing."""


class RequestFamilies(Collector):
    """A router's share: views, and three histograms of its own."""

    def __init__(self, registry: CollectorRegistry, model_name: str, view: RequestView) -> None:
        self._model_name = model_name
        self._view = view
        self._prompt_tokens = _histogram(registry, "vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._generated = _histogram(registry, "vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._decode_s = _histogram(
            registry, "vllm:request_decode_time_seconds", "First token of a request to its end.", _SECONDS
        )
        for metric in (self._prompt_tokens, self._generated, self._decode_s):
            metric.labels(model_name)
        registry.register(self)

    def ended(self, prompt_tokens: int, completion_tokens: int, decode_s: float | None) -> None:
        """A request with an answer is over."""
        self._prompt_tokens.labels(self._model_name).observe(prompt_tokens)
        self._generated.labels(self._model_name).observe(completion_tokens)
        if decode_s is not None:
            self._decode_s.labels(self._model_name).observe(decode_s)

    def describe(self) -> Iterator[Metric]:
        """The families; they always exist."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """The views."""
        tokens = self._view.tokens()
        yield self._counter("vllm:prompt_tokens", "Prompt tokens processed.", tokens.get("prompt", 0.0))
        yield self._counter("vllm:generation_tokens", "Tokens generated.", tokens.get("completion", 0.0))
        yield self._finished()
        for name, documentation, what in LATENCIES:
            family = HistogramMetricFamily(name, documentation, labels=_LABEL)
            buckets, total_s = self._view.latency(what)
            family.add_metric([self._model_name], buckets, total_s)
            yield family

    def _counter(self, name: str, documentation: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, documentation, labels=_LABEL)
        family.add_metric([self._model_name], value)
        return family

    def _finished(self) -> CounterMetricFamily:
        family = CounterMetricFamily(
            "vllm:request_success", "Requests by their end.", labels=(*_LABEL, "finished_reason")
        )
        counts = dict.fromkeys((*_FINISHED.values(), "error"), 0.0)
        for outcome, count in self._view.outcomes().items():
            counts[_FINISHED.get(outcome, "error")] += count
        for reason, count in counts.items():
            family.add_metric([self._model_name, reason], count)
        return family


class EngineFamilies(Collector):
    """A worker's share, from its latest load."""

    def __init__(self, model_name: str, load: Callable[[], worker_pb2.WorkerLoad]) -> None:
        self._model_name = model_name
        self._load = load

    def describe(self) -> Iterator[Metric]:
        """The families; they always exist."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Samples of the latest load."""
        load = self._load()
        used = load.blocks_leased / load.blocks_total if load.blocks_total else 0.0
        yield self._gauge("vllm:num_requests_running", "Sequences in the batch.", load.running)
        yield self._gauge("vllm:num_requests_waiting", "Requests not yet scheduled.", load.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", used)
        yield self._gauge("vllm:gpu_cache_usage_perc", "The same as vllm:kv_cache_usage_perc, by its older name.", used)
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", load.prefix_query_tokens)
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found in cache.", load.prefix_hit_tokens)
        yield self._counter("vllm:num_preemptions", "Sequences preempted.", load.preemptions)

    def _gauge(self, name: str, documentation: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, documentation, labels=_LABEL)
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, documentation: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(name, documentation, labels=_LABEL)
        family.add_metric([self._model_name], value)
        return family


def _histogram(registry: CollectorRegistry, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, documentation, _LABEL, buckets=buckets, registry=registry)
