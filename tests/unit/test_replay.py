"""Replays: a worker whose steps are taken together against one that takes them singly, and what several routers do."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twostroke_cli.__main__ import app
from twostroke_cli.bench.trace import Row
from twostroke_cli.errors import CommandError
from twostroke_cli.replay.cluster import Cluster, Delays
from twostroke_cli.replay.commands import ReplayFlags, cluster_of
from twostroke_cli.replay.figures import figures_of, ideal_hit_share
from twostroke_cli.replay.planning import Plan
from twostroke_cli.replay.session import reshaped
from twostroke_cli.replay.simulation import Simulation
from twostroke_cli.replay.worker import Cache, Job, Limits, StepTimes, Worker
from twostroke_router.placement import POLICIES
from typer.testing import CliRunner

TIMES = StepTimes(step_s=0.004, token_s=2e-5, sequence_s=1e-4, context_s=1e-6)
LIMITS = Limits(max_step_tokens=600, max_running=4, num_blocks=40, block_len=64)


class Clock:
    """Calls back in the order of time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._queue: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()

    def schedule(self, at_s: float, call: Callable[[float], None]) -> None:
        heapq.heappush(self._queue, (at_s, next(self._order), call))

    def run(self) -> None:
        while self._queue:
            self.now_s, _, call = heapq.heappop(self._queue)
            call(self.now_s)


def job_ends(arrivals: list[tuple[float, int, int]], is_stepwise: bool) -> list[tuple[float, float]]:
    """When each request had its first token and its end. Stepwise: something comes all the time, so spans are short."""
    clock, found = Clock(), [[0.0, 0.0] for _ in arrivals]
    worker = Worker(TIMES, LIMITS, clock.schedule, lambda now_s: None)

    def submit(number: int, prompt_len: int, output_len: int) -> Callable[[float], None]:
        def first(job: Job, now_s: float) -> None:
            found[number][0] = now_s

        def end(job: Job, now_s: float) -> None:
            found[number][1] = now_s

        return lambda now_s: worker.submit(Job(number, prompt_len, output_len, (), first, end), now_s)

    for number, (at_s, prompt_len, output_len) in enumerate(arrivals):
        clock.schedule(at_s, submit(number, prompt_len, output_len))
    if is_stepwise:
        for tick in range(4000):
            clock.schedule(tick * 1e-3, worker._interrupt)
    clock.run()
    return [(first_s, end_s) for first_s, end_s in found]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.5), st.integers(1, 900), st.integers(1, 60)), min_size=1, max_size=12))
def test_steps_taken_together_end_when_single_steps_do(arrivals: list[tuple[float, int, int]]) -> None:
    arrivals.sort()
    together, singly = job_ends(arrivals, is_stepwise=False), job_ends(arrivals, is_stepwise=True)
    for (first_s, end_s), (first_singly_s, end_singly_s) in zip(together, singly, strict=True):
        assert first_s == pytest.approx(first_singly_s, abs=1e-6)
        assert end_s == pytest.approx(end_singly_s, abs=1e-6)


def test_a_lone_request_takes_what_its_steps_take() -> None:
    [(first_s, end_s)] = job_ends([(1.0, 1000, 11)], is_stepwise=False)
    assert first_s == pytest.approx(1.0 + 2 * TIMES.step_s + 1000 * TIMES.token_s)
    contexts = range(1001, 1011)
    assert end_s - first_s == pytest.approx(sum(TIMES.of(0, 1, context) for context in contexts))


def test_a_cache_forgets_tails_first() -> None:
    cache = Cache(4)
    assert cache.use((1, 2, 3)) == ([1, 2, 3], [])
    assert cache.leading((1, 2, 9)) == 2
    assert cache.use((7, 8)) == ([7, 8], [3])
    assert cache.leading((1, 2, 3)) == 2


