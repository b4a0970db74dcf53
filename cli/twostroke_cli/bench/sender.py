"""One client process of a load: `python -m twostroke_cli.bench.sender SHARE SHARES`, speaking JSON lines.

It reads a job, says that it is ready, reads when to begin (of the machine's monotonic clock), sends its share of the
requests and writes an outcome for each. A process of its own: neither a progress bar nor other clients delay it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise

import msgspec

from twostroke_cli.bench.answer import AnswerReader
from twostroke_cli.bench.arrivals import Closed
from twostroke_cli.bench.http_client import BadAnswer, HttpClient
from twostroke_cli.bench.job import Job, body_of
from twostroke_cli.bench.outcome import Outcome
from twostroke_cli.bench.prompts import open_prompts
from twostroke_cli.errors import CommandError

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
DIGITS = 6
"""Microseconds are enough."""


class Sender:
    """Sends one share of a job."""

    def __init__(self, job: Job, share: int, shares: int, tell: Callable[[Outcome], None]) -> None:
        self._job = job
        self._share = share
        self._shares = shares
        self._tell = tell
        self._prompts = open_prompts(job.prompts, job.seed)
        key = os.environ.get(job.key_variable, "") if job.key_variable else ""
        self._client = HttpClient(job.url, {"Authorization": f"Bearer {key}"} if key else {}, job.timeout_s)
        self._path = PATHS[job.form.endpoint]
        self._begin_s = 0.0

    async def run(self, begin_s: float) -> None:
        """Everything from `begin_s` on; returns when the last answer has ended."""
        self._begin_s = begin_s
        await asyncio.sleep(max(0.0, begin_s - time.monotonic()))
        arrivals = self._job.arrivals
        await (self._closed(arrivals.clients) if isinstance(arrivals, Closed) else self._open())
        self._client.close()

    async def _open(self) -> None:
        """Each request when it is due, whatever became of those before."""
        async with asyncio.TaskGroup() as group:
            for number, due_s in self._job.plan(self._prompts):
                if number % self._shares != self._share:
                    continue
                body = self._body(number)
                await asyncio.sleep(max(0.0, self._begin_s + due_s - time.monotonic()))
                group.create_task(self._ask(number, due_s, body))

    async def _closed(self, clients: int) -> None:
        numbers = (number for number in self._job.numbers() if number % self._shares == self._share)
        mine = len(range(self._share, clients, self._shares))

        async def client() -> None:
            for number in numbers:
                body, now_s = self._body(number), time.monotonic() - self._begin_s
                if self._job.duration_s is not None and now_s >= self._job.duration_s:
                    return
                await self._ask(number, now_s, body)

        await asyncio.gather(*(client() for _ in range(mine)))

    def _body(self, number: int) -> bytes:
        draft = self._prompts.draft(number)
        return body_of(self._job.form, draft.prompt, draft.max_tokens)

    async def _ask(self, number: int, due_s: float, body: bytes) -> None:
        reader = AnswerReader(self._job.form.is_streamed)
        request_id = f"{self._job.id_prefix}-{number}"
        sent_s = time.monotonic()
        try:
            async with asyncio.timeout(self._job.deadline_s):
                await self._client.post(self._path, body, f"X-Request-Id: {request_id}\r\n", reader)
            reader.finish()
        except TimeoutError:
            waited_s = time.monotonic() - sent_s
            is_over = self._job.deadline_s is not None and waited_s >= self._job.deadline_s
            reader.error, reader.message = "deadline" if is_over else "timeout", f"given up after {waited_s:.1f} s"
        except (OSError, BadAnswer) as error:
            kind = "bad answer" if isinstance(error, BadAnswer) else "broken off" if reader.status else "no connection"
            reader.error, reader.message = kind, str(error) or type(error).__name__
        self._tell(self._outcome(number, request_id, due_s, sent_s, reader))

    def _outcome(self, number: int, request_id: str, due_s: float, sent_s: float, reader: AnswerReader) -> Outcome:
        end_s = time.monotonic() - self._begin_s
        found = Outcome(
            number=number,
            due_at_s=round(due_s, DIGITS),
            sent_at_s=round(sent_s - self._begin_s, DIGITS),
            end_at_s=round(end_s, DIGITS),
            request_id=request_id,
            status=reader.status,
            error=reader.error,
            message=reader.message,
            num_pieces=len(reader.times_s),
            prompt_tokens=reader.usage.prompt_tokens,
            cached_tokens=reader.cached_tokens,
            completion_tokens=reader.usage.completion_tokens,
            finish_reason=reader.finish_reason,
        )
        if reader.times_s:
            times = reader.times_s
            found.ttft_s = round(times[0] - self._begin_s - due_s, DIGITS)
            found.gaps_s = [round(later - earlier, DIGITS) for earlier, later in pairwise(times)]
        if not reader.error:
            found.e2e_s = round(end_s - due_s, DIGITS)
        return found


def main() -> int:
    """Reads a job from stdin and works on it; a file that it cannot read is one line on stderr and status 1."""
    share, shares = map(int, sys.argv[1:3])
    out = sys.stdout.buffer

    def tell(content: object) -> None:
        out.write(msgspec.json.encode(content) + b"\n")
        out.flush()

    try:
        sender = Sender(msgspec.json.decode(sys.stdin.buffer.readline(), type=Job), share, shares, tell)
    except CommandError as error:
        print(error, file=sys.stderr)
        return 1
    tell("ready")
    if begin_s := sys.stdin.buffer.readline():
        asyncio.run(sender.run(float(begin_s)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
