"""The cluster is separate processes: each may die alone, and none outlives its supervisor."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.cluster import Cluster, assert_blocks_come_home, running_cluster, start_cluster, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("processes"), tiny_model, workers=2) as running:
        yield running


def answers(cluster: Cluster, timeout_s: float = 10) -> bool:
    body = {"prompt": [5, 6, 7] * 12, "max_tokens": 8, "ignore_eos": True}
    try:
        reply = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=timeout_s, trust_env=False)
    except httpx.HTTPError:
        return False
    return reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 8


def test_five_roles_are_five_processes(cluster: Cluster) -> None:
    roles = ("router", "prefill", "decode", "etcd", "redis")
    pids = [process["pid"] for role in roles for process in cluster.processes(role)]
    assert len(set(pids)) == 5
    assert all(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("role", ["prefill", "decode", "router", "etcd", "redis"])
def test_a_killed_process_is_replaced(role: str, cluster: Cluster) -> None:
    """New requests succeed within 10 s of the kill, and the others keep their processes."""
    assert answers(cluster)
    others = {
        p["id"]: p["pid"]
        for r in ("router", "prefill", "decode", "etcd", "redis")
        if r != role
        for p in cluster.processes(r)
    }
    killed = cluster.processes(role)[0]["pid"]
    os.kill(killed, signal.SIGKILL)
    time.sleep(0.2)
    took = wait_until(lambda: answers(cluster), 10, f"new requests succeed after {role} was killed")
    print(f"{role}: new requests after {took + 0.2:.1f} s")
    wait_until(lambda: [p["pid"] for p in cluster.processes(role)] not in ([killed], []), 30, f"{role} is replaced")
    wait_until(lambda: sum(w["state"] == "ready" for w in cluster.workers()) == 2, 30, "both workers are back")
    wait_until(lambda: answers(cluster), 10, "the whole cluster answers")
    assert {
        p["id"]: p["pid"]
        for r in ("router", "prefill", "decode", "etcd", "redis")
        if r != role
        for p in cluster.processes(r)
    } == others
    assert_blocks_come_home(cluster)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_survives(how: signal.Signals, tiny_model: Path, tmp_path: Path) -> None:
    cluster = start_cluster(tmp_path, tiny_model)
    assert cluster.supervisor is not None
    family = psutil.Process(cluster.supervisor.pid).children(recursive=True)
    assert len(family) >= 5
    cluster.supervisor.send_signal(how)
    cluster.supervisor.wait(timeout=40)
    if how != signal.SIGKILL:
        assert json.loads((tmp_path / "cluster.json").read_text())["processes"] == []
    _gone, alive = psutil.wait_procs(family, timeout=10)
    assert [process.cmdline() for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def up(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "twostroke_cli", "up", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=90)


def test_start_errors_are_one_line(tiny_model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = up("--model", str(tiny_model), "--http", address, "--run-dir", str(tmp_path / "a"))
        assert done.returncode != 0
        assert address in done.stderr + done.stdout
    missing = up("--model", str(tmp_path / "nowhere"), "--run-dir", str(tmp_path / "b"))
    assert missing.returncode != 0
    assert "nowhere" in missing.stderr
    away = up(
        "--model", str(tiny_model), "--etcd", "http://127.0.0.1:9", "--wait", "2", "--run-dir", str(tmp_path / "c")
    )
    assert away.returncode != 0
    assert "etcd" in away.stderr
    for run in (done, missing, away):
        assert "Traceback" not in run.stderr + run.stdout
