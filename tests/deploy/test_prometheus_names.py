"""How tests take PromQL apart."""

from __future__ import annotations

from tests.support.dashboards import Selector, family, metric_names, selectors


def test_metric_names_are_those_of_series_alone() -> None:
    expr = (
        'sum by (twostroke_label) (rate(twostroke_a_total{twostroke_x="twostroke_y"}[5m])) / on (job) twostroke:b:sum'
    )
    assert metric_names(expr) == {"twostroke_a_total", "twostroke:b:sum"}


def test_a_series_belongs_to_its_metric() -> None:
    assert family("twostroke_ttft_seconds_bucket") == "twostroke_ttft_seconds"
    assert family("twostroke_requests_total") == "twostroke_requests"
    assert family("twostroke_workers") == "twostroke_workers"


def test_selectors_match_as_promql_does() -> None:
    expr = 'rate(twostroke_a_bucket{le="1",role="prefill",state=~"free|cached",kind!~"x.*"}[1m]) + twostroke_a'
    found = {selector.metric: selector for selector in selectors(expr)}
    a = found["twostroke_a_bucket"]
    assert a.takes({"role": "prefill", "state": "free"})
    assert not a.takes({"role": "decode", "state": "free"})
    assert not a.takes({"role": "prefill", "state": "freed"})
    assert not a.takes({"role": "prefill", "state": "free", "kind": "xy"})
    assert found["twostroke_a"] == Selector("twostroke_a", ())
