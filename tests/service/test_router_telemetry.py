"""A router's spans and metrics at an OTLP receiver, and its explanations, with scripted workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
import pytest_asyncio
from twostroke_proto.v1 import inference_pb2, inference_pb2_grpc, types_pb2, worker_pb2

from tests.support.otlp_receiver import OtlpReceiver, Span
from tests.support.router import Pool, Router, chat, completion, model, pool, tokenizer, until_workers
from tests.support.servers import EtcdServer, RedisServer

__all__ = ["model", "pool", "tokenizer"]

pytestmark = pytest.mark.service

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
GIVEN = f"00-{TRACE_ID}-b7ad6b7169203331-01"
ROOT = {"chat tiny", "text_completion tiny"}
KEYS = "alice:key-of-alice\nbob:key-of-bob\n"
ALICE, BOB = {"Authorization": "Bearer key-of-alice"}, {"Authorization": "Bearer key-of-bob"}


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EtcdServer, RedisServer]]:
    folder = tmp_path_factory.mktemp("stores")
    with EtcdServer(folder / "etcd") as etcd, RedisServer(folder / "redis") as redis:
        yield etcd, redis


@pytest.fixture(scope="module")
def routers(
    tmp_path_factory: pytest.TempPathFactory,
    model: Path,
    receiver: OtlpReceiver,
    stores: tuple[EtcdServer, RedisServer],
) -> Iterator[tuple[Router, Router]]:
    """Two of one cluster: one sends over gRPC, one over HTTP."""
    folder = tmp_path_factory.mktemp("routers")
    (folder / "keys").write_text(KEYS)
    common = ["--api-keys-file", str(folder / "keys"), "--log-format", "json", "--log-level", "debug"]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_METRIC_EXPORT_INTERVAL", "300")
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        first = Router(folder / "a", *stores, model, "--id", "router-a", "--otlp-endpoint", receiver.grpc, *common)
        # The standard variables alone do as well as flags.
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.http)
        environment.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        second = Router(folder / "b", *stores, model, "--id", "router-b", *common)
    yield first, second
    for router in (first, second):
        assert router.stop() == 0, router.log()
        assert "Traceback" not in router.log()


@pytest.fixture
def router(routers: tuple[Router, Router]) -> Router:
    return routers[0]


@pytest_asyncio.fixture
async def http(router: Router) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=router.url, trust_env=False, timeout=30, headers=ALICE) as client:
        yield client


@pytest_asyncio.fixture
async def other(routers: tuple[Router, Router]) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=routers[1].url, trust_env=False, timeout=30, headers=ALICE) as client:
        yield client


async def trace_of(receiver: OtlpReceiver, trace_id: str) -> tuple[Span, list[Span]]:
    """The request's root span, once it came, and the spans under it."""
    await asyncio.to_thread(
        receiver.until, lambda: any(span.name in ROOT for span in receiver.trace(trace_id)), 20, f"trace {trace_id}"
    )
    spans = receiver.trace(trace_id)
    (root,) = [span for span in spans if span.name in ROOT]
    rest = [span for span in spans if span is not root]
    assert all(span.parent_id == root.span_id for span in rest)
    assert all(root.start_ns <= span.start_ns <= span.end_ns <= root.end_ns for span in rest)
    return root, rest


