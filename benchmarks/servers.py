"""Servers under load: ours as its user starts it, and vLLM's, each with the same model and the same limits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.load_client import Target
from benchmarks.vllm_peer import peer_environment

HOST = "127.0.0.1"
MODEL = "bench"
READY_POLL_S = 0.2
STOP_S = 60.0


@dataclass(frozen=True)
class Server:
    """How a server is started, and where it says that it is ready."""

    argv: tuple[str, ...]
    port: int
    ready_path: str
    log: Path
    model: str
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def target(self) -> Target:
        """Whom to ask."""
        return Target(HOST, self.port, self.model)


@dataclass(frozen=True)
class ServerOptions:
    """What both servers are told."""

    folder: Path
    device: str
    scratch: Path
    gpu_memory_fraction: float = 0.9
    max_model_len: int = 16384
    vllm_path: Path | None = None
    extra: tuple[str, ...] = ()
    """More flags for `twostroke up`."""


def our_server(options: ServerOptions) -> Server:
    """`twostroke up` with one worker that does both strokes, weights at random."""
    port = free_port()
    argv = [sys.executable, "-m", "twostroke_cli", "up", "--model", str(options.folder), "--load-format", "random"]
    argv += ["--prefill", "0", "--decode", "1", "--device", options.device, "--wait", "300", "--no-restart"]
    argv += ["--http", f"{HOST}:{port}", "--grpc", f"{HOST}:{free_port()}", "--run-dir", str(options.scratch / "run")]
    argv += ["--max-model-len", str(options.max_model_len), "--log-level", "warning", *options.extra]
    if options.device == "cuda":
        argv += ["--gpu-memory-fraction", str(options.gpu_memory_fraction)]
    return Server(tuple(argv), port, "/ready", options.scratch / "twostroke.log", options.folder.name)


def vllm_server(options: ServerOptions) -> Server:
    """vLLM's OpenAI server; it logs neither requests nor statistics, as ours does not."""
    port = free_port()
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.folder)]
    argv += ["--served-model-name", MODEL, "--host", HOST, "--port", str(port), "--load-format", "dummy"]
    argv += ["--generation-config", "vllm", "--dtype", "bfloat16", "--max-model-len", str(options.max_model_len)]
    argv += ["--no-enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log"]
    argv += ["--gpu-memory-utilization", str(options.gpu_memory_fraction)]
    if options.device == "cuda":
        argv += ["--max-num-seqs", "256", "--max-num-batched-tokens", "8192"]
    log = options.scratch / "vllm.log"
    return Server(tuple(argv), port, "/health", log, MODEL, peer_environment(os.environ, options.vllm_path))


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(server: Server, wait_s: float) -> Iterator[Target]:
    """A server that answers while the body runs, and of which nothing is left afterwards.

    Raises:
        RuntimeError: it ended or was not ready in time; the message ends with the end of its log.
    """
    with server.log.open("wb") as log:
        process = subprocess.Popen(
            server.argv,
            cwd=server.log.parent,
            env=server.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_ready(server, process, wait_s)
        yield server.target
    finally:
        _stop(process)


def _wait_ready(server: Server, process: subprocess.Popen[bytes], wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while not _answers(server):
        if process.poll() is not None or time.monotonic() > deadline:
            said = server.log.read_text(errors="replace")[-2000:]
            state = "is not ready" if process.poll() is None else f"ended with status {process.poll()}"
            raise RuntimeError(f"{server.log.stem} {state}:\n{said}")
        time.sleep(READY_POLL_S)


def _answers(server: Server) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{server.port}{server.ready_path}", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """As a user would, then for good: children of its session too, so that the device's memory is free."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def flags_of(words: Sequence[str]) -> tuple[str, ...]:
    """More flags for `twostroke up`, as the command line gives them in one word."""
    return tuple(word for text in words for word in text.split())
