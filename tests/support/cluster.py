"""A whole cluster as its user starts it: `twostroke up`, in a run directory of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Waits for a condition; returns how long it took, fails the test naming `what` otherwise."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > seconds:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.05)
    return time.monotonic() - begin


@dataclass
class Cluster:
    """Addresses and processes of a running cluster; `supervisor` is None for one that was there before."""

    http: str
    grpc: str
    run_dir: Path | None = None
    supervisor: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10, trust_env=False)

    def ready(self) -> bool:
        if self.supervisor is not None and self.supervisor.poll() is not None:
            raise AssertionError(f"twostroke up exited with {self.supervisor.returncode}:\n{self.logs()}")
        try:
            return self.get("/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def workers(self) -> list[dict[str, Any]]:
        workers: list[dict[str, Any]] = self.get("/cluster").json()["workers"]
        return workers

    def processes(self, role: str) -> list[dict[str, Any]]:
        assert self.run_dir is not None
        listed = json.loads((self.run_dir / "cluster.json").read_text())["processes"]
        return [process for process in listed if process["role"] == role]

    def logs(self, tail: int = 4000) -> str:
        if self.run_dir is None:
            return ""
        files = [self.run_dir / "up.log", *sorted((self.run_dir / "logs").glob("*.log"))]
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-tail:]}" for file in files if file.exists()
        )

    def stop(self) -> int:
        """Ctrl-C, as a user would; returns the exit status."""
        assert self.supervisor is not None
        if self.supervisor.poll() is None:
            self.supervisor.send_signal(signal.SIGINT)
        try:
            return self.supervisor.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.supervisor.kill()
            self.supervisor.wait()
            raise AssertionError(f"twostroke up did not stop:\n{self.logs()}") from None


def assert_blocks_come_home(cluster: Cluster, seconds: float = 15) -> None:
    """On every worker: free + cached = total, nothing leased, promised or open."""

    def home() -> bool:
        return all(
            worker["blocks"]["free"] + worker["blocks"]["cached"] == worker["blocks"]["total"]
            and worker["blocks"]["leased"] == worker["blocks"]["promised"] == worker["leases_open"] == 0
            for worker in cluster.workers()
        )

    try:
        wait_until(home, seconds, "blocks come home")
    except AssertionError:
        raise AssertionError(
            f"blocks are missing: {json.dumps(cluster.workers(), indent=1)}\n{cluster.logs()}"
        ) from None


def start_cluster(run_dir: Path, model: Path, *flags: str, wait_s: float = 90) -> Cluster:
    """Starts `twostroke up` and waits until it answers."""
    run_dir.mkdir(parents=True, exist_ok=True)
    http, grpc = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "twostroke_cli", "up", "--model", str(model), "--http", http, "--grpc", grpc]
    with (run_dir / "up.log").open("wb") as log:
        supervisor = subprocess.Popen(
            [*command, "--run-dir", str(run_dir), "--threads", "1", *flags],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ONE_THREAD},
            start_new_session=True,
        )
    cluster = Cluster(http, grpc, run_dir, supervisor)
    try:
        wait_until(cluster.ready, wait_s, "cluster is ready")
    except AssertionError as error:
        supervisor.kill()
        raise AssertionError(f"{error}\n{cluster.logs()}") from None
    return cluster


@contextmanager
def running_cluster(run_dir: Path, model: Path, *flags: str, workers: int | None = None) -> Iterator[Cluster]:
    """A cluster for the length of a block; waits until `workers` are connected."""
    cluster = start_cluster(run_dir, model, *flags)
    try:
        if workers is not None:
            wait_until(
                lambda: sum(worker["state"] == "ready" for worker in cluster.workers()) == workers, 60, "workers ready"
            )
        yield cluster
    finally:
        cluster.stop()
