"""Prefill and decode as two engines: blocks stay as long as a transfer reads them, and streams go on seamlessly."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from twostroke_engine.request import ErrorCode, FinishReason

from tests.support.engine_bench import EngineBench, make_request
from tests.support.scripted_runner import EOS, NAN_TOKEN, expected, kv_of, next_token
from tests.support.scripted_transfer import Pair
from tests.unit.test_engine_properties import Arrival, arrivals


def make_pair(
    prefill_blocks: int = 32, decode_blocks: int = 32, max_step_tokens: int = 40, overlaps: bool = False
) -> Pair:
    return Pair(
        EngineBench(num_blocks=prefill_blocks, max_step_tokens=max_step_tokens, overlaps=overlaps),
        EngineBench(num_blocks=decode_blocks, max_step_tokens=max_step_tokens, max_running=4, overlaps=overlaps),
    )


def turn(pair: Pair, choose: st.DataObject | None) -> None:
    """One step everywhere, and a move of every transfer, or of those drawn."""
    pair.poll()
    pair.prefill.step()
    for sink_id in sorted(pair.sender.open):
        if choose is None or choose.draw(st.booleans()):
            pair.sender.advance(sink_id)
    pair.prefill.listen()
    pair.decode.step()
    for request_id, heard in pair.prefill.heard.items():
        if heard.end is not None:
            pair.settle(request_id)


def finish(pair: Pair) -> None:
    for _ in range(3000):
        turn(pair, None)
        if not (pair.waiting or pair.sender.open or pair.prefill.engine.has_work or pair.decode.engine.has_work):
            return
    raise AssertionError("not done")


def stream(pair: Pair, request_id: str) -> list[tuple[list[int], FinishReason]]:
    """First tokens from prefill, the rest from decode."""
    first, rest = pair.prefill.heard[request_id], pair.decode.heard.get(request_id)
    choices = []
    for choice, tokens in sorted(first.tokens.items()):
        if choice in first.finishes:
            choices.append((tokens, first.finishes[choice]))
        else:
            assert rest is not None
            choices.append((tokens + rest.tokens[choice], rest.finishes[choice]))
    return choices


@settings(max_examples=80, deadline=None)
@given(
    script=arrivals(),
    prefill_blocks=st.integers(7, 20),
    decode_blocks=st.integers(7, 20),
    budget=st.integers(4, 70),
    overlaps=st.booleans(),
    data=st.data(),
)
def test_streams_go_on_where_prefill_left_them(
    script: list[Arrival], prefill_blocks: int, decode_blocks: int, budget: int, overlaps: bool, data: st.DataObject
) -> None:
    pair = make_pair(prefill_blocks, decode_blocks, budget, overlaps)
    cancels: set[str] = set()
    for arrival in script:
        pair.reserve(arrival.request)
        for _ in range(arrival.num_steps):
            turn(pair, data)
        if arrival.cancel_after is not None and data.draw(st.booleans()):
            victim = data.draw(st.sampled_from(script)).request.id
            cancels.add(victim)
            pair.cancel(victim)
    finish(pair)
    for arrival in script:
        request = arrival.request
        if request.id in cancels:
            assert all(
                bench.heard[request.id].end.error in (None, ErrorCode.CANCELLED)
                for bench in (pair.prefill, pair.decode)
                if request.id in bench.heard
            )
        else:
            assert stream(pair, request.id) == expected(request, pair.decode.engine.max_model_len)
    pair.prefill.assert_idle()
    pair.decode.assert_idle()
    assert pair.prefill.engine.load().preemptions == 0


def test_blocks_stay_until_the_transfer_has_closed() -> None:
    pair = make_pair()
    request = make_request("a", 40)
    pair.reserve(request)
    pair.poll()
    pair.prefill.run()
    pool = pair.prefill.engine.pool
    assert pool.num_referenced == 3
    pair.prefill.engine.cancel("a")
    pair.prefill.listen()
    assert pool.num_referenced == 3
    assert pair.prefill.heard["a"].end is None
    pair.sender.advance(1)
    pair.prefill.listen()
    assert (pool.num_referenced, pool.num_cached) == (0, 2)
    assert pair.prefill.heard["a"].end.error is ErrorCode.CANCELLED


def test_the_first_reason_to_end_a_hand_off_is_the_one_that_is_told() -> None:
    pair = make_pair()
    pair.reserve(replace(make_request("a", 40), deadline_s=3.0))
    pair.poll()
    pair.prefill.step()
    pair.prefill.engine.cancel("a")
    for _ in range(5):
        pair.prefill.step()
    pair.sender.advance(1)
    pair.prefill.listen()
    assert pair.prefill.heard["a"].end.error is ErrorCode.CANCELLED


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_a_lost_peer_ends_the_request_in_any_phase(num_steps: int) -> None:
    pair = make_pair(max_step_tokens=16)
    pair.reserve(make_request("a", 40))
    pair.poll()
    for _ in range(num_steps):
        pair.prefill.step()
    pair.sender.fail(1)
    pair.prefill.run()
    end = pair.prefill.heard["a"].end
    assert (end.error, end.message) == (ErrorCode.TRANSFER, "the peer is lost")
    pair.prefill.assert_idle()


def test_a_request_that_ends_with_its_first_token_is_not_adopted() -> None:
    pair = make_pair()
    request = make_request("a", 20, max_tokens=1)
    pair.reserve(request)
    finish(pair)
    assert pair.prefill.heard["a"].result() == expected(request, 512)
    assert pair.prefill.heard["a"].end.error is None
    assert "a" not in pair.decode.heard
    pair.decode.assert_idle()


def test_only_unfinished_choices_go_on() -> None:
    """A seed for which one of two choices begins with the end token."""
    digest = kv_of(make_request("a", 20).token_ids)[-1]
    seed = next(s for s in range(9999) if next_token(digest, s, 0) == EOS != next_token(digest, s, 1))
    pair = make_pair()
    request = make_request("a", 20, n=2, seed=seed, ignore_eos=False)
    pair.reserve(request)
    finish(pair)
    assert pair.prefill.heard["a"].finishes == {0: FinishReason.STOP}
    assert set(pair.decode.heard["a"].tokens) == {1}
    assert stream(pair, "a") == expected(request, 512)


def test_broken_logits_end_a_hand_off_and_leave_nothing_in_the_cache() -> None:
    pair = make_pair(max_step_tokens=16)
    pair.reserve(make_request("a", (NAN_TOKEN, *range(2, 37))))
    pair.poll()
    pair.prefill.run()
    pair.sender.advance(1)
    pair.prefill.listen()
    assert pair.prefill.heard["a"].end.error is ErrorCode.NUMERIC
    pool = pair.prefill.engine.pool
    assert pool.num_free == pool.num_blocks


def test_facts_of_both_sides() -> None:
    pair = make_pair()
    pair.reserve(make_request("a", 40))
    finish(pair)
    prefill, decode = (bench.heard["a"].end.facts for bench in (pair.prefill, pair.decode))
    assert (prefill.kv_segments, prefill.kv_bytes, prefill.transfer_s) == (3, 64, 1.0)
    assert (decode.transfer_s, decode.prefill_s, decode.preemptions) == (1.0, 0.0, 0)


def test_a_reservation_is_not_kept_out_by_later_requests() -> None:
    """Decode is full of local work that keeps coming; a reservation gets its turn, and so does local work after it."""
    decode = EngineBench(num_blocks=8, max_running=8)
    for number in range(30):
        decode.engine.submit(make_request(f"early{number}", 30, max_tokens=10))
    decode.step()
    granted_after = None
    for number in range(400):
        decode.engine.submit(make_request(f"late{number}", 30, max_tokens=10))
        if granted_after is None and decode.engine.may_promise(6):
            assert decode.engine.pool.promise(6)
            granted_after = sum(heard.end is not None for heard in decode.heard.values())
            decode.engine.pool.withdraw(6)
        decode.step()
    assert granted_after is not None
    assert 29 <= granted_after <= 34, "those that came before it were served first, those after it were not"
    decode.run()
    assert all(heard.end.error is None for heard in decode.heard.values())
