"""`twostroke up --batch-invariant`: the same answers alone on one worker and in a crowd on two, KV handed over."""

from __future__ import annotations

import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.cluster import Cluster, running_cluster

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def bodies(count: int) -> list[dict[str, Any]]:
    """Greedy and drawn requests of many lengths, with logprobs: every bit of a logit shows."""
    rng = random.Random(7)
    return [
        {
            "prompt": rng.choices(range(3, 300), k=rng.randint(1, 150)),
            "max_tokens": rng.randint(1, 40),
            "temperature": rng.choice((0.0, 0.8, 1.5)),
            "top_p": rng.choice((1.0, 0.9)),
            "seed": number,
            "logprobs": 2,
            "ignore_eos": True,
        }
        for number in range(count)
    ]


def answer(cluster: Cluster, body: Mapping[str, Any]) -> tuple[object, object]:
    """Text and logprobs."""
    reply = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    return choice["text"], choice["logprobs"]


@pytest.mark.timeout(180)
def test_answers_do_not_depend_on_company_nor_on_the_way(tiny_model: Path, tmp_path: Path) -> None:
    """In the crowd blocks are few, so that sequences are preempted, and prompts are cut into small chunks."""
    asked = bodies(40)
    with running_cluster(tmp_path / "alone", tiny_model, "--batch-invariant", "--prefill", "0", workers=1) as cluster:
        alone = [answer(cluster, body) for body in asked]
    flags = ("--batch-invariant", "--num-blocks", "40", "--max-step-tokens", "48")
    with (
        running_cluster(tmp_path / "crowd", tiny_model, *flags, workers=2) as cluster,
        ThreadPoolExecutor(16) as clients,
    ):
        together = list(clients.map(lambda body: answer(cluster, body), asked))
        assert [worker["role"] for worker in cluster.workers()].count("prefill") == 1
    assert together == alone
