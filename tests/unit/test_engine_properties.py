"""Whatever is submitted and cancelled when: every stream is exactly what the model alone would say, and nothing leaks.

The scripted runner checks block discipline on every read (see its module); these tests check what comes out.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st
from twostroke_engine.request import ErrorCode, Request

from tests.support.engine_bench import EngineBench, make_request
from tests.support.scripted_runner import expected

PREFIXES = tuple(tuple(2 + (seed + 5 * position) % 36 for position in range(48)) for seed in range(3))


@dataclass(frozen=True)
class Arrival:
    """A request, how many steps run after it came, and after how many further steps it is cancelled, if at all."""

    request: Request
    num_steps: int
    cancel_after: int | None


@st.composite
def arrivals(draw: st.DrawFn, max_size: int = 12, cancels: bool = True) -> list[Arrival]:
    """Requests that share prefixes, of every length around block and chunk boundaries."""
    result = []
    for number in range(draw(st.integers(1, max_size))):
        prefix = draw(st.sampled_from(PREFIXES))[: draw(st.integers(0, 48))]
        suffix = tuple(draw(st.lists(st.integers(2, 37), min_size=0 if prefix else 1, max_size=20)))
        request = make_request(
            f"r{number}",
            prefix + suffix,
            n=draw(st.sampled_from([1, 1, 1, 2, 3])),
            priority=draw(st.integers(0, 1)),
            max_tokens=draw(st.integers(1, 40)),
            min_tokens=draw(st.sampled_from([0, 0, 3])),
            ignore_eos=draw(st.booleans()),
            seed=draw(st.integers(0, 2)),
            presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.0, 1.0])),
        )
        cancel_after = draw(st.none() | st.integers(0, 12)) if cancels else None
        result.append(Arrival(request, draw(st.integers(0, 3)), cancel_after))
    return result


@st.composite
def benches(draw: st.DrawFn) -> EngineBench:
    """Engines from roomy to so tight that no two long sequences fit."""
    return EngineBench(
        num_blocks=draw(st.integers(7, 24)),
        max_step_tokens=draw(st.integers(3, 70)),
        max_running=draw(st.integers(1, 8)),
        overlaps=draw(st.booleans()),
        batch_invariant=draw(st.booleans()),
    )


def play(bench: EngineBench, script: list[Arrival]) -> set[str]:
    """Runs a script to its end; returns the ids that were cancelled while they ran."""
    cancelled, due = set(), {}
    step = 0
    for arrival in script:
        bench.engine.submit(arrival.request)
        if arrival.cancel_after is not None:
            due[arrival.request.id] = step + arrival.cancel_after
        for _ in range(arrival.num_steps):
            bench.step()
            step += 1
            cancelled |= _cancel_due(bench, due, step)
    while due:
        bench.step()
        step += 1
        cancelled |= _cancel_due(bench, due, step)
    bench.run()
    return cancelled


def _cancel_due(bench: EngineBench, due: dict[str, int], step: int) -> set[str]:
    now = {request_id for request_id, at in due.items() if at <= step}
    for request_id in now:
        del due[request_id]
    cancelled = {request_id for request_id in now if bench.engine.cancel(request_id)}
    bench.listen()
    return cancelled


@settings(max_examples=150, deadline=None)
@given(bench=benches(), script=arrivals())
def test_every_stream_is_the_models_own(bench: EngineBench, script: list[Arrival]) -> None:
    cancelled = play(bench, script)
    for arrival in script:
        request, heard = arrival.request, bench.heard[arrival.request.id]
        alone = expected(request, bench.engine.max_model_len)
        if request.num_prompt_tokens >= bench.engine.max_model_len:
            assert heard.end is not None
            assert heard.end.error is ErrorCode.INVALID
        elif request.id in cancelled:
            assert heard.end is not None
            assert heard.end.error is ErrorCode.CANCELLED
            for choice, tokens in heard.tokens.items():
                assert tokens == alone[choice][0][: len(tokens)]
        else:
            assert heard.end is not None
            assert heard.end.error is None
            assert heard.result() == alone
    bench.assert_idle()


@settings(max_examples=60, deadline=None)
@given(script=arrivals(max_size=8, cancels=False))
def test_what_is_in_the_cache_at_the_end_is_what_its_name_says(script: list[Arrival]) -> None:
    """The hits of a second round replace computation and change nothing."""
    bench = EngineBench(num_blocks=200)
    play(bench, script)
    computed_cold = bench.runner.tokens_computed
    for arrival in script:
        again = make_request(f"again-{arrival.request.id}", arrival.request.token_ids)
        bench.engine.submit(again)
        bench.run()
        assert bench.heard[again.id].result() == expected(again, bench.engine.max_model_len)
        facts = bench.heard[again.id].end.facts
        full_blocks = (again.num_prompt_tokens - 1) // 16
        assert facts.cached_tokens == full_blocks * 16
    assert bench.runner.tokens_computed - computed_cold <= len(script) * (16 + 8)
    bench.assert_idle()


@settings(max_examples=40, deadline=None)
@given(script=arrivals(max_size=12, cancels=False), num_blocks=st.integers(7, 9))
def test_listeners_of_block_events_know_what_can_be_hit(script: list[Arrival], num_blocks: int) -> None:
    bench = EngineBench(num_blocks=num_blocks)
    known: set[bytes] = set()
    for arrival in script:
        bench.engine.submit(arrival.request)
        while bench.step():
            if events := bench.engine.take_block_events():
                known = (known - set(events.removed)) | set(events.stored)
            assert all(bench.engine.pool.match([block_hash]) for block_hash in known)
    assert bench.engine.take_block_events() is None
    assert len(known) == bench.engine.pool.num_cached
