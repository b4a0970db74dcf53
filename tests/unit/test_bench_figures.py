"""What `twostroke bench` makes of outcomes: figures, goodput, warnings, comparisons, waterfalls."""

from __future__ import annotations

import random
from typing import Any

import pytest
from twostroke_cli.bench.comparison import Comparison, Ratio, compare
from twostroke_cli.bench.figures import meets, parse_slo, spread, summarize
from twostroke_cli.bench.outcome import Outcome, Run
from twostroke_cli.bench.waterfall import Stage, Waterfall, mean_waterfalls
from twostroke_cli.errors import CommandError


def outcome(number: int = 0, **changes: Any) -> Outcome:
    plain: dict[str, Any] = {
        "due_at_s": 0.0,
        "sent_at_s": 0.0,
        "end_at_s": 1.0,
        "status": 200,
        "ttft_s": 0.2,
        "e2e_s": 1.0,
        "gaps_s": [0.1, 0.3, 0.4],
        "num_pieces": 4,
        "prompt_tokens": 10,
        "completion_tokens": 5,
    }
    return Outcome(number, **{**plain, **changes})


def failed(number: int = 0, error: str = "refused") -> Outcome:
    return Outcome(number, 0.0, 0.0, 0.01, status=429, error=error, message="no room")


def run_of(*outcomes: Outcome, duration_s: float = 2.0, round_number: int = 0, target: str = "a") -> Run:
    return Run(target, round_number, 0.0, duration_s, list(outcomes))


# ---- one target ------------------------------------------------------------------------------------------------------


def test_figures_follow_from_outcomes() -> None:
    found = summarize("a", [run_of(outcome(0), outcome(1, ttft_s=0.4, cached_tokens=8), failed(2))], {})
    assert (found.requests, found.answered, found.errors) == (3, 2, {"refused": 1})
    assert (found.request_rate, found.output_rate, found.input_rate) == (1.0, 5.0, 10.0)
    assert (found.completion_tokens, found.cached_tokens, found.token_source) == (10, 8, "usage")
    assert found.ttft_s is not None
    assert found.itl_s is not None
    assert found.tpot_s is not None
    assert (found.ttft_s.p50, found.ttft_s.most, found.ttft_s.count) == (0.3, 0.4, 2)
    assert (found.itl_s.p50, found.itl_s.count) == (0.3, 6)
    # (E2E - TTFT) / (tokens - 1), by usage and not by pieces.
    assert found.tpot_s.most == pytest.approx(0.2)
    assert outcome(due_at_s=3.0).piece_times_s == pytest.approx([3.2, 3.3, 3.6, 4.0])


def test_rounds_add_up() -> None:
    found = summarize("a", [run_of(outcome()), run_of(outcome(), duration_s=3.0, round_number=1)], {})
    assert (found.rounds, found.duration_s, found.output_rate) == (2, 5.0, 2.0)


def test_percentiles_of_many() -> None:
    found = spread(number / 100 for number in range(101))
    assert found is not None
    assert (found.p50, found.p90, found.p99, found.most) == pytest.approx((0.5, 0.9, 0.99, 1.0))
    assert spread([]) is None
    assert spread([None, None]) is None


def test_tokens_are_pieces_where_there_is_no_usage() -> None:
    found = summarize("a", [run_of(outcome(completion_tokens=None))], {})
    assert (found.completion_tokens, found.token_source) == (4, "pieces")
    assert any("no usage" in warning for warning in found.warnings)
    assert summarize("a", [run_of(outcome(), outcome(1, completion_tokens=None))], {}).token_source == "both"


def test_a_run_without_an_answer_has_figures_too() -> None:
    found = summarize("a", [run_of(failed(), failed(1, "timeout"))], {"ttft": 1.0})
    assert (found.answered, found.ttft_s, found.output_rate) == (0, None, 0.0)
    assert found.errors == {"refused": 1, "timeout": 1}
    assert found.goodput is not None
    assert (found.goodput.met, found.goodput.rate) == (0, 0.0)


