"""Servers that a benchmark starts: as a user would, ready before they are asked, and gone afterwards."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from twostroke_cli.errors import CommandError
from twostroke_cli.ports import LOOPBACK, free_port

READY_POLL_S = 0.2
STOP_S = 60.0


@dataclass(frozen=True)
class Server:
    """How a server is started, and where it says that it is ready."""

    argv: tuple[str, ...]
    port: int
    ready_path: str
    log: Path
    folder: Path | None = None
    """Where it is started; None: where we are."""
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def url(self) -> str:
        """Where its OpenAI API is."""
        return f"http://{LOOPBACK}:{self.port}/v1"


def our_server(flags: str, folder: Path) -> Server:
    """`twostroke up` with these flags, on free ports, its run directory and log inside `folder`.

    Raises:
        CommandError: the flags are not words of a command line, or name what the benchmark chooses.
    """
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise CommandError(f"--spawn {flags}: {error}") from None
    for flag in ("--http", "--grpc", "--run-dir"):
        if any(word == flag or word.startswith(f"{flag}=") for word in words):
            raise CommandError(f"--spawn {flags}: the benchmark chooses {flag} itself")
    port = free_port()
    argv = [
        sys.executable,
        "-P",
        "-m",
        "twostroke_cli",
        "up",
        "--http",
        f"{LOOPBACK}:{port}",
        "--grpc",
        f"{LOOPBACK}:0",
    ]
    argv += ["--run-dir", str(folder / "run"), "--no-restart", *words]
    return Server(tuple(argv), port, "/ready", folder / "twostroke.log")


@contextmanager
def running(server: Server, wait_s: float) -> Iterator[Server]:
    """A server that answers while the body runs, and of which nothing is left afterwards.

    Raises:
        CommandError: it ended or was not ready in time; the message ends with the end of its log.
    """
    with server.log.open("wb") as log:
        process = subprocess.Popen(
            server.argv,
            cwd=server.folder,
            env=server.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_ready(server, process, wait_s)
        yield server
    finally:
        _stop(process)


def _wait_ready(server: Server, process: subprocess.Popen[bytes], wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while not _answers(server):
        if process.poll() is not None or time.monotonic() > deadline:
            said = server.log.read_text(errors="replace")[-2000:]
            state = "is not ready" if process.poll() is None else f"ended with status {process.poll()}"
            raise CommandError(f"{server.log.stem} {state}:\n{said}")
        time.sleep(READY_POLL_S)


def _answers(server: Server) -> bool:
    try:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{server.port}{server.ready_path}", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """As a user would, then for good: children of its session too, so that a device's memory is free."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
