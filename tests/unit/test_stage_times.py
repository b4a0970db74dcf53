"""What an engine and its service say of the time before a request's first tokens."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from twostroke_engine.active import ActiveRequest
from twostroke_engine.messages import ChoiceDelta, RequestUpdate, StageTimes
from twostroke_engine.request import Request, RequestFacts, TokenOut
from twostroke_engine.transfer.end import HandOffOutcome
from twostroke_engine.transfer.hand_off import HandOff
from twostroke_engine.transfer.messages import FirstToken
from twostroke_engine.transfer.reservation import Reservation, WaitingRequest
from twostroke_router.wire import Reading, update_from_proto
from twostroke_worker.ledger import Ledger
from twostroke_worker.wire import LeaseHome, receipt_to_proto, update_to_proto

from tests.support.engine_bench import EngineBench, make_request
from tests.support.scripted_runner import kv_of

HOME = LeaseHome("w", "h:1", "k")


def stages_of(bench: EngineBench, max_steps: int = 50) -> list[tuple[str, int, StageTimes]]:
    """Every stage that is told until nothing is left to do: of which request, with how many tokens, and what."""
    told = []
    for _ in range(max_steps):
        if not bench.engine.step() and not bench.engine.has_work:
            return told
        bench.now_s += 1
        for update in bench.engine.take_updates():
            if update.stages is not None:
                told.append((update.request_id, sum(len(delta.tokens) for delta in update.deltas), update.stages))
    raise AssertionError("not done")


@pytest.mark.parametrize("n", [1, 3])
def test_a_request_that_stays_tells_of_its_first_two_tokens(n: int) -> None:
    bench = EngineBench(max_step_tokens=16)
    bench.engine.submit(make_request("a", 40, n=n, max_tokens=5), received_s=bench.now_s - 3)
    first, second = stages_of(bench)
    # Three chunks: the third step ends two seconds after the first began, at which the token is there.
    assert first == ("a", n, StageTimes(queue_s=3.0, compute_s=2.0, made_s=102.0))
    assert second[1:] == (n, StageTimes(compute_s=1.0, made_s=103.0))


def test_one_that_waits_for_its_turn_says_how_long() -> None:
    bench = EngineBench(max_running=1)
    bench.engine.submit(make_request("first", 5, max_tokens=4))
    bench.engine.submit(make_request("second", 5, max_tokens=1))
    told = {(name, stages.queue_s) for name, _, stages in stages_of(bench)}
    assert ("second", 4.0) in told


def test_decode_tells_of_the_first_token_that_it_makes() -> None:
    bench = EngineBench()
    request = make_request("a", 20, max_tokens=4)
    blocks = bench.engine.pool.allocate(2)
    content = [*kv_of(request.token_ids), *[None] * 12]
    for place, block in enumerate(blocks):
        bench.runner.kv[block] = content[16 * place : 16 * place + 16]
    bench.engine.adopt(request, blocks, (FirstToken(0, 5),), RequestFacts(ready_s=0.25))
    ((_, _, stages),) = stages_of(bench)
    assert stages == StageTimes(queue_s=0.0, compute_s=0.0, ready_s=0.25, made_s=100.0)


def test_a_hand_off_measures_its_commit_on_its_own_clock() -> None:
    hand_off = HandOff(1, "a", "l", 1, 20)
    hand_off.commit(107.0)
    outcome = hand_off.outcome("", 109.5, 16)
    assert (outcome.committed_s, outcome.closed_s) == (107.0, 109.5)
    active = ActiveRequest(make_request("a", 20), 100.0, 1)
    active.token_made(106.0)
    active.add_outcome(outcome)
    assert (active.facts.commit_wait_s, active.facts.commit_ack_s) == (1.0, 2.5)
    never = HandOffOutcome("a", "lost", 0.0, 0, 0, 0, 0)
    active.add_outcome(never)
    assert (active.facts.commit_wait_s, active.facts.commit_ack_s) == (0.0, 0.0)


def test_a_reservation_measures_from_the_commit_to_its_kv() -> None:
    entry = WaitingRequest(make_request("a", 20), 1.0, 2, 100.0)
    reservation = Reservation("l", entry, 100.0)
    assert reservation.facts(101.0, 16).ready_s == 0.0
    reservation.commit_heard(103.0)
    assert reservation.facts(103.5, 16).ready_s == 0.5


def news(stages: StageTimes | None = None, offset: int = 0) -> RequestUpdate:
    delta = ChoiceDelta(choice=0, offset=offset, tokens=(TokenOut(7),))
    return RequestUpdate(request_id="r", deltas=(delta,), stages=stages)


def test_a_submission_is_acknowledged_once_and_stages_travel_with_their_token() -> None:
    ledger = Ledger()
    ledger.connect("router", {})
    ledger.accept("router", "r", 5.0, has_receipt=True)
    ledger.accept("router", "reserved", 5.0)
    assert ledger.received_s("router", "reserved") == 5.0
    assert ledger.has_news("router")
    assert ledger.take_receipts("router") == [("r", 5.0)]
    assert ledger.take_receipts("router") == []
    assert not ledger.has_news("router")
    stages = StageTimes(queue_s=1.0, made_s=6.0)
    ledger.apply([news(stages)])
    (update,) = ledger.take("router", 0.0)
    assert update.stages == stages
    ledger.apply([news(offset=1)])
    (update,) = ledger.take("router", 0.0)
    assert update.stages is None


def test_after_a_reconnect_nothing_is_said_of_how_a_token_travelled() -> None:
    ledger = Ledger()
    ledger.connect("router", {})
    ledger.accept("router", "r", 5.0, has_receipt=True)
    ledger.apply([news(StageTimes(made_s=6.0))])
    ledger.take("router", 0.0)
    ledger.connect("router", {"r": [0]})
    assert ledger.take_receipts("router") == []
    (update,) = ledger.take("router", 0.0)
    assert update.deltas
    assert update.stages is None


def test_stages_and_receipts_cross_the_wire() -> None:
    stages = StageTimes(queue_s=1.0, compute_s=2.0, ready_s=0.5, made_s=10.0)
    came = update_from_proto(update_to_proto(news(stages), HOME, 10.25), "w", 3.0, Reading(4.0, 0.5))
    assert came.stages is not None
    assert (came.stages.queue_s, came.stages.compute_s, came.stages.ready_s) == (1.0, 2.0, 0.5)
    assert came.stages.leaving_s == 0.25
    assert (came.sent_s, came.read_s, came.unseen_s, came.held_s) == (3.0, 4.0, 0.5, None)
    assert update_from_proto(receipt_to_proto("r", 0.0), "w").held_s == 0.0


def test_a_deadline_counts_from_the_arrival_at_the_host() -> None:
    bench = EngineBench()
    request: Request = replace(make_request("late", 5, max_tokens=50), deadline_s=3.0)
    bench.engine.submit(request, received_s=bench.now_s - 2)
    bench.run()
    assert len(bench.heard["late"].tokens[0]) == 1