def test_the_client_s_own_delay_is_told() -> None:
    late = [outcome(number, sent_at_s=0.05 if number > 97 else 0.0) for number in range(100)]
    assert any("client itself was late" in warning for warning in summarize("a", [run_of(*late)], {}).warnings)
    in_time = [outcome(number, sent_at_s=0.002) for number in range(100)]
    assert summarize("a", [run_of(*in_time)], {}).warnings == []


def test_many_tokens_in_one_piece_are_told() -> None:
    packed = [outcome(number, completion_tokens=40) for number in range(100)]
    assert any("10.0 tokens came in one piece" in warning for warning in summarize("a", [run_of(*packed)], {}).warnings)


# ---- goodput ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slo", "is_met"),
    [
        ({"ttft": 0.2}, True),
        ({"ttft": 0.19}, False),
        ({"itl": 0.4}, True),
        ({"itl": 0.35}, False),
        ({"tpot": 0.21}, True),
        ({"tpot": 0.19}, False),
        ({"e2e": 1.0}, True),
        ({"ttft": 0.5, "e2e": 0.9}, False),
    ],
)
def test_every_objective_counts(slo: dict[str, float], is_met: bool) -> None:
    assert meets(outcome(), slo) is is_met


def test_refused_and_failed_requests_are_misses() -> None:
    found = summarize("a", [run_of(outcome(), failed(1), failed(2, "broken off"), outcome(3, ttft_s=9.0))], {"ttft": 1})
    assert found.goodput is not None
    assert (found.goodput.met, found.goodput.share, found.goodput.rate) == (1, 0.25, 0.5)


def test_what_was_not_measured_is_not_met() -> None:
    whole = outcome(ttft_s=None, gaps_s=[])
    assert not meets(whole, {"ttft": 10.0})
    assert meets(whole, {"e2e": 1.0})
    assert meets(outcome(completion_tokens=1, gaps_s=[]), {"itl": 0.1, "tpot": 0.1}), "one token has no gap"


def test_objectives_are_read_and_checked() -> None:
    assert parse_slo("ttft=0.5,itl=0.05,") == {"ttft": 0.5, "itl": 0.05}
    assert parse_slo("") == {}
    for wrong in ("ttft", "ttft=", "ttft=-1", "speed=1", "ttft=inf", "ttft=x"):
        with pytest.raises(CommandError, match="--slo"):
            parse_slo(wrong)


# ---- side by side ----------------------------------------------------------------------------------------------------


def runs(target: str, factor: float, seed: int, rounds: int = 3, requests: int = 60) -> list[Run]:
    """Latencies of one distribution, `factor` times as long; both targets are asked the same."""
    source, found = random.Random(seed), []
    for number in range(rounds):
        outcomes = []
        for request in range(requests):
            size, noise = 1 + request % 7, source.uniform(0.9, 1.1)
            gaps = [factor * 0.01 * source.uniform(0.8, 1.2) for _ in range(9)]
            ttft_s = factor * 0.1 * size * noise
            e2e_s = ttft_s + sum(gaps)
            outcomes.append(
                outcome(request, ttft_s=ttft_s, gaps_s=gaps, e2e_s=e2e_s, completion_tokens=10, num_pieces=10)
            )
        found.append(run_of(*outcomes, duration_s=10 * factor * source.uniform(0.98, 1.02), round_number=number))
        found[-1].target = target
    return found


def by_name(comparison: Comparison) -> dict[str, Ratio]:
    return {ratio.figure: ratio for ratio in comparison.ratios}


def test_a_slower_target_is_found_out() -> None:
    comparison = compare(runs("a", 1.0, 1), runs("b", 1.5, 2), {"ttft": 0.4})
    assert (comparison.base, comparison.target, comparison.rounds) == ("a", "b", 3)
    ratios = by_name(comparison)
    assert set(ratios) == {
        *(f"{name} p{rank}" for name in ("TTFT", "ITL", "TPOT", "E2E") for rank in (50, 99)),
        "output tokens/s",
        "requests/s",
        "goodput",
    }
    for name in ("TTFT p50", "ITL p50", "ITL p99", "E2E p50"):
        assert ratios[name].ratio == pytest.approx(1.5, rel=0.1), name
        assert ratios[name].low <= ratios[name].ratio <= ratios[name].high
        assert ratios[name].verdict == "worse", name
    assert ratios["output tokens/s"].ratio == pytest.approx(1 / 1.5, rel=0.05)
    assert ratios["output tokens/s"].verdict == "worse"
    assert ratios["goodput"].verdict == "worse"
    assert "goodput" not in by_name(compare(runs("a", 1.0, 1), runs("b", 50.0, 2), {"ttft": 0.4})), "none to compare"
    assert by_name(compare(runs("a", 1.0, 1), runs("b", 0.5, 2), {}))["TTFT p50"].verdict == "better"


