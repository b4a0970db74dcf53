"""Servers under load: ours as its user starts it, and vLLM's, each with the same model and the same limits."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twostroke_cli.bench import servers
from twostroke_cli.bench.servers import Server
from twostroke_cli.ports import LOOPBACK, free_port

from benchmarks.vllm_peer import peer_environment

MODEL = "bench"


@dataclass(frozen=True)
class Target:
    """A server's OpenAI API, and the model to ask it for."""

    url: str
    """Up to and with `/v1`."""
    model: str


@dataclass(frozen=True)
class Subject:
    """A server to be started, and the name of its model."""

    server: Server
    model: str

    @property
    def target(self) -> Target:
        """Whom to ask once it runs."""
        return Target(self.server.url, self.model)


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


def our_server(options: ServerOptions) -> Subject:
    """`twostroke up` with one worker that does both strokes, weights at random."""
    flags = ["--model", str(options.folder), "--load-format", "random", "--prefill", "0", "--decode", "1"]
    flags += ["--device", options.device, "--wait", "300", "--max-model-len", str(options.max_model_len)]
    flags += ["--log-level", "warning", *options.extra]
    if options.device == "cuda":
        flags += ["--gpu-memory-fraction", str(options.gpu_memory_fraction)]
    return Subject(servers.our_server(shlex.join(flags), options.scratch), options.folder.name)


def vllm_server(options: ServerOptions) -> Subject:
    """vLLM's OpenAI server; it logs neither requests nor statistics, as ours does not."""
    port = free_port()
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.folder)]
    argv += ["--served-model-name", MODEL, "--host", LOOPBACK, "--port", str(port), "--load-format", "dummy"]
    argv += ["--generation-config", "vllm", "--dtype", "bfloat16", "--max-model-len", str(options.max_model_len)]
    argv += ["--no-enable-prefix-caching", "--disable-log-stats", "--disable-uvicorn-access-log"]
    argv += ["--gpu-memory-utilization", str(options.gpu_memory_fraction)]
    if options.device == "cuda":
        argv += ["--max-num-seqs", "256", "--max-num-batched-tokens", "8192"]
    environment = peer_environment(os.environ, options.vllm_path)
    # Started in a folder of its own: the one that we are in must not shadow a module.
    log = options.scratch / "vllm.log"
    return Subject(Server(tuple(argv), port, "/health", log, options.scratch, environment), MODEL)


def flags_of(words: Sequence[str]) -> tuple[str, ...]:
    """More flags for `twostroke up`, as the command line gives them in one word."""
    return tuple(word for text in words for word in text.split())
