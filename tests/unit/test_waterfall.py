"""Stages add up to the total, whatever was measured; what does not exist is absent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from twostroke_chassis.request_metrics import STAGES
from twostroke_chassis.telemetry import RouterMetrics, metrics_text
from twostroke_engine.request import RequestFacts
from twostroke_router import timing as timing_module
from twostroke_router.arrival import Arrival
from twostroke_router.events import Destination, Stages, Update
from twostroke_router.timing import Timing
from twostroke_router.waterfall import (
    SecondParts,
    TtftParts,
    Waterfall,
    second_token_waterfall,
    ttft_waterfall,
)

seconds = st.floats(0, 10, allow_subnormal=False)
maybe = st.none() | seconds


def by_stage(waterfall: Waterfall | None) -> dict[str, float]:
    assert waterfall is not None
    return {each.stage: each.seconds for each in waterfall.stages}


ttft_parts = st.builds(TtftParts, seconds, seconds, maybe, seconds, seconds, maybe, maybe, seconds, seconds, seconds)
second_parts = st.builds(SecondParts, maybe, seconds, maybe, maybe, seconds, seconds, seconds)


@given(seconds, ttft_parts)
def test_stages_of_a_first_token_add_up(total_s: float, parts: TtftParts) -> None:
    waterfall = ttft_waterfall(total_s, parts)
    assert sum(each.seconds for each in waterfall.stages) == pytest.approx(total_s, abs=1e-9)
    assert all(each.seconds >= 0 for each in waterfall.stages)
    known = [name for name in STAGES["ttft"] if name in by_stage(waterfall)]
    assert [each.stage for each in waterfall.stages] == known, "in order, and no other"


@given(seconds, second_parts)
def test_stages_of_a_second_token_add_up(total_s: float, parts: SecondParts) -> None:
    waterfall = second_token_waterfall(total_s, parts)
    assert sum(each.seconds for each in waterfall.stages) == pytest.approx(total_s, abs=1e-9)
    known = [name for name in STAGES["second_token"] if name in by_stage(waterfall)]
    assert [each.stage for each in waterfall.stages] == known


def test_what_a_round_trip_explains_is_shared_by_both_ways_and_never_more_than_is_left() -> None:
    parts = TtftParts(0.01, 0.01, None, 0.0, link_s=0.004, queue_s=0.02, compute_s=0.05, leaving_s=0.001)
    stages = by_stage(ttft_waterfall(0.1, parts))
    assert stages["prefill_queue"] == pytest.approx(0.022)
    assert stages["return"] == pytest.approx(0.003)
    assert stages["unattributed"] == pytest.approx(0.1 - 0.095)
    assert "reserve" not in stages
    slower = by_stage(ttft_waterfall(0.092, parts))
    assert slower["unattributed"] == pytest.approx(0, abs=1e-12)
    assert slower["prefill_queue"] == pytest.approx(0.0205)


def test_a_hand_off_that_went_by_while_the_first_token_travelled_is_not_shown() -> None:
    parts = SecondParts(hand_off_s=0.003, returning_s=0.002, admission_s=0.001, step_s=0.01, reading_s=0.001)
    assert by_stage(second_token_waterfall(0.02, parts)) == pytest.approx(
        {"transfer": 0.001, "decode_admission": 0.001, "first_step": 0.011, "unattributed": 0.007}
    )
    tight = by_stage(second_token_waterfall(0.0115, parts))
    assert tight == pytest.approx({"transfer": 0, "decode_admission": 0.0005, "first_step": 0.011, "unattributed": 0})


def test_a_turn_of_the_event_loop_explains_no_more_than_is_left() -> None:
    parts = TtftParts(0.01, 0.0, queue_s=0.01, compute_s=0.05, unseen_s=0.004)
    assert by_stage(ttft_waterfall(0.08, parts))["unattributed"] == pytest.approx(0.006)
    assert by_stage(ttft_waterfall(0.08, parts))["return"] == pytest.approx(0.004)
    assert by_stage(ttft_waterfall(0.072, parts))["return"] == pytest.approx(0.002)
    second = SecondParts(admission_s=0.001, step_s=0.01, slack_s=0.004)
    assert by_stage(second_token_waterfall(0.02, second)) == pytest.approx(
        {"decode_admission": 0.001, "first_step": 0.014, "unattributed": 0.005}
    )


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(timing_module, "monotonic", lambda: self.now_s)

    def at(self, seconds: float) -> None:
        self.now_s = 100.0 + seconds


def update(**more: object) -> Update:
    return Update("r", "w", **more)  # type: ignore[arg-type]


def test_a_request_that_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timing = Timing(RouterMetrics(), Arrival("", at_s=100.0))
    clock.at(0.010)
    timing.admitted()
    clock.at(0.012)
    timing.placed()
    clock.at(0.020)
    timing.granted()
    granted = Destination(worker_id="d", endpoint="", lease_id="", epoch=1, kv_fingerprint="", ttl_ms=1)
    timing.receipt(update(held_s=0.005, sent_s=100.013, read_s=100.020, reserved=granted))
    timing.receipt(update(held_s=0.001, sent_s=100.021, read_s=100.024))
    clock.at(0.101)
    first = Stages(queue_s=0.030, compute_s=0.040, ready_s=0.0, leaving_s=0.005)
    timing.tokens(0, 0, 1, update(stages=first, sent_s=100.021, read_s=100.100))
    clock.at(0.121)
    second = Stages(queue_s=0.002, compute_s=0.006, ready_s=0.003, leaving_s=0.001)
    timing.tokens(0, 1, 2, update(stages=second, sent_s=100.013, read_s=100.120))
    timing.end()
    assert by_stage(timing.ttft_waterfall()) == pytest.approx(
        {
            "admission": 0.010,
            "placement": 0.002,
            "reserve": 0.008,
            "prefill_queue": 0.001 + 0.001 + 0.030,
            "prefill_compute": 0.040,
            "return": 0.001 + 0.005 + 0.001,
            "unattributed": 0.101 - 0.099,
        }
    )
    sender = RequestFacts(commit_wait_s=0.004, commit_ack_s=0.005)
    assert by_stage(timing.second_token_waterfall(sender)) == pytest.approx(
        {"transfer": 0.008 - 0.006, "decode_admission": 0.002, "first_step": 0.008 + 0.001, "unattributed": 0.007}
    )
    assert timing.second_token_s == pytest.approx(0.020)


def test_a_try_that_failed_counts_as_placement_and_its_measurements_are_void(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timing = Timing(RouterMetrics(), Arrival("", at_s=100.0))
    timing.admitted()
    timing.placed()
    timing.granted()
    timing.receipt(update(held_s=0.0, sent_s=100.0, read_s=100.5))
    clock.at(1.0)
    timing.placed()
    clock.at(1.1)
    stages = Stages(queue_s=0.01, compute_s=0.05, ready_s=0.0, leaving_s=0.0)
    timing.tokens(0, 0, 1, update(stages=stages, sent_s=101.0, read_s=101.1))
    assert by_stage(timing.ttft_waterfall()) == pytest.approx(
        {
            "admission": 0.0,
            "placement": 1.0,
            "prefill_queue": 0.01,
            "prefill_compute": 0.05,
            "return": 0.0,
            "unattributed": 0.04,
        }
    )


def test_tokens_that_came_together_have_no_gap_to_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    timing = Timing(RouterMetrics(), Arrival("", at_s=100.0))
    timing.tokens(0, 0, 2, update())
    assert timing.second_token_s is None
    assert timing.second_token_waterfall(None) is None
    assert timing.ttft_waterfall() is None, "it was never admitted as far as this test goes"


def test_stages_are_published_in_one_histogram() -> None:
    metrics = RouterMetrics("tiny")
    metrics.stages.observe("ttft", [("prefill_queue", 0.02), ("unattributed", 0.0004)])
    families = text_string_to_metric_families(metrics_text(metrics.registry).decode())
    counts = {
        (sample.labels["waterfall"], sample.labels["stage"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name == "twostroke_stage_seconds_count"
    }
    assert set(counts) == {(waterfall, stage) for waterfall, stages in STAGES.items() for stage in stages}
    assert counts["ttft", "prefill_queue"] == 1
    assert counts["second_token", "transfer"] == 0