def test_a_comparison_s_figures_are_those_of_the_summaries() -> None:
    base, other = runs("a", 1.0, 1), runs("b", 1.5, 2)
    ratios = by_name(compare(base, other, {"ttft": 0.4}))
    for target, each, attribute in (("a", base, "base"), ("b", other, "value")):
        found = summarize(target, each, {"ttft": 0.4})
        assert found.goodput is not None
        spreads = {"TTFT": found.ttft_s, "ITL": found.itl_s, "TPOT": found.tpot_s, "E2E": found.e2e_s}
        for name, each_spread in spreads.items():
            assert each_spread is not None
            assert getattr(ratios[f"{name} p50"], attribute) == pytest.approx(each_spread.p50, abs=2e-6)
            assert getattr(ratios[f"{name} p99"], attribute) == pytest.approx(each_spread.p99, abs=2e-6)
        assert getattr(ratios["goodput"], attribute) == pytest.approx(found.goodput.rate, abs=1e-4)
        assert getattr(ratios["output tokens/s"], attribute) == pytest.approx(found.output_rate, abs=0.01)


def test_equal_targets_show_no_difference() -> None:
    ratios = by_name(compare(runs("a", 1.0, 1), runs("b", 1.0, 2), {}))
    assert {name: ratio.verdict for name, ratio in ratios.items() if name in ("TTFT p50", "ITL p50")} == {
        "TTFT p50": "unclear",
        "ITL p50": "unclear",
    }


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(12):
        ratio = by_name(compare(runs("a", 1.0, 2 * seed, 1, 20), runs("b", 1.0, 2 * seed + 1, 1, 20), {}))["ITL p50"]
        held += ratio.low <= 1 <= ratio.high
    assert held >= 9


def test_a_comparison_is_the_same_each_time_and_bears_failures() -> None:
    base, other = runs("a", 1.0, 1, 1), runs("b", 1.0, 2, 1)
    other[0].outcomes[5] = failed(5)
    assert compare(base, other, {}) == compare(base, other, {})
    assert by_name(compare(base, other, {}))["requests/s"].value == pytest.approx(59 / other[0].duration_s, rel=1e-3)
    nothing = [run_of(*(failed(number) for number in range(60)), target="b")]
    assert "TTFT p50" not in by_name(compare(base, nothing, {}))


# ---- waterfalls ------------------------------------------------------------------------------------------------------


def explanation(request_id: str, prefill_s: float, has_second: bool = True) -> dict[str, Any]:
    stages = [{"stage": "admission", "seconds": 0.1}, {"stage": "prefill_compute", "seconds": prefill_s}]
    second = {"total_s": 0.5, "stages": [{"stage": "transfer", "seconds": 0.5}]}
    waterfalls = {
        "ttft": {"total_s": 0.1 + prefill_s, "stages": stages},
        "second_token": second if has_second else None,
    }
    return {"request_id": request_id, "waterfalls": waterfalls}


def test_waterfalls_are_means_over_those_that_have_them() -> None:
    explanations = [explanation("x-0", 0.2), explanation("x-1", 0.4, has_second=False)]
    assert mean_waterfalls(explanations) == [
        Waterfall("ttft", 2, 0.4, [Stage("admission", 0.1), Stage("prefill_compute", 0.3)]),
        Waterfall("second_token", 1, 0.5, [Stage("transfer", 0.5)]),
    ]
    assert mean_waterfalls([]) == []
    assert mean_waterfalls([{"request_id": "z", "waterfalls": None}]) == []
