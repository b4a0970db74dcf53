"""The path of a request: the real router process, real etcd and Redis, scripted workers beyond worker.proto."""

from __future__ import annotations

import asyncio
import functools
import json
import operator

import httpx
import pytest
from tokenizers import Tokenizer
from twostroke_chassis.prefix_index import PrefixPublisher
from twostroke_engine.kv.hashing import block_hashes

from tests.support.router import (
    ANSWER,
    Pool,
    Router,
    chat,
    completion,
    events,
    http,
    model,
    pool,
    router,
    tokenizer,
    until,
    until_workers,
)

__all__ = ["http", "model", "pool", "router", "tokenizer"]
pytestmark = pytest.mark.service


async def test_prefill_and_decode_make_one_answer(pool: Pool, http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    prefill, decode = await pool.pair()
    answer = (await http.post("/v1/chat/completions", json=chat(), headers={"X-Twostroke-Explain": "1"})).json()
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(tokenizer.encode(ANSWER).ids) + 1
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    explained = answer["twostroke"]
    assert (explained["prefill_worker"], explained["decode_worker"]) == ("p0", "d0")
    assert (explained["kv_bytes"], explained["kv_segments"], explained["cached_tokens"]) == (4096, 2, 16)
    assert 0 < explained["ttft_s"] < 5
    assert explained["itl_s"] >= 0
    [reserve], [submit] = decode.of_kind("reserve"), prefill.of_kind("submit")
    assert reserve.request.id == submit.request.id
    assert submit.destination.lease_id == f"lease-{submit.request.id}"
    assert submit.request.sampling.HasField("seed")
    assert submit.request.sampling.max_tokens == 200
    rendered = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert list(submit.request.token_ids) == tokenizer.encode(rendered, add_special_tokens=False).ids
    assert not decode.of_kind("submit")
    assert not decode.of_kind("cancel")
    assert not prefill.of_kind("cancel")


async def test_trace_context_reaches_the_workers(pool: Pool, http: httpx.AsyncClient) -> None:
    prefill, decode = await pool.pair()
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    await http.post("/v1/completions", json=completion(), headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"})
    assert trace_id in prefill.of_kind("submit")[0].traceparent
    assert trace_id in decode.of_kind("reserve")[0].traceparent
    assert prefill.metadata[0]["traceparent"]


async def test_without_prefill_workers_decode_runs_it_all(pool: Pool, http: httpx.AsyncClient) -> None:
    decode = await pool.add("decode", "d0")
    await pool.settle()
    answer = (await http.post("/v1/completions", json=completion())).json()
    assert answer["choices"][0]["text"] == ANSWER
    assert not decode.of_kind("reserve")
    assert not decode.of_kind("submit")[0].HasField("destination")


async def test_one_token_is_prefills_alone(pool: Pool, http: httpx.AsyncClient) -> None:
    prefill, decode = await pool.pair()
    answer = (await http.post("/v1/completions", json=completion(max_tokens=1))).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert not prefill.of_kind("submit")[0].HasField("destination")
    assert not decode.received


async def test_pairs_have_one_kind_of_kv(pool: Pool, http: httpx.AsyncClient) -> None:
    other = await pool.add("prefill", "p-other", kv_fingerprint="other")
    decode = await pool.add("decode", "d0")
    await pool.settle()
    assert (await http.post("/v1/completions", json=completion())).status_code == 200
    assert not other.received
    assert decode.of_kind("submit")


async def test_stream_has_usage_and_done(pool: Pool, http: httpx.AsyncClient) -> None:
    await pool.pair()
    body = chat(stream=True, stream_options={"include_usage": True})
    async with http.stream("POST", "/v1/chat/completions", json=body, headers={"X-Twostroke-Explain": "1"}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        data = await events(response)
    assert data.pop() == "[DONE]"
    chunks = [json.loads(each) for each in data]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == ANSWER
    assert [c["usage"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 5
    assert chunks[-1]["twostroke"]["decode_worker"] == "d0"
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_batch_of_prompts_and_choices(pool: Pool, http: httpx.AsyncClient) -> None:
    prefill, _ = await pool.pair()
    answer = (await http.post("/v1/completions", json=completion(prompt=["a", "the fox", "b"], n=2))).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert {choice["text"] for choice in answer["choices"]} == {ANSWER}
    assert [submit.request.n for submit in prefill.of_kind("submit")] == [2, 2, 2]
    ids = (await http.post("/v1/completions", json=completion(prompt=[[5, 6], [7]]))).json()
    assert len(ids["choices"]) == 2
    assert ids["usage"]["prompt_tokens"] == 3


async def test_stop_string_ends_the_request_on_the_workers(pool: Pool, http: httpx.AsyncClient) -> None:
    _, decode = await pool.pair()
    decode.pace_s = 0.02
    answer = (await http.post("/v1/completions", json=completion(stop=["could", "never"]))).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("the dog ", "stop")
    await until(lambda: not decode.live)
    assert decode.of_kind("cancel")


async def test_logprobs(pool: Pool, http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    await pool.pair()
    answer = (await http.post("/v1/chat/completions", json=chat(logprobs=True, top_logprobs=2))).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    assert "".join(token["token"] for token in content[:-1]) == ANSWER
    assert bytes(functools.reduce(operator.iadd, (token["bytes"] for token in content[:-1]), [])).decode() == ANSWER
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-1.0, -2.0]
    answer = (await http.post("/v1/completions", json=completion(logprobs=1))).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    assert logprobs["token_logprobs"][0] == -0.5


async def test_the_longest_prefix_attracts(
    pool: Pool, router: Router, http: httpx.AsyncClient, tokenizer: Tokenizer
) -> None:
    workers = [await pool.add("decode", f"d{place}") for place in range(3)]
    await pool.settle()
    prompt = "the dog could do nothing more about it, " * 4
    hashes = block_hashes(tokenizer.encode(prompt).ids, 16)
    assert len(hashes) >= 3
    async with PrefixPublisher(router.redis.url, "default", "d1", workers[1].epoch) as publisher:
        publisher.stored(hashes)
        async with asyncio.timeout(5):
            while not workers[1].received:
                body = completion(prompt=prompt, max_tokens=2)
                answer = (await http.post("/v1/completions", json=body, headers={"X-Twostroke-Explain": "1"})).json()
        before = [len(worker.received) for worker in workers]
        for _ in range(3):
            answer = (await http.post("/v1/completions", json=body, headers={"X-Twostroke-Explain": "1"})).json()
            assert answer["twostroke"]["decode_worker"] == "d1"
        assert [len(worker.received) for worker in workers] == [before[0], before[1] + 3, before[2]]


async def test_a_draining_worker_gets_no_new_work(pool: Pool, http: httpx.AsyncClient) -> None:
    draining, other = await pool.add("decode", "d0"), await pool.add("decode", "d1")
    await pool.settle()
    draining.load.draining = True
    await until_workers(http, {"d1"})
    for _ in range(4):
        await http.post("/v1/completions", json=completion(max_tokens=2))
    assert not draining.received
    assert len(other.received) == 4