async def explanation(http: httpx.AsyncClient, request_id: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while (response := await http.get(f"/requests/{request_id}")).status_code == 404:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    found: dict[str, Any] = response.json()
    return found


async def test_an_answer_is_one_trace_under_its_callers_span(
    http: httpx.AsyncClient, pool: Pool, receiver: OtlpReceiver
) -> None:
    prefill, decode = await pool.pair()
    headers = {"traceparent": GIVEN, "X-Request-Id": "plain"}
    assert (await http.post("/v1/chat/completions", json=chat(), headers=headers)).status_code == 200
    root, children = await trace_of(receiver, TRACE_ID)
    assert root.parent_id == "b7ad6b7169203331"
    assert (root.name, root.kind, root.is_error) == ("chat tiny", 2, False)
    assert [span.name for span in children] == ["admission", "placement", "reserve"]
    for kind, worker in (("submit", prefill), ("reserve", decode)):
        assert worker.of_kind(kind)[-1].traceparent == f"00-{TRACE_ID}-{root.span_id}-01"
    facts = root.attributes
    assert facts["gen_ai.operation.name"] == "chat"
    assert facts["gen_ai.request.model"] == facts["gen_ai.response.model"] == "tiny"
    assert (facts["gen_ai.response.id"], facts["gen_ai.response.finish_reasons"]) == ("plain", ["stop"])
    assert facts["gen_ai.usage.input_tokens"] == 23
    assert facts["gen_ai.usage.output_tokens"] > 1
    assert "What is it" not in json.dumps(facts), "prompts are no part of a trace"
    assert root.events[:5] == ["received", "admitted", "placed", "reserved", "first_token"]
    assert "finished" in root.events
    stages = root.facts["waterfall.ttft"]
    total_s = stages.pop("twostroke.total_s")
    assert sum(stages.values()) == pytest.approx(total_s)
    (placement,) = [span for span in children if span.name == "placement"]
    assert placement.attributes["twostroke.placement.prefill"] == "p0"


async def test_colocated_cancelled_and_failed_requests_are_whole_traces(
    http: httpx.AsyncClient, pool: Pool, receiver: OtlpReceiver
) -> None:
    worker = await pool.add("decode", "d0")
    await pool.settle()
    for request_id in ("colocated", "cancelled", "failed"):
        worker.pace_s = 0.2 if request_id == "cancelled" else 0.0
        worker.fail_next = [worker_pb2.ERROR_CODE_NUMERIC] if request_id == "failed" else []
        with contextlib.suppress(httpx.ReadTimeout):
            timeout = 0.5 if request_id == "cancelled" else 30
            await http.post("/v1/completions", json=completion(), headers={"X-Request-Id": request_id}, timeout=timeout)
    found = {name: await explanation(http, name) for name in ("colocated", "cancelled", "failed")}
    assert {name: each["outcome"] for name, each in found.items()} == {
        "colocated": "stop",
        "cancelled": "cancelled",
        "failed": "internal",
    }
    assert len({each["trace_id"] for each in found.values()}) == 3
    for name, each in found.items():
        root, children = await trace_of(receiver, each["trace_id"])
        assert root.parent_id == ""
        assert root.is_error is (name == "failed")
        assert [span.name for span in children] == ["admission", "placement"]
        assert {"colocated": "finished", "cancelled": "cancelled", "failed": "failed"}[name] in root.events
    assert [each["stage"] for each in found["colocated"]["waterfalls"]["ttft"]["stages"]] == [
        "admission",
        "placement",
        "prefill_queue",
        "prefill_compute",
        "return",
        "unattributed",
    ]
    assert found["failed"]["waterfalls"] == {"ttft": None, "second_token": None}
    assert not [span for span in receiver.orphans() if span.trace_id != TRACE_ID]


async def test_grpc_calls_are_traced_too(
    router: Router, http: httpx.AsyncClient, pool: Pool, receiver: OtlpReceiver
) -> None:
    await pool.pair()
    trace_id = "1" * 32
    metadata = (("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"), ("authorization", "Bearer key-of-bob"))
    async with grpc.aio.insecure_channel(router.endpoints["grpc"]) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.GenerateRequest(
            prompt="the dog", request_id="by-grpc", sampling=types_pb2.SamplingParams(max_tokens=4)
        )
        async for _ in stub.Generate(request, metadata=metadata):
            pass
    root, _ = await trace_of(receiver, trace_id)
    assert (root.name, root.attributes["gen_ai.response.id"]) == ("text_completion tiny", "by-grpc")


async def test_any_router_explains_and_a_tenant_sees_its_own(
    http: httpx.AsyncClient, other: httpx.AsyncClient, pool: Pool
) -> None:
    await pool.pair()
    await until_workers(other, {"p0", "d0"})
    for name in ("told-1", "told-2"):
        await http.post("/v1/chat/completions", json=chat(), headers={"X-Request-Id": name})
    mine = await explanation(http, "told-2")
    assert await explanation(other, "told-2") == mine
    assert mine["router_id"] == "router-a"
    assert mine["placement"]["prefill"] == mine["first_token_worker"] == "p0"
    assert mine["token_worker"] == "d0"
    assert "prefill on p0, decode on d0" in mine["placement"]["reason"]
    assert mine["transfer"]["kv_bytes"] == 4096
    assert set(mine["waterfalls"]["ttft"]) == {"total_s", "stages"}
    listed = (await other.get("/requests", params={"limit": 2})).json()["requests"]
    assert [each["request_id"] for each in listed] == ["told-2", "told-1"], "newest first"
    theirs = await other.get("/requests/told-2", headers=BOB)
    assert theirs.status_code == 404
    assert theirs.json()["error"]["code"] == "request_not_found"
    await http.post("/v1/chat/completions", json=chat(max_tokens=2), headers={**BOB, "X-Request-Id": "told-2"})
    async with asyncio.timeout(10):
        while (await other.get("/requests/told-2", headers=BOB)).status_code == 404:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert (await other.get("/requests/told-2")).json() == mine, "ids of tenants do not meet"
    seen = {each["request_id"] for each in (await other.get("/requests", headers=BOB)).json()["requests"]}
    assert "told-1" not in seen
    assert (await other.get("/requests", headers={"Authorization": ""})).status_code == 401


async def test_each_prompt_of_a_call_is_explained(http: httpx.AsyncClient, pool: Pool) -> None:
    await pool.pair()
    body = completion(prompt=["the dog", "the fox jumps"])
    await http.post("/v1/completions", json=body, headers={"X-Request-Id": "two"})
    assert (await explanation(http, "two"))["outcome"] == (await explanation(http, "two-2"))["outcome"] == "stop"


@pytest.mark.parametrize("limit", ["0", "1001", "x", "-1"])
async def test_a_limit_that_is_none_is_refused(http: httpx.AsyncClient, limit: str) -> None:
    response = await http.get("/requests", params={"limit": limit})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("limit:")


async def test_metrics_leave_by_both_protocols(
    http: httpx.AsyncClient, other: httpx.AsyncClient, pool: Pool, receiver: OtlpReceiver
) -> None:
    await pool.pair()
    await until_workers(other, {"p0", "d0"})
    for client in (http, other):
        assert (await client.post("/v1/chat/completions", json=chat())).status_code == 200

    def services(name: str) -> set[str]:
        return {point.service for point in receiver.points.get(name, ()) if point.value}

    wanted = ("twostroke_stage_seconds", "gen_ai_server_request_duration_seconds", "vllm:generation_tokens_total")
    await asyncio.to_thread(
        receiver.until, lambda: all(services(name) == {"router-a", "router-b"} for name in wanted), 20, "metrics"
    )
    await asyncio.to_thread(
        receiver.until, lambda: {span.service for span in receiver.spans} == {"router-a", "router-b"}, 20, "spans"
    )


async def test_log_lines_are_json_and_carry_the_requests_ids(
    router: Router, http: httpx.AsyncClient, pool: Pool
) -> None:
    await pool.pair()
    await http.post("/v1/chat/completions", json=chat(), headers={"X-Request-Id": "logged", "traceparent": GIVEN})
    lines = [json.loads(line) for line in router.log().splitlines()]
    about = [line for line in lines if line.get("request_id") == "logged"]
    assert [line["trace_id"] for line in about] == [TRACE_ID] * len(about) != []
    assert {"time", "level", "role", "id", "pid", "logger", "message"} <= set(about[0])
    assert "key-of-alice" not in router.log()


async def test_without_redis_each_router_still_knows_its_own(
    http: httpx.AsyncClient, pool: Pool, stores: tuple[EtcdServer, RedisServer]
) -> None:
    await pool.pair()
    stores[1].kill()
    try:
        response = await http.post("/v1/chat/completions", json=chat(), headers={"X-Request-Id": "alone"})
        assert response.status_code == 200
        assert (await explanation(http, "alone"))["outcome"] == "stop"
        listed = (await http.get("/requests", params={"limit": 1})).json()["requests"]
        assert [each["request_id"] for each in listed] == ["alone"]
    finally:
        stores[1].start()


async def test_a_receiver_that_is_away_costs_telemetry_only(
    tmp_path: Path, model: Path, stores: tuple[EtcdServer, RedisServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
    router = Router(tmp_path / "lonely", *stores, model, "--cluster", "lonely", "--otlp-endpoint", "http://127.0.0.1:9")
    async with httpx.AsyncClient(base_url=router.url, trust_env=False, timeout=30) as http:
        nothing = 'twostroke_telemetry_dropped_total{signal="metrics"} 0.0'
        async with asyncio.timeout(20):
            while nothing in (await http.get("/metrics")).text:  # noqa: ASYNC110 - another process's state
                await asyncio.sleep(0.1)
    assert router.stop() == 0
    told = [line for line in router.log().splitlines() if "OTLP" in line or "opentelemetry" in line]
    assert len(told) == 1, "once, in our own words"
    assert "does not take metrics" in told[0]
