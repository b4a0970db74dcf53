"""What goes wrong around a router: clients, workers, etcd and Redis."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer
from twostroke_proto.v1 import worker_pb2

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
from tests.support.servers import EtcdServer, RedisServer

__all__ = ["http", "model", "pool", "router", "tokenizer"]
pytestmark = [pytest.mark.service, pytest.mark.slow]


@pytest.mark.parametrize("is_stream", [True, False])
async def test_a_client_that_goes_away_cancels_on_both_workers(
    pool: Pool, http: httpx.AsyncClient, is_stream: bool
) -> None:
    prefill, decode = await pool.pair()
    decode.gate.clear()
    asking = asyncio.create_task(http.post("/v1/completions", json=completion(stream=is_stream, n=2)))
    await until(lambda: bool(decode.live and prefill.received))
    begin = time.monotonic()
    asking.cancel()
    await until(lambda: not decode.live and not prefill.live)
    assert time.monotonic() - begin < 1
    [cancel] = decode.of_kind("cancel")
    assert cancel.request_id == decode.of_kind("reserve")[0].request.id


@pytest.mark.parametrize(
    ("role", "code"),
    [
        ("prefill", worker_pb2.ERROR_CODE_TRANSFER),
        ("prefill", worker_pb2.ERROR_CODE_DRAINING),
        ("decode", worker_pb2.ERROR_CODE_OVERLOADED),
        ("decode", worker_pb2.ERROR_CODE_TRANSFER),
    ],
)
async def test_a_failure_before_the_first_token_is_tried_elsewhere(
    pool: Pool, http: httpx.AsyncClient, role: str, code: int
) -> None:
    for place in range(2):
        await pool.add("prefill", f"p{place}")
        await pool.add("decode", f"d{place}")
    await pool.settle()
    same_role = [worker for worker in pool.workers if worker.role == role]
    for worker in same_role:
        worker.fail_next = [code]
    answer = await http.post("/v1/completions", json=completion())
    assert answer.json()["choices"][0]["text"] == ANSWER
    assert [worker.fail_next for worker in same_role] == [[], []], "the second try was on the other worker"
    ids = {
        message.request.id for worker in same_role for message in worker.of_kind("submit") + worker.of_kind("reserve")
    }
    assert len(ids) == 3, "each try has an id of its own"
    await until(lambda: not any(worker.live for worker in pool.workers))


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (worker_pb2.ERROR_CODE_OVERLOADED, 429),
        (worker_pb2.ERROR_CODE_TRANSFER, 503),
        (worker_pb2.ERROR_CODE_INTERNAL, 500),
        (worker_pb2.ERROR_CODE_NUMERIC, 500),
        (worker_pb2.ERROR_CODE_INVALID, 400),
        (worker_pb2.ERROR_CODE_DEADLINE, 504),
    ],
)
async def test_a_failure_that_stays_has_a_status(pool: Pool, http: httpx.AsyncClient, code: int, status: int) -> None:
    decode = await pool.add("decode", "d0")
    await pool.settle()
    decode.fail_next = [code] * 4
    answer = await http.post("/v1/completions", json=completion())
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == f"scripted error {code}"
    assert ("retry-after" in answer.headers) == (status in (429, 503))


async def test_a_stream_is_resumed_without_loss_or_repetition(pool: Pool, http: httpx.AsyncClient) -> None:
    prefill, decode = await pool.pair()
    decode.pace_s = 0.03
    async with http.stream("POST", "/v1/completions", json=completion(stream=True)) as response:
        text = ""
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
            if len(decode.hellos) == 1 and len(text) > 10:
                decode.break_streams()
                prefill.break_streams()
    assert text == ANSWER
    assert len(decode.hellos) == 2
    [resume] = decode.hellos[1].resume
    assert resume.request_id == decode.of_kind("reserve")[0].request.id
    assert 1 < resume.next_offsets[0] < len(decode.running[resume.request_id].tokens[0])
    assert not prefill.hellos[-1].resume, "its part had ended"


async def test_decode_dying_after_the_first_token_ends_the_stream_with_an_error(
    pool: Pool, http: httpx.AsyncClient
) -> None:
    _, decode = await pool.pair()
    decode.gate.clear()
    async with http.stream("POST", "/v1/completions", json=completion(stream=True)) as response:
        lines = response.aiter_lines()
        assert '"text":"th"' in await anext(lines)
        await decode.leave()
        data = [line.removeprefix("data: ") async for line in lines if line.startswith("data: ")]
    assert json.loads(data[-1])["error"]["type"] == "server_error"
    assert "d0" in json.loads(data[-1])["error"]["message"]
    pool.workers.remove(decode)


async def test_a_worker_that_dies_is_not_waited_for(pool: Pool, http: httpx.AsyncClient) -> None:
    decode = await pool.add("decode", "d0")
    await pool.settle()
    decode.gate.clear()
    asking = asyncio.create_task(http.post("/v1/completions", json=completion(max_tokens=5)))
    await until(lambda: bool(decode.live))
    begin = time.monotonic()
    await decode.kill()  # its record stays in etcd until the lease ends
    await pool.add("decode", "d1")
    assert (await asking).json()["usage"]["completion_tokens"] == 5
    assert time.monotonic() - begin < 2


async def test_a_restarted_worker_replaces_its_earlier_self(pool: Pool, http: httpx.AsyncClient) -> None:
    decode = await pool.add("decode", "d0")
    await pool.settle()
    decode.gate.clear()
    asking = asyncio.create_task(http.post("/v1/completions", json=completion(max_tokens=5)))
    await until(lambda: bool(decode.live))
    await decode.kill()
    pool.workers.remove(decode)
    begin = time.monotonic()
    again = await pool.add("decode", "d0")
    # The client of a whole answer has seen nothing of it: the request is run again from its beginning.
    assert (await asking).json()["usage"]["completion_tokens"] == 5
    assert time.monotonic() - begin < 3, "it did not wait for the earlier process's lease"
    assert len(again.of_kind("submit")) == 1
    await decode.leave()
    await pool.settle()


async def test_without_workers_requests_wait_then_fail(pool: Pool, http: httpx.AsyncClient) -> None:
    assert (await http.get("/ready")).status_code == 503
    assert (await http.get("/health")).status_code == 200
    begin = time.monotonic()
    answer = await http.post("/v1/completions", json=completion())
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "unavailable"
    assert answer.headers["retry-after"] == "1"
    assert 1.5 < time.monotonic() - begin < 4
    asking = asyncio.create_task(http.post("/v1/completions", json=completion()))
    await asyncio.sleep(0.2)
    await pool.add("decode", "d0")
    assert (await asking).status_code == 200, "a worker that appears in time is used"
    assert (await http.get("/ready")).status_code == 200


async def test_more_requests_than_allowed_are_refused_at_once(pool: Pool, http: httpx.AsyncClient) -> None:
    _, decode = await pool.pair()
    decode.gate.clear()
    asking = [asyncio.create_task(http.post("/v1/completions", json=completion())) for _ in range(8)]
    await until(lambda: len(decode.live) == 8)
    refused = await http.post("/v1/completions", json=completion())
    assert refused.status_code == 429
    assert refused.headers["retry-after"]
    assert refused.json()["error"]["type"] == "rate_limit_error"
    decode.gate.set()
    assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}


async def test_own_placements_count_before_the_load_shows_them(pool: Pool, http: httpx.AsyncClient) -> None:
    decodes = [await pool.add("decode", f"d{place}") for place in range(2)]
    await pool.settle()
    for decode in decodes:
        decode.gate.clear()
    asking = [asyncio.create_task(http.post("/v1/completions", json=completion())) for _ in range(6)]
    await until(lambda: sum(len(decode.live) for decode in decodes) == 6)
    assert [len(decode.live) for decode in decodes] == [3, 3]
    for decode in decodes:
        decode.gate.set()
    await asyncio.gather(*asking)


async def test_etcd_and_redis_may_go_and_come_back(
    tmp_path: Path, etcd: EtcdServer, redis: RedisServer, model: Path, tokenizer: Tokenizer
) -> None:
    router = Router(tmp_path / "router", etcd, redis, model)
    try:
        async with httpx.AsyncClient(base_url=router.url, trust_env=False, timeout=30) as http:
            pool = Pool(router, http, tokenizer)
            await pool.pair()
            etcd.kill()
            redis.kill()
            for _ in range(3):
                assert (await http.post("/v1/completions", json=completion())).status_code == 200
            etcd.start()
            redis.start()
            await pool.add("decode", "d-new")
            await pool.settle()
            assert (await http.post("/v1/completions", json=completion())).status_code == 200
            await pool.close()
    finally:
        assert router.stop() == 0, router.log()
        assert "Traceback" not in router.log()


async def test_running_requests_end_before_a_router_stops(
    tmp_path: Path, etcd: EtcdServer, redis: RedisServer, model: Path, tokenizer: Tokenizer
) -> None:
    router = Router(tmp_path / "router", etcd, redis, model)
    async with httpx.AsyncClient(base_url=router.url, trust_env=False, timeout=30) as http:
        pool = Pool(router, http, tokenizer)
        _, decode = await pool.pair()
        decode.gate.clear()
        asking = asyncio.create_task(http.post("/v1/completions", json=completion()))
        await until(lambda: bool(decode.live))
        router.process.terminate()
        await asyncio.sleep(0.3)
        decode.gate.set()
        assert (await asking).json()["choices"][0]["text"] == ANSWER
        assert await asyncio.to_thread(router.process.wait, 10) == 0
        for worker in pool.workers:
            await worker.leave()
