"""A worker in virtual time: an engine whose steps take as long as a fitted model says, and its prefix cache.

A step computes a chunk of the oldest waiting prompt, if there is one, and a token of every running sequence. Steps that
only decode are alike until a sequence ends or a request comes, so they are taken together: time does not pass token by
token, and an hour of a thousand workers takes minutes.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, sqrt

import msgspec


class StepTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds of an engine step, as a sum of what is in it."""

    step_s: float = 5.1e-3
    """A step of nothing."""
    token_s: float = 2.5e-5
    """Each prompt token."""
    sequence_s: float = 1.6e-5
    """Each running sequence."""
    context_s: float = 4.6e-8
    """Each token of KV that running sequences attend to."""

    def of(self, prompt_tokens: float, sequences: float, context_tokens: float) -> float:
        """Seconds of one step."""
        return (
            self.step_s + self.token_s * prompt_tokens + self.sequence_s * sequences + self.context_s * context_tokens
        )


class Cache:
    """A prefix cache of blocks, the least recently used of which go first; a prompt's tail before its head."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def leading(self, blocks: Sequence[int]) -> int:
        """How many leading blocks of a prompt are here."""
        return next((at for at, block in enumerate(blocks) if block not in self._blocks), len(blocks))

    def use(self, blocks: Sequence[int]) -> tuple[list[int], list[int]]:
        """Computes or touches a prompt's blocks; returns those that came, and those that went."""
        came = [block for block in blocks if block not in self._blocks]
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        gone = [self._blocks.popitem(last=False)[0] for _ in range(len(self._blocks) - self._num_blocks)]
        return came, gone

    @property
    def blocks(self) -> tuple[int, ...]:
        """All that is here."""
        return tuple(self._blocks)


