"""The ledger delivers every token of every choice once and in order, whatever the streams do."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from twostroke_engine.messages import ChoiceDelta, LeaseGrant, RequestEnd, RequestUpdate
from twostroke_engine.request import ErrorCode, FinishReason, RequestFacts, TokenOut
from twostroke_worker.ledger import Ledger, ended

GRACE_S = 10.0


def token(choice: int, offset: int) -> TokenOut:
    return TokenOut(choice * 1000 + offset)


def update(request_id: str, choice: int, offset: int, count: int, finish: FinishReason | None = None) -> RequestUpdate:
    tokens = tuple(token(choice, offset + i) for i in range(count))
    delta = ChoiceDelta(choice=choice, offset=offset, tokens=tokens, finish=finish)
    return RequestUpdate(request_id=request_id, deltas=(delta,))


def end_of(request_id: str) -> RequestUpdate:
    return RequestUpdate(request_id=request_id, end=RequestEnd(facts=RequestFacts()))


class RouterModel:
    """What a real router keeps: the tokens received, next offsets, ends."""

    def __init__(self) -> None:
        self.tokens: dict[str, dict[int, list[int]]] = {}
        self.finished: set[tuple[str, int]] = set()
        self.ended: set[str] = set()

    def receive(self, updates: list[RequestUpdate]) -> None:
        for news in updates:
            assert news.request_id not in self.ended, "something follows the end"
            choices = self.tokens[news.request_id]
            for delta in news.deltas:
                tokens = choices.setdefault(delta.choice, [])
                assert delta.offset == len(tokens), "not the next offset"
                tokens += [out.id for out in delta.tokens]
                if delta.finish:
                    self.finished.add((news.request_id, delta.choice))
            if news.end:
                self.ended.add(news.request_id)

    def resumes(self) -> dict[str, list[int]]:
        live = {key: choices for key, choices in self.tokens.items() if key not in self.ended}
        return {key: [len(choices.get(i, ())) for i in range(2)] for key, choices in live.items()}


class LedgerMachine(RuleBasedStateMachine):
    """Two routers, an engine, and a network that loses what was taken but not received."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(grace_s=GRACE_S, max_take_units=5)
        self.now_s = 0.0
        self.routers = {"a": RouterModel(), "b": RouterModel()}
        self.streams: dict[str, int] = {}
        self.owner: dict[str, str] = {}
        self.made: dict[str, list[int]] = {}
        self.over: set[str] = set()

    @rule(router_id=st.sampled_from("ab"))
    def connect(self, router_id: str) -> None:
        self.streams[router_id], orphans = self.ledger.connect(router_id, self.routers[router_id].resumes())
        assert not orphans, "every live request was named"

    @rule(router_id=st.sampled_from("ab"))
    def disconnect(self, router_id: str) -> None:
        if router_id in self.streams:
            self.ledger.disconnect(router_id, self.streams.pop(router_id), self.now_s)

    @rule(target=requests, router_id=st.sampled_from("ab"))
    def submit(self, router_id: str) -> str:
        request_id = f"r{len(self.owner)}"
        self.owner[request_id] = router_id
        if router_id not in self.streams:
            self.connect(router_id)
        assert not self.ledger.knows(router_id, request_id)
        self.ledger.accept(router_id, request_id)
        assert self.ledger.knows(router_id, request_id), "said again, it is a duplicate"
        self.made[request_id] = [0, 0]
        self.routers[router_id].tokens[request_id] = {}
        return request_id

    @rule(request_id=requests, choice=st.integers(0, 1), count=st.integers(0, 7))
    def step(self, request_id: str, choice: int, count: int) -> None:
        if request_id not in self.over:
            news = update(request_id, choice, self.made[request_id][choice], count)
            assert self.ledger.apply([news]) == []
            self.made[request_id][choice] += count

    @rule(request_id=consumes(requests))
    def end(self, request_id: str) -> None:
        self.over.add(request_id)
        offsets = self.made[request_id]
        last = [update(request_id, i, offset, 0, FinishReason.STOP) for i, offset in enumerate(offsets)]
        self.ledger.apply([*last, end_of(request_id)])

    @rule(router_id=st.sampled_from("ab"), is_lost=st.booleans())
    def take(self, router_id: str, is_lost: bool) -> None:
        if router_id not in self.streams:
            return
        updates = self.ledger.take(router_id, self.now_s)
        if is_lost:  # the stream broke before the message arrived
            self.disconnect(router_id)
        else:
            self.routers[router_id].receive(updates)

    @rule(seconds=st.floats(0, GRACE_S / 8))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        # No router stays away for long enough here, and an end is kept for a grace time after it was sent.
        for router_id in "ab":
            if router_id not in self.streams:
                self.connect(router_id)
        assert self.ledger.expire(self.now_s) == []

    @invariant()
    def received_is_a_prefix_of_made(self) -> None:
        for router in self.routers.values():
            for request_id, choices in router.tokens.items():
                for choice, tokens in choices.items():
                    assert tokens == [token(choice, i).id for i in range(len(tokens))]
                    assert len(tokens) <= self.made[request_id][choice]

    def teardown(self) -> None:
        for router_id, router in self.routers.items():
            self.connect(router_id)
            while self.ledger.has_news(router_id):
                router.receive(self.ledger.take(router_id, self.now_s))
        for request_id, router_id in self.owner.items():
            router = self.routers[router_id]
            counts = [len(router.tokens[request_id].get(choice, ())) for choice in range(2)]
            assert counts == self.made[request_id]
            assert (request_id in router.ended) == (request_id in self.over)
            if request_id in self.over:
                assert {(request_id, 0), (request_id, 1)} <= router.finished


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger(grace_s=GRACE_S)
    ledger.connect("a", {})
    return ledger


