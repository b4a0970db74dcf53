"""A registry's families leave by OTLP as what they are, under names that come back as those of /metrics."""

from __future__ import annotations

from typing import Any

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.resources import Resource
from prometheus_client.parser import text_string_to_metric_families
from twostroke_chassis.otlp_metrics import metrics_data
from twostroke_chassis.telemetry import RouterMetrics, WorkerMetrics, metrics_text
from twostroke_proto.v1 import worker_pb2

from tests.support.otlp_receiver import OtlpReceiver


def received(registry: Any) -> OtlpReceiver:
    receiver = OtlpReceiver()
    receiver.take_metrics(encode_metrics(metrics_data(registry, Resource({"service.instance.id": "r"}))))
    return receiver


def scraped(registry: Any) -> set[str]:
    """Families of a scrape, by the name that a query uses for a whole one; times of creation left out."""
    families = text_string_to_metric_families(metrics_text(registry).decode())
    return {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in families
        if not family.name.endswith("_created") and family.samples
    }


def test_every_family_of_a_router_and_of_a_worker_comes_back_under_its_name() -> None:
    router = RouterMetrics("tiny")
    router.requests.labels("chat", "stop").inc()
    router.workers.report("p0", "prefill", worker_pb2.WorkerLoad(blocks_free=3))
    router.tenants.ended("", "stop")
    router.tenants.used("", "prompt", 3)
    assert received(router.registry).metric_names() == scraped(router.registry)
    worker = WorkerMetrics("p0", "prefill", "tiny")
    assert received(worker.registry).metric_names() == scraped(worker.registry)
    assert "vllm:num_requests_waiting" in scraped(worker.registry)


def test_values_and_attributes_are_those_of_a_scrape() -> None:
    metrics = RouterMetrics("tiny")
    for seconds in (0.02, 0.02, 7.0):
        metrics.ttft_s.observe(seconds)
    metrics.requests.labels("chat", "stop").inc(3)
    metrics.gen_ai.ended("chat", "deadline", 2.0)
    receiver = received(metrics.registry)
    (ttft,) = receiver.points["twostroke_ttft_seconds"]
    assert (ttft.value, ttft.total) == (3, 7.04)
    counts = {
        (point.attributes["endpoint"], point.attributes["outcome"]): point.value
        for point in receiver.points["twostroke_requests_total"]
    }
    assert counts["chat", "stop"] == 3
    durations = receiver.points["gen_ai_server_request_duration_seconds"]
    (failed,) = [point for point in durations if point.attributes.get("error.type") == "deadline"]
    assert failed.attributes["gen_ai.operation.name"] == "chat"
    assert failed.attributes["gen_ai.request.model"] == "tiny"


def test_vllms_names_can_be_left_out() -> None:
    names = scraped(RouterMetrics("tiny", has_vllm_names=False).registry)
    names |= scraped(WorkerMetrics("w", "decode", "tiny", has_vllm_names=False).registry)
    assert not [name for name in names if name.startswith("vllm:")]
    assert "twostroke_ttft_seconds" in names


def test_vllms_names_show_what_ours_do() -> None:
    metrics = RouterMetrics("tiny")
    for outcome in ("stop", "length", "cancelled", "deadline", "unavailable"):
        metrics.requests.labels("chat", outcome).inc()
    metrics.itl_s.observe(0.004)
    metrics.stages.observe("ttft", [("prefill_queue", 0.3)])
    metrics.vllm.ended(10, 5, 0.4)
    points = received(metrics.registry).points
    reasons = {point.attributes["finished_reason"]: point.value for point in points["vllm:request_success_total"]}
    assert reasons == {"stop": 1, "length": 1, "abort": 1, "error": 2}
    assert [point.value for point in points["vllm:inter_token_latency_seconds"]] == [1]
    assert [point.total for point in points["vllm:request_queue_time_seconds"]] == [0.3]
    assert [point.total for point in points["vllm:request_prompt_tokens"]] == [10]
    worker = WorkerMetrics("w", "decode", "tiny")
    worker.load = lambda: worker_pb2.WorkerLoad(blocks_total=10, blocks_leased=4, waiting=2)
    points = received(worker.registry).points
    assert [point.value for point in points["vllm:kv_cache_usage_perc"]] == [0.4]
    assert [point.value for point in points["vllm:num_requests_waiting"]] == [2]
