"""Cancels at random moments, and pools that are too small: nothing is lost, nothing leaks, nobody starves."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import grpc
import pytest
from twostroke_proto.v1 import inference_pb2, inference_pb2_grpc, types_pb2

from tests.support.cluster import Cluster, assert_blocks_come_home, running_cluster

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


class Outcome:
    """Counts of a load run."""

    def __init__(self) -> None:
        self.finished = 0
        self.cancelled = 0
        self.errors: list[str] = []
        self.longest_wait_s = 0.0
        """Longest time to a first token, as a client saw it."""


async def one(
    stub: inference_pb2_grpc.InferenceAsyncStub, seed: int, cancel: bool, lengths: tuple[int, int], outcome: Outcome
) -> None:
    """One request with a prompt and an answer of random length; perhaps cancelled at a random moment."""
    draw = random.Random(seed)
    long = draw.random() < 0.3
    prompt = [
        3 + draw.randrange(200)
        for _ in range(draw.randint(lengths[1] // 2, lengths[1]) if long else draw.randint(1, lengths[0]))
    ]
    wanted = draw.randint(1, 40)
    call = stub.Generate(
        inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=prompt),
            n=draw.choice([1, 1, 1, 2]),
            sampling=types_pb2.SamplingParams(
                seed=seed, max_tokens=wanted, ignore_eos=True, temperature=draw.choice([0.0, 1.0])
            ),
        ),
        timeout=240,
    )
    if cancel:
        asyncio.get_running_loop().call_later(draw.uniform(0, 0.6), call.cancel)
    tokens: dict[int, int] = {}
    began_s = time.monotonic()
    try:
        async for message in call:
            if not tokens:
                outcome.longest_wait_s = max(outcome.longest_wait_s, time.monotonic() - began_s)
            tokens[message.choice] = tokens.get(message.choice, 0) + len(message.tokens)
    except asyncio.CancelledError:
        outcome.cancelled += 1
        return
    except grpc.RpcError as error:
        outcome.errors.append(f"{error.code()}: {error.details()}")
        return
    if any(count != wanted for count in tokens.values()):
        outcome.errors.append(f"wanted {wanted} tokens, got {tokens}")
    outcome.finished += 1


async def load(cluster: Cluster, requests: int, concurrency: int, cancels: int, lengths: tuple[int, int]) -> Outcome:
    outcome = Outcome()
    gate = asyncio.Semaphore(concurrency)
    doomed = set(random.sample(range(requests), cancels))
    async with grpc.aio.insecure_channel(cluster.grpc, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)

        async def gated(seed: int) -> None:
            async with gate:
                await one(stub, seed, seed in doomed, lengths, outcome)

        await asyncio.gather(*(gated(seed) for seed in range(requests)))
    return outcome


@pytest.mark.timeout(300)
async def test_cancel_storm(tiny_model: Path, tmp_path: Path) -> None:
    """200 mixed requests, 16 at a time, 60 of them cancelled at random moments."""
    with running_cluster(tmp_path, tiny_model, "--max-step-tokens", "128", workers=2) as cluster:
        outcome = await load(cluster, requests=200, concurrency=16, cancels=60, lengths=(64, 600))
        assert outcome.errors == []
        assert outcome.finished + outcome.cancelled == 200
        assert 0 < outcome.cancelled <= 60
        assert_blocks_come_home(cluster)


@pytest.mark.timeout(420)
@pytest.mark.parametrize("prefill", [1, 2])
async def test_oversubscribed_pools(prefill: int, tiny_model: Path, tmp_path: Path) -> None:
    """500 requests, long and short, whose KV is about twice what the pools hold."""
    flags = ("--num-blocks", "160", "--max-step-tokens", "256", "--prefill", str(prefill))
    with running_cluster(tmp_path, tiny_model, *flags, workers=prefill + 1) as cluster:
        outcome = await load(cluster, requests=500, concurrency=64, cancels=0, lengths=(48, 480))
        assert outcome.errors == []
        assert outcome.finished == 500
        decode = next(worker for worker in cluster.workers() if worker["role"] == "decode")
        assert decode["preemptions"] > 0, "the pool was never short: the test shows nothing"
        assert outcome.longest_wait_s < 60, "someone starves"
        waits = {worker["id"]: round(worker["longest_wait_s"], 2) for worker in cluster.workers()}
        print(f"preemptions {decode['preemptions']}, longest wait {outcome.longest_wait_s:.2f} s, in workers {waits}")
        assert_blocks_come_home(cluster)
