"""What the chart starts is what the programs take: every command line is parsed, and one release really runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from twostroke_decode.service import DecodeSettings
from twostroke_prefill.service import PrefillSettings
from twostroke_router.settings import RouterSettings

from tests.support.chart_processes import IP, ChartProcesses, example_release
from tests.support.cluster import wait_until
from tests.support.helm import CHART, Rendered
from tests.support.helm_values import SMALL
from tests.support.tiny_model import make_tiny_llama

SERVICES = {
    "twostroke_router": RouterSettings,
    "twostroke_prefill": PrefillSettings,
    "twostroke_decode": DecodeSettings,
}
EXAMPLES = sorted(path.name for path in (CHART / "examples").glob("*.yaml"))
MUCH: dict[str, Any] = {
    "router": {"apiKeys": {"secretName": "keys"}, "maxConnectionAge": 12.5, "settings": {"placement": "round-robin"}},
    "poolDefaults": {"settings": {"kv-cache-bytes": 17179869184, "batch-invariant": False, "channels": "tcp"}},
    "telemetry": {"otlpEndpoint": "http://otel.test:4317", "vllmMetrics": False, "traceSample": 0.5},
    "redis": {"passwordSecret": {"name": "redis"}},
    "bindHost": "[::]",
}


@pytest.mark.parametrize("values", [(name,) for name in EXAMPLES] + [(SMALL, MUCH)], ids=[*EXAMPLES, "much"])
def test_services_take_their_command_lines(
    values: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chart = Rendered(*values)
    secrets = {"redis": "s3cret", "twostroke-redis": "s3cret", "twostroke-redis-url": "redis://r.test:6379"}
    pods = ChartProcesses(chart, tmp_path, {}, secrets)
    taken = []
    for name in chart.of("Deployment"):
        program = chart.container(name)["command"][-1]
        with monkeypatch.context() as env:
            for variable, value in pods.variables(name).items():
                env.setenv(variable, value)
            settings = SERVICES[program].load(pods.arguments(name), program)
        assert settings.id == f"r-twostroke-{name}-0"
        assert settings.cluster == "ns.r-twostroke"
        taken.append(program)
    assert "twostroke_router" in taken


# ---- a release as processes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChartProcesses]:
    """The CPU example on a tiny model, with a password for Redis and API keys: everything but the images."""
    folder = tmp_path_factory.mktemp("release")
    make_tiny_llama(folder / "model")
    keys = folder / "keys"
    keys.write_text("tester:k3y\n")
    pods = example_release(folder, keys)
    try:
        for name in ("etcd", "redis", "prefill", "decode", "router"):
            pods.start(name)
        pods.wait(lambda: pods.ask("/ready").is_success, 90, "the release is ready")
        yield pods
    finally:
        statuses = pods.stop()
    assert {name: statuses[name] for name in ("router", "prefill", "decode")} == dict.fromkeys(
        ("router", "prefill", "decode"), 0
    )


@pytest.mark.e2e
def test_a_release_answers_over_both_pools(release: ChartProcesses) -> None:
    body = {"prompt": "the quick brown fox", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    assert release.ask("/v1/completions", body, key="wrong").status_code == 401
    answer = release.ask("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8

    def workers_now() -> dict[str, dict[str, Any]]:
        return {worker["id"]: worker for worker in release.ask("/cluster").json()["workers"]}

    workers = workers_now()
    assert set(workers) == {"r-twostroke-prefill-0", "r-twostroke-decode-0"}
    assert {worker["endpoint"] for worker in workers.values()} == {
        f"{IP}:{release.port(name, 9000)}" for name in ("prefill", "decode")
    }
    # Its load may come after its tokens.
    wait_until(lambda: workers_now()["r-twostroke-decode-0"]["kv_bytes"] > 0, 10, "KV came from the prefill worker")


@pytest.mark.e2e
def test_probes_and_scrapes_find_what_they_ask(release: ChartProcesses) -> None:
    for name, port in (("router", 8001), ("prefill", 9000), ("decode", 9000)):
        with grpc.insecure_channel(f"{IP}:{release.port(name, port)}") as channel:
            asked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert asked.status == health_pb2.HealthCheckResponse.SERVING, name
    etcd = httpx.get(f"http://{IP}:{release.port('etcd', 2381)}/health?serializable=true", trust_env=False)
    assert etcd.json()["health"] == "true"


@pytest.mark.e2e
def test_what_scales_a_pool_is_a_metric_that_its_workers_have(release: ChartProcesses) -> None:
    chart = Rendered(SMALL, {"poolDefaults": {"hpa": {"enabled": True}}})
    for role in ("prefill", "decode"):
        shown = httpx.get(f"http://{IP}:{release.port(role, 9001)}/metrics", trust_env=False).text
        for metric in chart.spec("HorizontalPodAutoscaler", role)["metrics"]:
            asked = metric["pods"]["metric"]
            labels = asked.get("selector", {}).get("matchLabels", {})
            lines = [line for line in shown.splitlines() if re.match(rf"{asked['name']}\{{", line)]
            assert [line for line in lines if all(f'{k}="{v}"' in line for k, v in labels.items())], asked