def test_slow_router_is_sent_one_update_of_many_steps(ledger: Ledger) -> None:
    ledger.accept("a", "r")
    for offset in range(100):
        ledger.apply([update("r", 0, offset, 1)])
    (news,) = ledger.take("a", 0.0)
    assert [delta.offset for delta in news.deltas] == [0]
    assert len(news.deltas[0].tokens) == 100
    assert not ledger.has_news("a")


def test_decode_starts_after_the_token_from_prefill(ledger: Ledger) -> None:
    ledger.accept("a", "r")
    ledger.connect("a", {"r": [1]})  # the token from prefill arrived; decode has said nothing yet
    ledger.apply([update("r", 0, 1, 2)])
    (news,) = ledger.take("a", 0.0)
    assert (news.deltas[0].offset, len(news.deltas[0].tokens)) == (1, 2)
    ledger.connect("a", {"r": [0]})  # asks for more than this worker ever made
    (news,) = ledger.take("a", 0.0)
    assert (news.deltas[0].offset, len(news.deltas[0].tokens)) == (1, 2)


def test_tokens_that_the_router_has_from_an_earlier_attempt_are_not_sent(ledger: Ledger) -> None:
    ledger.accept("a", "r")
    ledger.connect("a", {"r": [2]})
    ledger.apply([update("r", 0, 0, 1)])
    assert not ledger.has_news("a")
    ledger.apply([update("r", 0, 1, 2)])
    (news,) = ledger.take("a", 0.0)
    assert (news.deltas[0].offset, len(news.deltas[0].tokens)) == (2, 1)


def test_grant_is_sent_again_after_a_reconnect(ledger: Ledger) -> None:
    grant = LeaseGrant(lease_id="l", epoch=1, ttl_s=5.0)
    ledger.accept("a", "r")
    ledger.apply([RequestUpdate(request_id="r", reserved=grant)])
    assert ledger.take("a", 0.0)[0].reserved == grant
    assert ledger.take("a", 0.0) == []
    ledger.connect("a", {"r": []})
    assert ledger.take("a", 0.0)[0].reserved == grant


def test_resuming_an_unknown_request_ends_it(ledger: Ledger) -> None:
    ledger.connect("a", {"gone": [3]})
    (news,) = ledger.take("a", 0.0)
    assert news.end is not None
    assert news.end.error == ErrorCode.INTERNAL
    assert "unknown request" in news.end.message


