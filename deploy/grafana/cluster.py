"""The dashboard to look at first: is it well, is it fast, where did the time go."""

from __future__ import annotations

from deploy.grafana.panels import Dashboard, Panel, Query, Row, Variable, stat, timeseries
from deploy.grafana.queries import hit_ratio, is_, kv_use, mean_stages, quantiles, rate, ratio, router, total

NAMESPACE = Variable("namespace", "Namespace", "label_values(twostroke_requests_active, namespace)")
FAILED = 'outcome=~"internal|unavailable|deadline|overloaded"'
COUNTED = 'outcome!~"invalid|context|cancelled"'
"""Requests whose end is ours to answer for."""
UP = ((0, "away"), (1, "up"))


def error_ratio(*labels: str) -> str:
    """Share of requests that failed or were refused for lack of room."""
    failed, counted = (
        total(rate(router("twostroke_requests_total", matcher)), *labels) for matcher in (FAILED, COUNTED)
    )
    return ratio(failed, counted)


def _workers(role: str, state: str) -> str:
    # Each router counts for itself; one that sees fewer has its own trouble, and an alert of its own.
    return f"max({router('twostroke_workers', is_('role', role), is_('state', state))})"


def _dependency(name: str) -> str:
    return f"min({router('twostroke_dependency_up', is_('dependency', name))})"


_NOW = Row(
    "Now",
    (
        stat(
            "Decode workers ready",
            "Decode workers that take work. Without one nothing can be answered.",
            "none",
            _workers("decode", "ready"),
            steps=((1, "green"),),
            lowest_good=False,
        ),
        stat(
            "Prefill workers ready",
            "Prefill workers that take work. Without one decode workers compute prompts themselves.",
            "none",
            _workers("prefill", "ready"),
            steps=((1, "green"),),
            lowest_good=False,
        ),
        stat(
            "Ready pairs",
            "Pairs of a ready prefill and a ready decode worker that can hand KV over. 0 is right where there is no "
            "prefill pool.",
            "none",
            f"max({router('twostroke_ready_pairs')})",
            steps=((1, "green"),),
            lowest_good=False,
        ),
        stat(
            "Requests running",
            "Requests that have come in and not yet ended, over all routers.",
            "none",
            total(router("twostroke_requests_active")),
        ),
        stat(
            "etcd",
            "Whether every router gets answers from etcd. Away: serving goes on, new workers are not found.",
            "none",
            _dependency("etcd"),
            steps=((1, "green"),),
            lowest_good=False,
            names=UP,
        ),
        stat(
            "Redis",
            "Whether every router gets answers from Redis. Away: serving goes on, prefixes are as last known.",
            "none",
            _dependency("redis"),
            steps=((1, "green"),),
            lowest_good=False,
            names=UP,
        ),
    ),
)

_OBJECTIVES = Row(
    "Objectives",
    (
        timeseries(
            "Error budget burn, last hour",
            "How fast the month's error budget is used: at 1 it lasts exactly the month, at 14.4 two days. From the "
            "recording rules, where the objectives are set.",
            "none",
            Query('twostroke:slo_burn:rate1h{namespace=~"$namespace"}', "{{slo}}"),
            steps=((1, "orange"), (14.4, "red")),
            width=12,
        ),
        timeseries(
            "Requests within the objective, last hour",
            "Share of requests (TTFT, errors) and of tokens (ITL) that met their objective.",
            "percentunit",
            Query('1 - twostroke:slo_error_ratio:rate1h{namespace=~"$namespace"}', "{{slo}}"),
            max_value=1,
            width=12,
        ),
    ),
)

_LATENCY = Row(
    "Latency",
    (
        timeseries(
            "Time to first token",
            "Arrival at the router to the first token, for requests that got one.",
            "s",
            *quantiles("twostroke_ttft_seconds"),
        ),
        timeseries(
            "Time between tokens",
            "Between two tokens of one choice, as the router sees them arrive.",
            "s",
            *quantiles("twostroke_itl_seconds"),
        ),
        timeseries("Whole request", "Arrival to the end, however it ended.", "s", *quantiles("twostroke_e2e_seconds")),
        timeseries(
            "Where the first token's time goes",
            "Mean seconds that each stage adds to TTFT; stacked they are the mean TTFT. `unattributed` is what no "
            "stage measured.",
            "s",
            mean_stages("ttft", "twostroke_ttft_seconds"),
            is_stacked=True,
            width=12,
            height=8,
        ),
        timeseries(
            "Where the second token's time goes",
            "Mean seconds that each stage adds between the first and the second token: the price of the hand-off.",
            "s",
            mean_stages("second_token", "twostroke_second_token_seconds"),
            is_stacked=True,
            width=12,
            height=8,
        ),
    ),
)

_TRAFFIC = Row(
    "Traffic",
    (
        timeseries(
            "Requests by end",
            "stop and length are good ends; the others are refusals, failures and clients that went away.",
            "reqps",
            Query(total(rate(router("twostroke_requests_total")), "outcome"), "{{outcome}}"),
            is_stacked=True,
        ),
        timeseries(
            "Tokens",
            "Tokens billed: prompts, the part of them that was cached, and completions.",
            "short",
            Query(total(rate(router("twostroke_tokens_total")), "kind"), "{{kind}} per second"),
        ),
        timeseries(
            "Errors",
            "Share of requests that failed or were refused for lack of room. Wrong requests and clients that went away "
            "are not counted.",
            "percentunit",
            Query(error_ratio(), "failed or refused"),
            steps=((0.005, "orange"), (0.05, "red")),
        ),
        timeseries(
            "Placements",
            "How requests were placed: over both pools, on a decode worker alone, or on a prefill worker alone (one "
            "token wanted).",
            "reqps",
            Query(total(rate(router("twostroke_placements_total")), "reason"), "{{reason}}"),
            is_stacked=True,
        ),
        timeseries(
            "Prefix cache hits",
            "Share of prompt tokens found in a prefix cache, by pool.",
            "percentunit",
            Query(hit_ratio("", "role"), "{{role}}"),
            max_value=1,
        ),
        Panel(
            "TTFT over time",
            "How many requests had which TTFT: two bands are two kinds of request, or one slow worker.",
            "s",
            (Query(total(rate(router("twostroke_ttft_seconds_bucket")), "le"), "{{le}}"),),
            kind="heatmap",
        ),
    ),
)

_WORKERS = Row(
    "Workers",
    (
        timeseries(
            "Workers by state",
            "As one router counts them: ready, connecting (the stream to it is down) or draining.",
            "none",
            Query(f"max by (role, state) ({router('twostroke_workers')})", "{{role}} {{state}}"),
        ),
        timeseries(
            "Workers that came and went",
            "Changes in the last five minutes, as one router counts them. lost: without a drain.",
            "none",
            Query(
                f"max by (role, change) (increase({router('twostroke_worker_changes_total')}[5m]))",
                "{{role}} {{change}}",
            ),
        ),
        timeseries(
            "KV in use",
            "Share of KV blocks that are referenced or promised. Cached blocks count as free: they go when they must.",
            "percentunit",
            Query(kv_use(""), "{{worker}}"),
            steps=((0.9, "orange"), (0.98, "red")),
            max_value=1,
        ),
    ),
)

CLUSTER = Dashboard(
    "twostroke-cluster",
    "Twostroke / Cluster",
    "Whether the cluster is well and fast, and where requests spend their time.",
    (_NOW, _OBJECTIVES, _LATENCY, _TRAFFIC, _WORKERS),
    (NAMESPACE, Variable("worker", "Worker", "label_values(twostroke_steps_total, worker)")),
)
