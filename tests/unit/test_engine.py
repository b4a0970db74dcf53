"""Ends of requests, and what an engine reports."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from twostroke_engine.messages import ChoiceDelta, LeaseGrant, RequestEnd, RequestUpdate
from twostroke_engine.request import ErrorCode, FinishReason, Request, RequestFacts, SamplingParams, TokenOut
from twostroke_engine.transfer.messages import FirstToken
from twostroke_engine.updates import Updates

from tests.support.engine_bench import EngineBench, make_request
from tests.support.scripted_runner import EOS, NAN_TOKEN, expected, kv_of, next_token


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (make_request("a", ()), "prompt"),
        (make_request("a", 64), "prompt"),
        (make_request("a", 5, n=0), "n"),
        (make_request("a", 5, max_tokens=0), "max_tokens"),
    ],
)
def test_a_request_that_cannot_run_is_refused_and_nothing_is_held(request_: Request, field: str) -> None:
    bench = EngineBench(num_blocks=4)
    bench.engine.submit(request_)
    bench.listen()
    end = bench.heard["a"].end
    assert end.error is ErrorCode.INVALID
    assert end.message.startswith(f"{field}: ")
    bench.assert_idle()


def test_the_context_limit_ends_a_choice_by_length() -> None:
    bench = EngineBench(num_blocks=4, max_model_len=50)
    request = make_request("a", 49, max_tokens=99)
    bench.engine.submit(request)
    bench.run()
    assert bench.heard["a"].result() == expected(request, 50)
    longest = make_request("b", 20, max_tokens=99)
    bench.engine.submit(longest)
    bench.run()
    assert len(bench.heard["b"].tokens[0]) == 30


def test_the_longest_sequence_fills_the_pool_alone() -> None:
    bench = EngineBench(num_blocks=4)
    request = make_request("a", 10, max_tokens=99)
    bench.engine.submit(request)
    bench.run()
    assert bench.heard["a"].result() == expected(request, 64)
    assert bench.engine.load().preemptions == 0


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_a_cancel_ends_a_request_in_any_phase(num_steps: int) -> None:
    bench = EngineBench(max_step_tokens=16)
    bench.engine.submit(make_request("a", 20, n=2))
    for _ in range(num_steps):
        bench.step()
    assert bench.engine.cancel("a")
    assert not bench.engine.cancel("a")
    bench.run()
    assert bench.heard["a"].end.error is ErrorCode.CANCELLED
    bench.assert_idle()


def test_a_deadline_counts_from_the_submit() -> None:
    bench = EngineBench()
    bench.engine.submit(replace(make_request("late", 5, max_tokens=50), deadline_s=3.0))
    bench.engine.submit(replace(make_request("early", 5, max_tokens=2), deadline_s=3.0))
    bench.run()
    assert bench.heard["late"].end.error is ErrorCode.DEADLINE
    assert len(bench.heard["late"].tokens[0]) == 3
    assert bench.heard["early"].end.error is None
    bench.assert_idle()


def test_a_reused_id_does_not_inherit_a_deadline() -> None:
    bench = EngineBench()
    bench.engine.submit(replace(make_request("a", 5, max_tokens=1), deadline_s=3.0))
    bench.run()
    bench.heard.clear()
    bench.engine.submit(make_request("a", 5, max_tokens=9))
    bench.run()
    assert bench.heard["a"].end.error is None


def test_broken_logits_end_their_request_only_and_are_never_hit() -> None:
    bench = EngineBench(max_step_tokens=16)
    prompt = (NAN_TOKEN, *range(2, 37))
    bench.engine.submit(make_request("broken", prompt, n=2))
    bench.engine.submit(make_request("fine", 20))
    bench.run()
    assert bench.heard["broken"].end.error is ErrorCode.NUMERIC
    assert bench.heard["fine"].end.error is None
    bench.engine.submit(make_request("again", prompt))
    bench.run()
    assert bench.heard["again"].end.facts.cached_tokens == 0
    bench.assert_idle()


def test_an_id_in_use_is_not_taken_twice() -> None:
    bench = EngineBench()
    request = make_request("a", 20)
    bench.engine.submit(request)
    bench.step()
    bench.engine.submit(request)
    blocks = bench.engine.pool.allocate(2)
    bench.engine.adopt(request, blocks, (FirstToken(0, 5),), RequestFacts())
    bench.run()
    assert bench.heard["a"].result() == expected(request, 1024)
    bench.assert_idle()


def test_facts_are_durations_of_this_engine() -> None:
    bench = EngineBench(max_step_tokens=16, max_running=1)
    bench.engine.submit(make_request("first", 5, max_tokens=4))
    bench.engine.submit(make_request("second", 40, max_tokens=2))
    bench.run()
    facts = bench.heard["second"].end.facts
    assert (facts.queue_s, facts.prefill_s, facts.cached_tokens, facts.preemptions) == (4.0, 2.0, 0, 0)
    load = bench.engine.load()
    assert load.longest_wait_s == 4.0
    assert load.steps == len(bench.runner.plans)


def test_preemptions_are_counted_where_they_happen() -> None:
    bench = EngineBench(num_blocks=7)
    requests = [make_request(f"r{number}", 30, max_tokens=40) for number in range(4)]
    for request in requests:
        bench.engine.submit(request)
    bench.run()
    counted = sum(bench.heard[request.id].end.facts.preemptions for request in requests)
    assert counted == bench.engine.load().preemptions > 0
    assert all(bench.heard[request.id].result() == expected(request, 112) for request in requests)


def test_load_tells_what_is_queued() -> None:
    bench = EngineBench(max_step_tokens=16, max_running=1)
    bench.engine.submit(make_request("a", 40))
    bench.engine.submit(make_request("b", 30))
    bench.step()
    load = bench.engine.load()
    assert (load.waiting, load.running, load.queued_tokens) == (1, 1, 24 + 30)
    assert (load.blocks_total, load.blocks_free, load.blocks_leased) == (64, 61, 3)


def test_news_of_one_request_are_merged_up_to_its_end() -> None:
    updates = Updates()
    end = RequestEnd(facts=RequestFacts())
    delta = ChoiceDelta(choice=0, offset=0, tokens=(TokenOut(3),))
    grant = LeaseGrant(lease_id="l", epoch=1, ttl_s=1.0)
    updates.add(RequestUpdate(request_id="a", reserved=grant))
    updates.delta("a", delta)
    updates.delta("b", delta)
    updates.add(RequestUpdate(request_id="a", end=end))
    updates.delta("a", delta)
    assert updates.take() == (
        RequestUpdate(request_id="a", deltas=(delta,), reserved=grant, end=end),
        RequestUpdate(request_id="b", deltas=(delta,)),
        RequestUpdate(request_id="a", deltas=(delta,)),
    )
    assert updates.take() == ()


def test_sampling_defaults_reach_the_runner_unchanged() -> None:
    bench = EngineBench()
    sampling = SamplingParams(temperature=0.5, max_tokens=2)
    bench.engine.submit(Request(id="a", token_ids=(5, 6), sampling=sampling))
    bench.run()
    assert bench.runner.plans[0].new[0].sampling is sampling


def test_a_step_is_launched_before_the_one_before_it_has_landed() -> None:
    bench = EngineBench(overlaps=True)
    bench.engine.submit(make_request("a", 20, max_tokens=4))
    bench.step()
    assert not bench.heard, "the first step is still computed"
    bench.step()
    assert bench.heard["a"].tokens[0] == expected(make_request("a", 20, max_tokens=4), 112)[0][0][:1]
    bench.run()
    assert bench.runner.most_aloft == 2
    assert bench.engine.load().steps == 4, "nothing was computed in vain: the length was known"


def test_a_row_computed_for_a_sequence_that_had_ended_is_dropped() -> None:
    request = make_request("a", 20, max_tokens=30, ignore_eos=False)
    digest = kv_of(request.token_ids)[-1]
    seed = next(seed for seed in range(9999) if next_token(digest, seed, 0) == EOS)
    request = make_request("a", 20, max_tokens=30, ignore_eos=False, seed=seed)
    bench = EngineBench(overlaps=True)
    bench.engine.submit(request)
    bench.run()
    assert bench.heard["a"].result() == [([EOS], FinishReason.STOP)]
    assert bench.engine.load().steps == 2
    bench.assert_idle()


def test_penalties_are_of_tokens_that_are_known() -> None:
    """The logits of a penalised request depend on the token before, so its step waits for that."""
    bench = EngineBench(overlaps=True)
    bench.engine.submit(make_request("a", 20, frequency_penalty=0.5))
    bench.engine.submit(make_request("b", 20))
    while bench.engine.has_work:
        assert bench.step(), "the last landing counts as well"
    assert bench.runner.most_aloft == 1
    assert bench.engine.load().steps == 8


def test_choices_that_outlive_a_preempted_parent_are_computed_again() -> None:
    bench = EngineBench(num_blocks=4, overlaps=True)
    requests = [make_request(name, 16) for name in ("first", "second")]
    requests.append(make_request("forks", 15, n=2, max_tokens=3, priority=1))
    for request in requests:
        bench.engine.submit(request)
    bench.step()
    bench.step()
    assert bench.engine.load().preemptions == 1
    assert len(bench.heard["forks"].tokens) == 2, "its tokens landed after it had lost its blocks"
    bench.run()
    assert [bench.heard[request.id].result() for request in requests] == [expected(entry, 64) for entry in requests]
    bench.assert_idle()
