"""KV on its way from prefill to decode."""

from __future__ import annotations

from deploy.grafana.cluster import NAMESPACE
from deploy.grafana.panels import Dashboard, Query, Row, Variable, timeseries
from deploy.grafana.queries import is_, of_workers, quantiles, rate, ratio, router, stage_quantiles, total, worker


def _moved(role: str) -> str:
    return total(of_workers(rate(worker("twostroke_kv_transferred_bytes_total", role))))


_MOVES = Row(
    "Moving KV",
    (
        timeseries(
            "Sent by prefill",
            "KV payload that each prefill worker sends.",
            "Bps",
            Query(of_workers(rate(worker("twostroke_kv_transferred_bytes_total", "prefill"))), "{{worker}}"),
        ),
        timeseries(
            "Received by decode",
            "KV payload that each decode worker receives.",
            "Bps",
            Query(of_workers(rate(worker("twostroke_kv_transferred_bytes_total", "decode"))), "{{worker}}"),
        ),
        timeseries(
            "Payload per hand-off",
            "KV bytes received for each request that was placed over both pools. Prefixes that decode holds are "
            "not sent.",
            "bytes",
            Query(
                ratio(
                    _moved("decode"),
                    total(rate(router("twostroke_placements_total", is_("reason", "disaggregated")))),
                ),
                "bytes per request",
            ),
        ),
        timeseries(
            "Exposed transfer time",
            "What a request waits for its KV after its first token exists: the part that computing did not hide.",
            "s",
            *stage_quantiles("second_token", "transfer"),
            steps=((0.5, "red"),),
        ),
        timeseries(
            "Share of the second token's time",
            "How much of the time from the first to the second token is exposed transfer.",
            "percentunit",
            Query(
                ratio(
                    total(
                        rate(
                            router(
                                "twostroke_stage_seconds_sum",
                                is_("waterfall", "second_token"),
                                is_("stage", "transfer"),
                            )
                        )
                    ),
                    total(rate(router("twostroke_second_token_seconds_sum"))),
                ),
                "transfer",
            ),
            max_value=1,
        ),
        timeseries(
            "First to second token",
            "The gap that a client sees at the hand-off.",
            "s",
            *quantiles("twostroke_second_token_seconds"),
        ),
    ),
)

_TROUBLE = Row(
    "Trouble",
    (
        timeseries(
            "Segments with a wrong digest",
            "Segments whose bytes arrived changed, in the last five minutes. They are sent again, never used.",
            "none",
            Query(of_workers(f"increase({worker('twostroke_kv_digest_failures_total', '')}[5m])"), "{{worker}}"),
            steps=((1, "red"),),
        ),
        timeseries(
            "Faults noticed",
            "Faults of hand-offs in the last five minutes, by what they were. None of them reaches an answer: segments "
            "are sent again, or the prompt is computed again.",
            "none",
            Query(
                total(of_workers(f"increase({worker('twostroke_kv_faults_total', '')}[5m])", "fault"), "role", "fault"),
                "{{role}} {{fault}}",
            ),
        ),
        timeseries(
            "Quarantined blocks",
            "Blocks that were given up while a lost peer may still write to them. They come back when it is known that "
            "it cannot.",
            "none",
            Query(of_workers(worker("twostroke_kv_blocks_quarantined", "")), "{{worker}}"),
        ),
        timeseries(
            "Open leases",
            "Leases on decode and hand-offs on prefill that have not come to their end. More of them than running "
            "requests: some are lost.",
            "none",
            Query(total(of_workers(worker("twostroke_kv_leases_open", "")), "role"), "{{role}}"),
            Query(total(router("twostroke_requests_active")), "running requests"),
        ),
        timeseries(
            "Promised blocks",
            "Blocks promised for KV that has not begun to arrive, by decode worker.",
            "none",
            Query(of_workers(worker("twostroke_kv_blocks", "decode", is_("state", "promised"))), "{{worker}}"),
        ),
    ),
)

TRANSFER = Dashboard(
    "twostroke-transfer",
    "Twostroke / Transfer",
    "KV on its way from prefill to decode: how much, how fast, what requests feel of it, and what went wrong.",
    (_MOVES, _TROUBLE),
    (NAMESPACE, Variable("worker", "Worker", "label_values(twostroke_steps_total, worker)")),
)
