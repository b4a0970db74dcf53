"""What a scrape shows."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from twostroke_chassis.telemetry import RouterMetrics, metrics_text
from twostroke_proto.v1 import worker_pb2


def samples(metrics: RouterMetrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = metrics_text(metrics.registry).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(metrics: RouterMetrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


def test_requests_and_latencies() -> None:
    metrics = RouterMetrics()
    metrics.requests.labels("chat", "stop").inc()
    metrics.ttft_s.observe(0.03)
    metrics.tokens.labels("completion").inc(7)
    assert value(metrics, "twostroke_requests_total", endpoint="chat", outcome="stop") == 1
    assert value(metrics, "twostroke_ttft_seconds_bucket", le="0.05") == 1
    assert value(metrics, "twostroke_ttft_seconds_bucket", le="0.025") == 0
    assert value(metrics, "twostroke_tokens_total", kind="completion") == 7


def test_workers_show_their_latest_load_until_they_leave() -> None:
    metrics = RouterMetrics()
    load = worker_pb2.WorkerLoad(
        blocks_free=5, blocks_cached=3, kv_bytes=1 << 40, preemptions=2, prefix_hit_tokens=30, prefix_query_tokens=100
    )
    metrics.workers.report("p0", "prefill", worker_pb2.WorkerLoad(kv_bytes=1))
    metrics.workers.report("p0", "prefill", load)
    metrics.workers.report("d0", "decode", worker_pb2.WorkerLoad(blocks_free=9))
    assert value(metrics, "twostroke_kv_blocks", worker="p0", role="prefill", state="free") == 5
    assert value(metrics, "twostroke_kv_blocks", worker="p0", role="prefill", state="cached") == 3
    assert value(metrics, "twostroke_kv_blocks", worker="d0", role="decode", state="free") == 9
    assert value(metrics, "twostroke_kv_transferred_bytes_total", worker="p0", role="prefill") == 1 << 40
    assert value(metrics, "twostroke_preemptions_total", worker="p0", role="prefill") == 2
    assert value(metrics, "twostroke_prefix_tokens_total", worker="p0", role="prefill", result="miss") == 70
    metrics.workers.forget("p0")
    assert not [labels for _, labels in samples(metrics) if ("worker", "p0") in labels]
    assert value(metrics, "twostroke_kv_blocks", worker="d0", role="decode", state="free") == 9
