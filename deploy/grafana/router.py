"""Routers: what comes in, what is refused, what they add to a request's time."""

from __future__ import annotations

from deploy.grafana.cluster import NAMESPACE, UP
from deploy.grafana.panels import Dashboard, Query, Row, timeseries
from deploy.grafana.queries import is_, quantile, quantiles, rate, ratio, router, stage_quantiles, total

_REQUESTS = "twostroke_requests_total"


def _request_rate(*labels: str) -> Query:
    return Query(total(rate(router(_REQUESTS)), *labels), " ".join(f"{{{{{label}}}}}" for label in labels))


_DOOR = Row(
    "At the door",
    (
        timeseries(
            "Requests by endpoint", "Requests ended, by the API they came in by.", "reqps", _request_rate("endpoint")
        ),
        timeseries("Requests by end", "Requests ended, by how.", "reqps", _request_rate("outcome"), is_stacked=True),
        timeseries(
            "Requests by router",
            "Requests ended, by router: uneven means that clients keep to one connection.",
            "reqps",
            _request_rate("instance"),
        ),
        timeseries(
            "Places in use",
            "Running requests of each router as a share of what it takes (--max-live). At 1 the next one is refused "
            "with 429.",
            "percentunit",
            Query(
                f"{router('twostroke_requests_active')} / {router('twostroke_requests_limit')}",
                "{{instance}}",
            ),
            steps=((0.8, "orange"), (0.95, "red")),
            max_value=1,
        ),
        timeseries(
            "Refused for lack of room",
            "Requests answered with 429, as a share of all.",
            "percentunit",
            Query(
                ratio(total(rate(router(_REQUESTS, is_("outcome", "overloaded")))), total(rate(router(_REQUESTS)))),
                "429",
            ),
            steps=((0.01, "orange"), (0.05, "red")),
        ),
        timeseries(
            "Placed again",
            "Requests that a worker failed and that were placed once more, by the kind of failure. Clients do not see "
            "these, but for the time they take.",
            "reqps",
            Query(total(rate(router("twostroke_retries_total")), "fault"), "{{fault}}"),
        ),
    ),
)

_STAGES = Row(
    "Stages before the prompt is computed",
    (
        timeseries(
            "Admission", "From arrival to a place among the running.", "s", *stage_quantiles("ttft", "admission")
        ),
        timeseries(
            "Placement",
            "Choosing the workers, waiting for one to be there included.",
            "s",
            *stage_quantiles("ttft", "placement"),
        ),
        timeseries(
            "Reservation",
            "Waiting for the decode worker to promise room.",
            "s",
            *stage_quantiles("ttft", "reserve"),
        ),
        timeseries(
            "Not attributed",
            "p99 of the time that no stage measured, in both waterfalls: networks and event loops.",
            "s",
            *(
                Query(
                    quantile(
                        0.99, "twostroke_stage_seconds", is_("waterfall", waterfall), is_("stage", "unattributed")
                    ),
                    waterfall,
                )
                for waterfall in ("ttft", "second_token")
            ),
        ),
        timeseries(
            "Request duration (GenAI)",
            "OpenTelemetry's gen_ai.server.request.duration: p99 by operation, as tools that know the conventions show "
            "it.",
            "s",
            Query(
                "histogram_quantile(0.99, "
                + total(rate(router("gen_ai_server_request_duration_seconds_bucket")), "le", "gen_ai_operation_name")
                + ")",
                "{{gen_ai_operation_name}}",
            ),
        ),
        timeseries("Time to first token", "Arrival to the first token.", "s", *quantiles("twostroke_ttft_seconds")),
    ),
)

_SURROUNDINGS = Row(
    "What routers depend on",
    (
        timeseries(
            "etcd and Redis",
            "1 while a router gets answers, by router.",
            "none",
            Query(router("twostroke_dependency_up"), "{{dependency}} {{instance}}"),
            max_value=1,
            names=UP,
        ),
        timeseries(
            "Ready decode workers by router",
            "Every router should see the same: one that sees fewer cannot reach some workers.",
            "none",
            Query(router("twostroke_workers", is_("role", "decode"), is_("state", "ready")), "{{instance}}"),
        ),
        timeseries(
            "Telemetry given up",
            "Spans, metric exports and explanations that were dropped, because a receiver was away or slow. Requests "
            "never wait for them.",
            "cps",
            Query(total(rate(router("twostroke_telemetry_dropped_total")), "signal"), "{{signal}}"),
        ),
    ),
)

ROUTER = Dashboard(
    "twostroke-router",
    "Twostroke / Router",
    "What comes in, what is refused, and what a router adds to a request's time.",
    (_DOOR, _STAGES, _SURROUNDINGS),
    (NAMESPACE,),
)
