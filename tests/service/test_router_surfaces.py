"""What a router offers: HTTP, gRPC, errors, keys, and its process's start and end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import openai
import pytest
from tokenizers import Tokenizer
from twostroke_proto.v1 import inference_pb2, inference_pb2_grpc, types_pb2

from tests.support.router import (
    ANSWER,
    Pool,
    Router,
    completion,
    http,
    model,
    pool,
    router,
    tokenizer,
    until,
)
from tests.support.servers import RedisServer

__all__ = ["http", "model", "pool", "router", "tokenizer"]
pytestmark = pytest.mark.service


async def test_official_client(pool: Pool, router: Router) -> None:
    await pool.pair()
    client = openai.AsyncOpenAI(
        base_url=f"{router.url}/v1",
        api_key="unused",
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
    )
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).id == "tiny"
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    answer = await client.chat.completions.create(model="tiny", messages=messages, n=2, seed=3)
    assert [choice.message.content for choice in answer.choices] == [ANSWER, ANSWER]
    stream = await client.chat.completions.create(model="tiny", messages=messages, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == ANSWER
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="other", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        await client.completions.create(model="tiny", prompt=[5] * 300, max_tokens=1)
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as unknown:
        await client.completions.create(model="tiny", prompt="a", extra_body={"beam_width": 2})
    assert unknown.value.param == "beam_width"
    again = [*messages, answer.choices[0].message.model_dump(), messages[0]]
    assert (await client.chat.completions.create(model="tiny", messages=again)).choices


async def test_grpc(pool: Pool, router: Router, tokenizer: Tokenizer) -> None:
    prefill, decode = await pool.pair()
    options = [("grpc.enable_http_proxy", 0)]
    async with grpc.aio.insecure_channel(router.endpoints["grpc"], options=options) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        sampling = types_pb2.SamplingParams(temperature=0, max_tokens=200)
        request = inference_pb2.GenerateRequest(prompt="the dog", sampling=sampling, n=2)
        messages = [message async for message in stub.Generate(request, timeout=10)]
        for choice in range(2):
            assert "".join(each.text for each in messages if each.choice == choice) == ANSWER
        assert messages[-1].usage.prompt_tokens == len(tokenizer.encode("the dog").ids)
        assert [message.HasField("usage") for message in messages] == [False] * (len(messages) - 1) + [True]
        # gRPC rounds a deadline up on the wire, by a percent.
        assert 5_000 < prefill.of_kind("submit")[0].request.deadline_ms <= 10_200
        for bad, field in [
            (inference_pb2.GenerateRequest(prompt="a", sampling=types_pb2.SamplingParams(top_p=1.5)), "top_p"),
            (
                inference_pb2.GenerateRequest(prompt="a", sampling=types_pb2.SamplingParams(temperature=float("nan"))),
                "te",
            ),
            (inference_pb2.GenerateRequest(), "input"),
            (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[10**6])), "token_ids"),
        ]:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                [message async for message in stub.Generate(bad)]
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert field in (refused.value.details() or "")
        tokens = await stub.Tokenize(inference_pb2.TokenizeRequest(prompt="the dog"))
        assert list(tokens.token_ids) == tokenizer.encode("the dog").ids
        assert tokens.max_model_len == 256
        assert [model.name for model in (await stub.ListModels(inference_pb2.ListModelsRequest())).models] == ["tiny"]

        decode.gate.clear()
        call = stub.Generate(request)
        await call.read()
        call.cancel()
        await until(lambda: not decode.live)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            [message async for message in stub.Generate(request, timeout=0.5)]
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: not decode.live)


async def test_bad_requests_reach_no_worker(pool: Pool, http: httpx.AsyncClient) -> None:
    prefill, decode = await pool.pair()
    for content, status, param in [
        (b"{", 400, None),
        (b'{"model": "tiny", "prompt": "\xff"}', 400, None),
        (b'{"model": "tiny", "prompt": 7}', 400, "prompt"),
        (b'{"model": "other", "prompt": "a"}', 404, "model"),
        (b'{"model": "tiny", "prompt": "a", "temperature": 3}', 400, "temperature"),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": 9999}', 400, "max_tokens"),
        (b'{"model": "tiny", "prompt": "a", "n": 0}', 400, "n"),
        (b'{"model": "tiny", "prompt": "' + b"a" * 70_000 + b'"}', 413, None),
    ]:
        answer = await http.post("/v1/completions", content=content)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert (await http.get("/v1/completions")).status_code == 405
    assert (await http.get("/nothing")).json()["error"]["code"] == "unknown_url"
    assert not prefill.received
    assert not decode.received


async def test_tokenize_and_request_ids(http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    answer = await http.post("/tokenize", json={"prompt": "the dog"}, headers={"X-Request-Id": "mine"})
    assert answer.json()["tokens"] == tokenizer.encode("the dog").ids
    assert answer.headers["x-request-id"] == "mine"
    assert (await http.post("/detokenize", json={"tokens": answer.json()["tokens"]})).json() == {"prompt": "the dog"}
    assert len((await http.get("/health")).headers["x-request-id"]) == 24


async def test_metrics(pool: Pool, http: httpx.AsyncClient) -> None:
    await pool.pair()
    await http.post("/v1/completions", json=completion())
    text = (await http.get("/metrics")).text
    assert 'twostroke_requests_total{endpoint="completions",outcome="stop"}' in text
    assert 'twostroke_kv_blocks{role="decode",state="free",worker="d0"} 100.0' in text


async def test_a_long_prompt_does_not_hold_up_others(http: httpx.AsyncClient) -> None:
    long = asyncio.create_task(http.post("/tokenize", json={"prompt": "the fox, then nothing. " * 2500}))
    slowest = 0.0
    while not long.done():
        begin = time.monotonic()
        await http.get("/health")
        slowest = max(slowest, time.monotonic() - begin)
    assert (await long).json()["count"] > 10_000
    assert slowest < 0.5


def run_router(*flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "twostroke_router", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env={**os.environ, **env})


def test_start_errors_are_one_line(router: Router, tmp_path: Path) -> None:
    model, url = str(router.model), router.etcd.url
    for flags, expected in [
        (["--model-dir", str(tmp_path / "none"), "--etcd", url], "does not exist"),
        (["--model-dir", str(tmp_path), "--etcd", url], "has no tokenizer.json"),
        (["--model-dir", model, "--etcd", url, "--http", router.endpoints["http"]], "--http"),
        (["--model-dir", model, "--etcd", url, "--grpc", router.endpoints["grpc"]], "--grpc"),
        (["--model-dir", model, "--etcd", "http://127.0.0.1:9", "--wait", "0.5"], "etcd"),
    ]:
        done = run_router(*flags)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1, done.stderr
        assert last.startswith("twostroke-router: ")
        assert expected in last
        assert "Traceback" not in done.stderr


def test_the_router_imports_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'safetensors'}"
    code = f"import sys, twostroke_router.__main__; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


async def test_api_keys(router: Router, tmp_path: Path, redis: RedisServer) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice:secret\n")
    guarded = Router(tmp_path / "guarded", router.etcd, redis, router.model, "--api-keys-file", str(keys))
    try:
        async with httpx.AsyncClient(base_url=guarded.url, trust_env=False) as http:
            refused = await http.post("/v1/completions", json=completion())
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert (await http.get("/v1/models", headers={"Authorization": "Bearer secret"})).status_code == 200
            assert (await http.get("/health")).status_code == 200
        async with grpc.aio.insecure_channel(
            guarded.endpoints["grpc"], options=[("grpc.enable_http_proxy", 0)]
        ) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as missing:
                await stub.ListModels(inference_pb2.ListModelsRequest())
            assert missing.value.code() is grpc.StatusCode.UNAUTHENTICATED
            metadata = (("authorization", "Bearer secret"),)
            assert (await stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata)).models
    finally:
        assert guarded.stop() == 0


async def test_answers_do_not_wait_for_delayed_acknowledgements(http: httpx.AsyncClient) -> None:
    latencies_s = []
    for _ in range(40):
        begin = time.monotonic()
        await http.post("/tokenize", json={"prompt": "the dog"})
        latencies_s.append(time.monotonic() - begin)
    assert sorted(latencies_s)[20] < 0.03, "Linux delays an acknowledgement by 40 ms"