def test_requests_not_named_in_a_resume_are_cancelled(ledger: Ledger) -> None:
    ledger.accept("a", "kept")
    ledger.accept("a", "given-up")
    assert ledger.connect("a", {"kept": [0]})[1] == ["given-up"]
    assert ledger.live == ["kept"]


def test_requests_of_a_router_that_stays_away_are_cancelled_once(ledger: Ledger) -> None:
    ledger.accept("a", "r")
    ledger.disconnect("a", 1, 100.0)
    assert ledger.expire(100.0 + GRACE_S - 0.1) == []
    assert ledger.expire(100.0 + GRACE_S + 0.1) == ["r"]
    assert ledger.live == []
    assert ledger.expire(200.0) == []
    ledger.apply([end_of("r")])  # the engine's answer to the cancel concerns no one


def test_a_router_that_came_back_in_time_keeps_its_requests(ledger: Ledger) -> None:
    ledger.accept("a", "r")
    ledger.disconnect("a", 1, 100.0)
    ledger.connect("a", {"r": [0]})
    assert ledger.expire(100.0 + GRACE_S * 2) == []
    assert ledger.live == ["r"]


def test_late_end_of_a_superseded_stream_changes_nothing(ledger: Ledger) -> None:
    ledger.accept("a", "r")
    ledger.connect("a", {"r": [0]})
    ledger.disconnect("a", 1, 0.0)
    assert ledger.expire(GRACE_S * 2) == []
    assert ledger.live == ["r"]


def test_an_end_is_kept_for_a_grace_time_after_it_was_sent(ledger: Ledger) -> None:
    ledger.accept("a", "r")
    ledger.apply([update("r", 0, 0, 1, FinishReason.LENGTH), end_of("r")])
    ledger.expire(1000.0)  # not sent yet: kept however long it takes
    assert ledger.take("a", 1000.0)[0].end is not None
    ledger.expire(1000.0 + GRACE_S - 1)
    ledger.connect("a", {"r": [0]})
    (news,) = ledger.take("a", 1010.0)
    assert (len(news.deltas[0].tokens), news.deltas[0].finish) == (1, FinishReason.LENGTH)
    assert news.end is not None
    assert news.end.error is None
    ledger.expire(1010.0 + GRACE_S + 1)
    ledger.connect("a", {"r": [1]})
    assert ledger.take("a", 1030.0)[0].end.error == ErrorCode.INTERNAL  # type: ignore[union-attr]


def test_the_same_id_may_be_tried_again_after_its_end(ledger: Ledger) -> None:
    ledger.refuse("a", "r", ended(ErrorCode.DRAINING, "the worker is draining"))
    assert ledger.knows("a", "r")
    ledger.take("a", 0.0)
    assert not ledger.knows("a", "r")
    ledger.accept("a", "r")
    ledger.apply([update("r", 0, 0, 1)])
    assert ledger.take("a", 0.0)[0].deltas[0].offset == 0


def test_a_gap_in_tokens_ends_the_request_and_is_told(ledger: Ledger) -> None:
    ledger.accept("a", "r")
    ledger.apply([update("r", 0, 0, 1)])
    assert ledger.apply([update("r", 0, 2, 1)]) == ["r"]
    (news,) = ledger.take("a", 0.0)
    assert len(news.deltas[0].tokens) == 1
    assert news.end is not None
    assert news.end.error == ErrorCode.INTERNAL


def test_an_overlap_is_not_sent_twice(ledger: Ledger) -> None:
    ledger.accept("a", "r")
    ledger.apply([update("r", 0, 0, 3), update("r", 0, 1, 4)])
    (news,) = ledger.take("a", 0.0)
    assert [out.id for out in news.deltas[0].tokens] == [0, 1, 2, 3, 4]


def test_one_take_is_bounded_and_the_end_comes_last() -> None:
    ledger = Ledger(max_take_units=10)
    ledger.connect("a", {})
    ledger.accept("a", "r")
    ledger.apply([update("r", 0, 0, 25), end_of("r")])
    sizes = []
    while ledger.has_news("a"):
        (news,) = ledger.take("a", 0.0)
        sizes.append(len(news.deltas[0].tokens))
        assert (news.end is not None) == (sum(sizes) == 25)
    assert sizes == [10, 10, 5]