def conversations(num_turns: int, num_sessions: int = 23) -> list[Row]:
    """Sessions whose prompts grow, in bursts of eight at one moment."""
    rows = []
    for number in range(num_turns * num_sessions):
        turn, session = divmod(number, num_sessions)
        blocks = tuple(session * 1000 + place for place in range(2 + 2 * turn))
        rows.append(Row(number // 8 * 0.5, 512 * len(blocks), 20, blocks))
    return rows


def run(rows: list[Row], policy: str = "cost", **more: object) -> tuple[float, float]:
    """Share of hits, and mean TTFT."""
    given = {"prefill": 4, "decode": 0, "limits": Limits(num_blocks=200), "times": StepTimes(token_s=2e-4), **more}
    outcomes = Simulation(rows, Cluster(**given), POLICIES[policy]).run()  # type: ignore[arg-type]
    figures = figures_of(policy, (4, 0, 1), outcomes, {"ttft": 1.0})
    assert figures.ttft_s is not None
    assert figures.refused == 0
    return figures.hit_share, figures.ttft_s.mean


def test_routers_together_place_as_well_as_one() -> None:
    rows = conversations(5)
    hits, ttft_s = run(rows)
    assert hits <= ideal_hit_share(rows, 512)
    many_hits, many_ttft_s = run(rows, routers=8)
    assert many_hits > hits - 0.03
    assert many_ttft_s < 1.1 * ttft_s
    away_hits, _ = run(rows, routers=8, redis_away=(2.0, 5.0), delays=Delays(snapshot_s=0.5))
    assert away_hits > hits - 0.05
    assert run(rows, "round-robin")[0] < hits - 0.1


def test_every_request_ends_wherever_it_decodes() -> None:
    rows = conversations(2)
    for prefill, decode in ((0, 2), (1, 1), (2, 1)):
        for policy in ("cost", "conditional"):
            outcomes = Simulation(rows, Cluster(prefill=prefill, decode=decode), POLICIES[policy]).run()
            assert all(outcome.ended_s is not None and outcome.first_s is not None for outcome in outcomes)
            assert all(outcome.itl_s is not None and outcome.itl_s >= 0.005 for outcome in outcomes)


def test_a_plan_is_the_fewest_workers_that_are_enough() -> None:
    def replayed(prefill: int, decode: int) -> object:
        share = min(1.0, (prefill + decode) / 11 - 0.01 * (prefill == 0))
        figures = figures_of("cost", (prefill, decode, 1), [], {})
        return msgspec.structs.replace(figures, goodput=share)

    best = Plan(replayed, 0.9).fewest()  # type: ignore[arg-type]
    assert best.prefill + best.decode == 10
    assert best.prefill
    with pytest.raises(CommandError, match="do not meet"):
        Plan(lambda prefill, decode: figures_of("", (prefill, decode, 1), [], {"ttft": 1}), 0.9).fewest()


def test_times_are_reshaped() -> None:
    rows = [Row(at_s, 10, 1) for at_s in (4.0, 4.0, 7.0)]
    assert [row.at_s for row in reshaped(rows, 1.0, is_spread=True)] == [0.0, 1.5, 3.0]
    assert [row.at_s for row in reshaped(rows, 2.0, is_spread=False)] == [0.0, 0.0, 1.5]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (ReplayFlags(times="token=fast"), "--times"),
        (ReplayFlags(times="tokens=1"), "--times"),
        (ReplayFlags(redis_away="later"), "--redis-away"),
        (ReplayFlags(prefill=0, decode=0), "--prefill"),
    ],
)
def test_flags_that_say_nothing_are_named(flags: ReplayFlags, named: str) -> None:
    with pytest.raises(CommandError, match=named):
        cluster_of(flags)


def test_the_command_shows_and_writes_what_it_found(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    line = '{"timestamp": %d, "input_length": 1024, "output_length": 4, "hash_ids": [%d, %d]}\n'
    trace.write_text("".join(line % (1000 * number, number % 3, 3 + number % 3) for number in range(12)))
    json_file, png_file = tmp_path / "figures.json", tmp_path / "chart.png"
    flags = ["--policy", "cost", "--policy", "round-robin", "--json", str(json_file), "--png", str(png_file)]
    shown = CliRunner().invoke(app, ["replay", str(trace), "--prefill", "1", "--decode", "2", *flags])
    assert shown.exit_code == 0, shown.output
    assert "round-robin" in shown.output
    found = msgspec.json.decode(json_file.read_bytes())
    assert [each["policy"] for each in found["found"]] == ["cost", "round-robin"]
    assert found["ideal"] > 0.5
    assert png_file.read_bytes().startswith(b"\x89PNG")
    planned = CliRunner().invoke(app, ["replay", str(trace), "--slo", "ttft=1", "--plan", "--share", "1"])
    assert "workers" in planned.output.splitlines()[-1]
    refused = CliRunner().invoke(app, ["replay", str(trace), "--policy", "best"])
    assert isinstance(refused.exception, CommandError)
    assert "--policy best" in str(refused.exception)
