"""A prefill worker with larger KV blocks than the decode worker joins a cluster, is paired, and changes no answer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.cluster import ONE_THREAD, Cluster, assert_blocks_come_home, running_cluster, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LENGTHS = (1, 15, 16, 17, 63, 64, 65, 150)
FLAGS = ("--prefill", "0", "--dtype", "float32", "--num-blocks", "200")


def answer(cluster: Cluster, number: int) -> str:
    prompt = [(number * 37 + at * at) % 290 + 3 for at in range(LENGTHS[number])]
    body = {"prompt": prompt, "max_tokens": 12, "ignore_eos": True, "temperature": 0.0}
    reply = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60, trust_env=False)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["text"]
    return text


@contextmanager
def prefill_worker(cluster: Cluster, model: Path, *flags: str) -> Iterator[None]:
    """One more worker for a cluster that `twostroke up` has started."""
    (etcd,), (redis,) = cluster.processes("etcd"), cluster.processes("redis")
    command = [sys.executable, "-m", "twostroke_prefill", "--model-dir", str(model), "--id", "prefill-x"]
    command += ["--etcd", f"http://{etcd['endpoints']['client']}", "--dtype", "float32"]
    command += ["--redis", f"redis://{redis['endpoints']['redis']}", *flags]
    worker = subprocess.Popen(command, env={**os.environ, **ONE_THREAD})
    try:
        wait_until(lambda: len(cluster.workers()) == 2, 60, "the prefill worker is connected")
        yield
    finally:
        worker.terminate()
        assert worker.wait(timeout=30) == 0


@pytest.mark.timeout(120)
def test_a_prefill_worker_with_larger_blocks(tiny_model: Path, tmp_path: Path) -> None:
    with running_cluster(tmp_path / "alone", tiny_model, *FLAGS, workers=1) as cluster:
        alone = [answer(cluster, number) for number in range(len(LENGTHS))]
    with (
        running_cluster(tmp_path / "unequal", tiny_model, *FLAGS, workers=1) as cluster,
        prefill_worker(cluster, tiny_model, "--block-size", "64", "--num-blocks", "50"),
    ):
        assert [answer(cluster, number) for number in range(len(LENGTHS))] == alone
        received = {worker["role"]: worker["kv_bytes"] for worker in cluster.workers()}
        assert received["decode"] > 0, "nothing was handed over"
        assert_blocks_come_home(cluster)
