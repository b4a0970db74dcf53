"""The client processes of one load: started together, begun at one moment, listened to until all have ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

import msgspec

from twostroke_cli.bench.job import Job
from twostroke_cli.bench.outcome import Outcome, Run
from twostroke_cli.errors import CommandError

LINE_BYTES = 1 << 26
"""An outcome with the gaps of a very long answer."""
LEAD_S = 0.2
"""The begin lies this far ahead when it is told."""


def send(job: Job, processes: int, target: str, round_number: int, on_outcome: Callable[[Outcome], None]) -> Run:
    """Sends a whole load and waits for its end; `on_outcome` hears of each request as it ends.

    Raises:
        CommandError: a client could not begin, or died.
    """
    return asyncio.run(_send(job, processes, target, round_number, on_outcome))


async def _send(job: Job, processes: int, target: str, round_number: int, on_outcome: Callable[[Outcome], None]) -> Run:
    outcomes: list[Outcome] = []

    def heard(outcome: Outcome) -> None:
        outcomes.append(outcome)
        on_outcome(outcome)

    children: list[asyncio.subprocess.Process] = []
    try:
        children += [await _start(share, processes) for share in range(processes)]
        for child in children:
            await _tell(child, msgspec.json.encode(job))
        for child in children:
            await _ready(child)
        begin_s, begin_unix_s = time.monotonic() + LEAD_S, time.time() + LEAD_S
        for child in children:
            await _tell(child, repr(begin_s).encode())
        await asyncio.gather(*(_listen(child, heard) for child in children))
    finally:
        await _end(children)
    outcomes.sort(key=lambda outcome: outcome.number)
    duration_s = max((outcome.end_at_s for outcome in outcomes), default=0.0)
    return Run(target, round_number, round(begin_unix_s, 3), duration_s, outcomes)


async def _start(share: int, shares: int) -> asyncio.subprocess.Process:
    # -P: the folder that the command was started in must not shadow a module. A session of its own: Ctrl-C is for us.
    argv = (sys.executable, "-P", "-m", "twostroke_cli.bench.sender", str(share), str(shares))
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(
        *argv, stdin=pipe, stdout=pipe, stderr=pipe, limit=LINE_BYTES, env=dict(os.environ), start_new_session=True
    )


async def _tell(child: asyncio.subprocess.Process, line: bytes) -> None:
    assert child.stdin is not None
    child.stdin.write(line + b"\n")
    with contextlib.suppress(ConnectionError):  # it died: `_ready` says why
        await child.stdin.drain()


async def _ready(child: asyncio.subprocess.Process) -> None:
    assert child.stdout is not None
    if not await child.stdout.readline():
        raise CommandError(await _last_words(child))


async def _listen(child: asyncio.subprocess.Process, heard: Callable[[Outcome], None]) -> None:
    assert child.stdout is not None
    decode = msgspec.json.Decoder(Outcome).decode
    async for line in child.stdout:
        heard(decode(line))
    if await child.wait():
        raise CommandError(f"a client process ended early: {await _last_words(child)}")


async def _last_words(child: asyncio.subprocess.Process) -> str:
    assert child.stderr is not None
    lines = (await child.stderr.read()).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"it said nothing (status {await child.wait()})"


async def _end(children: Sequence[asyncio.subprocess.Process]) -> None:
    for child in children:
        # Not `child.kill()`: that asks for the status of one that has just died, and asyncio would then miss it.
        with contextlib.suppress(ProcessLookupError):
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
        await child.wait()
