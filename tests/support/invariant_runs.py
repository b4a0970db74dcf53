"""The same requests under many schedules: alone, in crowds, in a pool too small for them, cut into other chunks."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
from twostroke_engine.engine import Engine
from twostroke_engine.request import Request, SamplingParams, TokenOut

if TYPE_CHECKING:
    from twostroke_engine.config import EngineConfig
    from twostroke_engine.runner.model_runner import LoadedModel

Streams = dict[tuple[str, int], list[TokenOut]]
"""Tokens, with logprobs where they were asked for, by request and choice."""


@dataclass(frozen=True)
class Schedule:
    """What decides how work is cut and mixed."""

    seed: int
    """Of the order and the times of arrival, of priorities and interruptions."""
    arrivals: int
    """Most requests that come between two steps."""
    max_step_tokens: int
    max_running: int
    num_blocks: int
    interruptions: float = 0.0
    """Chance that a sequence, whichever it is, loses its blocks between two steps; once for each is enough."""


@dataclass(frozen=True)
class Work:
    """The kind of requests to draw."""

    vocab_size: int
    most_prompt_tokens: int
    most_new_tokens: int
    long_prompts: tuple[int, ...] = ()
    """Lengths of a few more prompts."""


def draw_requests(work: Work, count: int, seed: int) -> list[Request]:
    """Greedy and drawn, with and without filters, penalties, logprobs and forks; some begin alike."""
    rng = random.Random(seed)
    stem = rng.choices(range(3, work.vocab_size), k=work.most_prompt_tokens)
    lengths = [*work.long_prompts, *(rng.randint(1, work.most_prompt_tokens) for _ in range(count))][:count]
    requests = []
    for number, length in enumerate(lengths):
        own = rng.choices(range(3, work.vocab_size), k=length)
        shared = rng.randint(0, min(length, len(stem))) if rng.random() < 0.5 else 0
        requests.append(
            Request(
                id=f"r{number}",
                token_ids=(*stem[:shared], *own[shared:]),
                sampling=_draw_sampling(rng, number, work.most_new_tokens),
                n=2 if rng.random() < 0.1 else 1,
            )
        )
    return requests


def _draw_sampling(rng: random.Random, seed: int, most_tokens: int) -> SamplingParams:
    filters = ({}, {}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.8})
    penalties = ({}, {}, {}, {"repetition_penalty": 1.2, "presence_penalty": 0.3})
    return SamplingParams(
        temperature=rng.choice((0.0, 0.0, 0.7, 1.0, 1.5)),
        seed=seed,
        max_tokens=rng.randint(1, most_tokens),
        ignore_eos=True,
        logprobs=rng.choice((None, 0, 3)),
        **rng.choice(filters),  # type: ignore[arg-type]
        **rng.choice(penalties),  # type: ignore[arg-type]
    )


def run_alone(config: EngineConfig, model: LoadedModel, requests: Sequence[Request]) -> Streams:
    """Each request by itself, with nothing cached."""
    streams: Streams = {}
    for request in requests:
        engine = _engine(config, model)
        engine.submit(request)
        _run(engine, streams)
    return streams


def run_crowd(
    config: EngineConfig, model: LoadedModel, requests: Sequence[Request], schedule: Schedule
) -> tuple[Streams, int]:
    """All of them, arriving in an order and at times of the schedule's; also how often one was preempted."""
    rng = random.Random(schedule.seed)
    told = msgspec.structs.replace(config, max_step_tokens=schedule.max_step_tokens, max_running=schedule.max_running)
    engine = _engine(told, model, schedule.num_blocks)
    waiting = [msgspec.structs.replace(request, priority=rng.randint(0, 2)) for request in requests]
    rng.shuffle(waiting)
    streams: Streams = {}
    interrupted: set[int] = set()
    while waiting or engine.has_work:
        for _ in range(min(rng.randint(0, schedule.arrivals), len(waiting))):
            engine.submit(waiting.pop())
        if rng.random() < schedule.interruptions:
            _interrupt(engine, rng, interrupted)
        engine.step()
        _listen(engine, streams)
    engine.pool.check()
    assert engine.pool.num_referenced == 0
    return streams, engine.load().preemptions


def _engine(config: EngineConfig, model: LoadedModel, num_blocks: int | None = None) -> Engine:
    return Engine(config, model.spec, num_blocks or model.num_blocks, model.runner, model.eos_token_ids, time.monotonic)


def _interrupt(engine: Engine, rng: random.Random, interrupted: set[int]) -> None:
    """Preempts anyone, as planning does to the least important one when memory runs out."""
    scheduler = engine._scheduler
    everyone = (*scheduler._running, *scheduler._waiting)
    holders = [one for one in everyone if one.block_ids and one.sequence_id not in interrupted]
    if holders:
        victim = rng.choice(holders)
        interrupted.add(victim.sequence_id)
        scheduler._preempt(victim)


def _run(engine: Engine, streams: Streams) -> None:
    while engine.has_work:
        engine.step()
        _listen(engine, streams)


def _listen(engine: Engine, streams: Streams) -> None:
    for update in engine.take_updates():
        assert update.end is None or update.end.error is None, update.end
        for delta in update.deltas:
            streams.setdefault((update.request_id, delta.choice), []).extend(delta.tokens)
