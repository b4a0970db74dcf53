"""One supervised process: started, awaited until it is ready, restarted when it dies, ended for certain."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from twostroke_cli.errors import CommandError

POLL_S = 0.05
STABLE_S = 10.0
FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 10.0
_PR_SET_PDEATHSIG = 1

Endpoints = Mapping[str, str]
Probe = Callable[[int], Awaitable[Endpoints | None]]
"""Asks the process with this pid for its endpoints; None while it is not ready."""


@dataclass(frozen=True)
class Part:
    """A process that belongs to the cluster."""

    role: str
    id: str
    argv: tuple[str, ...]
    probe: Probe
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's own environment."""


def _death_with_parent() -> Callable[[], None] | None:
    """What a child does before it runs its program, so that it is killed when the supervisor dies (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died between the fork and the line above
            os._exit(1)

    return before_exec


class Child:
    """Runs a `Part`, and runs it again when it dies.

    Its process leads a session of its own: signals of the terminal do not reach it, and a kill reaches everything that
    it started.
    """

    def __init__(self, part: Part, log: Path, is_restarted: bool, on_change: Callable[[Child, str], None]) -> None:
        self.part = part
        self.endpoints: Endpoints = {}
        """Where it listens; empty while it is not ready."""
        self.num_restarts = 0
        self.was_ready = asyncio.Event()
        """Set when it has been ready once."""
        self._log = log
        self._log_start = 0
        self._is_restarted = is_restarted
        self._on_change = on_change
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._delay_s = 0.0
        self._ready_at: float | None = None

    @property
    def pid(self) -> int | None:
        """The living process, if there is one."""
        return self._process.pid if self._process is not None else None

    @property
    def is_ready(self) -> bool:
        """Whether the process lives and has said where it listens."""
        return bool(self.endpoints)

    async def supervise(self) -> None:
        """Runs until `stop`. Raises `CommandError` if the part has never been ready and its process ended."""
        while True:
            status, ready_s = await self._run_once()
            if self._stopping.is_set():
                return
            if not self.was_ready.is_set():
                raise CommandError(self._last_words(status))
            if not self._is_restarted:
                return self._on_change(self, f"{describe(status)}; it is not restarted")
            # The first death after a stable time is answered at once, a part that keeps dying ever more slowly.
            self._delay_s = 0.0 if ready_s >= STABLE_S else min(max(FIRST_DELAY_S, 2 * self._delay_s), LONGEST_DELAY_S)
            self._on_change(self, f"{describe(status)}; restart in {self._delay_s:.0f} s (log: {self._log})")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), self._delay_s)
                return
            self.num_restarts += 1

    async def _run_once(self) -> tuple[int, float]:
        """One life of the process: its exit status, and for how long it was ready."""
        self._ready_at = None
        process = await self._spawn()
        if self._stopping.is_set():  # `stop` came while the process was being made, and did not see it
            self.kill()
        self._on_change(self, f"started, pid {process.pid}")
        watch = asyncio.create_task(self._watch_ready(process))
        try:
            status = await process.wait()
        finally:
            watch.cancel()
        self.kill()  # what it started and left behind
        self._process = None
        self.endpoints = {}
        return status, time.monotonic() - self._ready_at if self._ready_at is not None else 0.0

    async def _spawn(self) -> asyncio.subprocess.Process:
        try:
            with self._log.open("ab") as log:
                self._log_start = log.tell()
                self._process = await asyncio.create_subprocess_exec(
                    *self.part.argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **self.part.env},
                    start_new_session=True,
                    preexec_fn=_death_with_parent(),
                )
        except OSError as error:
            raise CommandError(f"cannot start {self.part.id}: {error}") from None
        return self._process

    async def _watch_ready(self, process: asyncio.subprocess.Process) -> None:
        """Waits until the process is ready."""
        while (endpoints := await self.part.probe(process.pid)) is None:  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(POLL_S)
        self.endpoints = endpoints
        self._ready_at = time.monotonic()
        self.was_ready.set()
        self._on_change(self, "ready at " + " ".join(f"{name}={address}" for name, address in endpoints.items()))

    def _last_words(self, status: int) -> str:
        """The line with which the process said why it ended, or where to look."""
        with self._log.open("rb") as log:
            log.seek(self._log_start)
            lines = [line.strip() for line in log.read()[-65536:].decode(errors="replace").splitlines()]
        own = [line for line in lines if line.startswith("twostroke-")]
        if own:
            return own[-1]
        last = next((line for line in reversed(lines) if line), "it said nothing")
        return f"{self.part.id} {describe(status)}: {last} (log: {self._log})"

    async def stop(self, grace_s: float) -> None:
        """Asks the process to end, and kills it if it has not after `grace_s`."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            self._on_change(self, f"did not end within {grace_s:.0f} s and is killed")
        self.kill()

    def abandon(self) -> None:
        """Ends the process now."""
        self._stopping.set()
        self.kill()

    def kill(self) -> None:
        """Kills the process and everything that it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


def describe(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