@dataclass(slots=True, eq=False)
class Job:
    """One request as a worker sees it."""

    number: int
    prompt_len: int
    output_len: int
    blocks: tuple[int, ...]
    on_token: Callable[[Job, float], None]
    """Told of the first token."""
    on_end: Callable[[Job, float], None]
    runs_on: bool = True
    """Whether it decodes where its prompt is computed."""
    left: int = 0
    """Prompt tokens still to compute."""
    hit_tokens: int = 0
    is_begun: bool = False


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine takes."""

    max_step_tokens: int = 8192
    max_running: int = 256
    num_blocks: int = 4000
    block_len: int = 512

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV that it holds."""
        return self.num_blocks * self.block_len


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker reports of itself."""

    queued_tokens: int
    sequences: int
    free_tokens: int


@dataclass(slots=True)
class _Span:
    """Steps that were taken together: only the last may end sequences."""

    began_s: float
    num_steps: int
    first_s: float
    """Seconds of its first step."""
    growth_s: float
    """How much longer each is than the one before: contexts grow."""

    def seconds(self, num_steps: int) -> float:
        """Of its first steps."""
        return num_steps * self.first_s + self.growth_s * num_steps * (num_steps - 1) / 2

    def steps_by(self, now_s: float) -> int:
        """Steps until the one that runs at a moment has ended."""
        passed_s = max(0.0, now_s - self.began_s)
        if self.growth_s > 0:
            half = self.first_s - self.growth_s / 2
            steps = (sqrt(half * half + 2 * self.growth_s * passed_s) - half) / self.growth_s
        else:
            steps = passed_s / self.first_s if self.first_s else inf
        return min(self.num_steps, max(1, int(-(-steps // 1)) if steps < inf else self.num_steps))


_Change = tuple[float, list[int], list[int]]

Schedule = Callable[[float, Callable[[float], None]], None]
"""Calls back at a time."""


class Worker:
    """One engine. `submit` and `adopt` give it requests; `heard` is called when its load has changed."""

    def __init__(self, times: StepTimes, limits: Limits, schedule: Schedule, heard: Callable[[float], None]) -> None:
        self.cache = Cache(limits.num_blocks)
        self._times, self._limits = times, limits
        self._schedule, self._heard = schedule, heard
        self._prompts: deque[Job] = deque()
        self._adopted: deque[Job] = deque()
        self._running: list[tuple[int, int, Job]] = []
        self._queued_tokens = 0
        self._context = 0
        self._step = 0
        self._span: _Span | None = None
        self._chunk_of_span: list[tuple[Job, int]] = []
        self._version = 0
        self._changes: list[_Change] = []

    @property
    def load(self) -> Load:
        """How busy it is now."""
        room = self._limits.kv_tokens - self._context
        sequences = len(self._running) + len(self._prompts) + len(self._adopted)
        return Load(self._queued_tokens, sequences, max(0, room))

    def submit(self, job: Job, now_s: float) -> None:
        """Computes a prompt, and goes on with it if it runs here."""
        job.left = job.prompt_len
        self._queued_tokens += job.left
        self._look_up(job)
        job.is_begun = False
        self._prompts.append(job)
        self._interrupt(now_s)
        self._heard(now_s)

    def adopt(self, job: Job, now_s: float) -> None:
        """Goes on with a request whose prompt another worker computed."""
        self._adopted.append(job)
        self._interrupt(now_s)
        self._heard(now_s)

    def take_changes(self) -> list[_Change]:
        """Blocks that came and went since the last time, each with the time."""
        taken, self._changes = self._changes, []
        return taken

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _interrupt(self, now_s: float) -> None:
        """Something came: the step that runs now is the last of its span."""
        if self._span is None:
            self._begin(now_s)
            return
        steps = self._span.steps_by(now_s)
        if steps < self._span.num_steps:
            self._span.num_steps = steps
            self._await_end(self._span)

    def _begin(self, now_s: float) -> None:
        self._take_adopted(now_s)
        chunk = self._chunk(now_s)
        running = len(self._running)
        if not chunk and not running:
            self._span = None
            return
        num_steps = 1 if chunk else self._running[0][0] - self._step
        first_s = self._times.of(sum(tokens for _, tokens in chunk), running, self._context)
        self._span = _Span(now_s, num_steps, first_s, self._times.context_s * running)
        self._chunk_of_span = chunk
        self._await_end(self._span)

    def _await_end(self, span: _Span) -> None:
        self._version += 1
        version = self._version

        def ended(now_s: float) -> None:
            if version == self._version:
                self._end(span, now_s)

        self._schedule(span.began_s + span.seconds(span.num_steps), ended)

    def _end(self, span: _Span, now_s: float) -> None:
        self._step += span.num_steps
        self._context += span.num_steps * len(self._running)
        while self._running and self._running[0][0] <= self._step:
            job = heapq.heappop(self._running)[2]
            self._context -= job.prompt_len + job.output_len
            job.on_end(job, now_s)
        for job, tokens in self._chunk_of_span:
            self._computed(job, tokens, now_s)
        self._begin(now_s)
        self._heard(now_s)

    def _take_adopted(self, now_s: float) -> None:
        while self._adopted and self._has_room(self._adopted[0]):
            job = self._adopted.popleft()
            self._changed(now_s, job)
            self._run(job)

    def _has_room(self, job: Job) -> bool:
        tokens = self._context + job.prompt_len + job.output_len
        return not self._running or (len(self._running) < self._limits.max_running and tokens <= self._limits.kv_tokens)

    def _run(self, job: Job) -> None:
        """Its first token exists; the others take a step each."""
        self._context += job.prompt_len + 1
        heapq.heappush(self._running, (self._step + job.output_len - 1, job.number, job))

    def _chunk(self, now_s: float) -> list[tuple[Job, int]]:
        """Prompt tokens of the next step, oldest prompts first."""
        budget = self._limits.max_step_tokens - len(self._running)
        chunk: list[tuple[Job, int]] = []
        for job in self._prompts:
            if budget <= 0 or (job.runs_on and not self._has_room(job)):
                break
            if not job.is_begun:
                self._look_up(job)
            tokens = min(job.left, budget)
            budget -= tokens
            chunk.append((job, tokens))
        return chunk

    def _look_up(self, job: Job) -> None:
        """What the cache holds of a prompt counts when it is begun: more may have come while it waited."""
        hit = min(self.cache.leading(job.blocks) * self._limits.block_len, job.prompt_len - 1)
        self._queued_tokens += job.prompt_len - hit - job.left
        job.left, job.hit_tokens, job.is_begun = job.prompt_len - hit, hit, True

    def _computed(self, job: Job, tokens: int, now_s: float) -> None:
        job.left -= tokens
        self._queued_tokens -= tokens
        if job.left:
            return
        self._prompts.popleft()
        self._changed(now_s, job)
        job.on_token(job, now_s)
        if not job.runs_on:
            return
        if job.output_len > 1:
            self._run(job)
        else:
            job.on_end(job, now_s)

    def _changed(self, now_s: float, job: Job) -> None:
        came, gone = self.cache.use(job.blocks)
        if came or gone:
            self._changes.append((now_s, came, gone))
