"""The two pools, worker by worker."""

from __future__ import annotations

from deploy.grafana.cluster import NAMESPACE
from deploy.grafana.panels import Dashboard, Panel, Query, Row, Variable, stat, timeseries
from deploy.grafana.queries import hit_ratio, is_, kv_use, of_workers, quantiles, rate, stage_quantiles, total, worker


def _by_worker(metric: str, role: str, *matchers: str) -> Query:
    return Query(of_workers(worker(metric, role, *matchers)), "{{worker}}")


def _rate_by_worker(metric: str, role: str, *matchers: str) -> Query:
    return Query(of_workers(rate(worker(metric, role, *matchers))), "{{worker}}")


def _summed(metric: str, role: str, *matchers: str) -> str:
    return total(of_workers(worker(metric, role, *matchers), "state"))


def _now(role: str, waiting: str) -> Row:
    ready = f"count({of_workers(worker('twostroke_steps_total', role))})"
    return Row(
        "Now",
        (
            stat("Workers", f"{role.capitalize()} workers that report.", "none", ready),
            stat(
                "Running",
                "Sequences in the batches of all workers.",
                "none",
                _summed("twostroke_sequences", role, is_("state", "running")),
            ),
            stat(
                "Waiting",
                waiting,
                "none",
                _summed("twostroke_sequences", role, is_("state", "waiting")),
                steps=((10, "orange"), (50, "red")),
            ),
            stat(
                "Queued tokens",
                "Prompt tokens still to compute, of all workers.",
                "short",
                total(of_workers(worker("twostroke_queued_tokens", role))),
            ),
            stat(
                "Longest wait",
                "Longest time that a request has waited on one of the workers since its process began: from arrival to "
                "first scheduled, or to the grant of a reservation.",
                "s",
                f"max({worker('twostroke_longest_wait_seconds', role)})",
            ),
            Panel(
                "KV in use",
                "Share of each worker's KV blocks that is referenced or promised.",
                "percentunit",
                (Query(kv_use(role), "{{worker}}"),),
                kind="bargauge",
                steps=((0.9, "orange"), (0.98, "red")),
                max_value=1,
                width=4,
                height=4,
            ),
        ),
    )


def _load(role: str) -> Row:
    return Row(
        "Load",
        (
            timeseries(
                "Running sequences",
                "Sequences in each worker's batch.",
                "none",
                _by_worker("twostroke_sequences", role, is_("state", "running")),
            ),
            timeseries(
                "Waiting",
                "Requests that each worker has not yet scheduled, reservations without a grant included.",
                "none",
                _by_worker("twostroke_sequences", role, is_("state", "waiting")),
            ),
            timeseries(
                "Queued tokens",
                "Prompt tokens that each worker has still to compute.",
                "short",
                _by_worker("twostroke_queued_tokens", role),
            ),
            timeseries(
                "Step time",
                "Moving average of an engine step. On decode it is what the time between tokens is made of.",
                "s",
                _by_worker("twostroke_step_seconds", role),
            ),
            timeseries(
                "Steps",
                "Engine steps of each worker per second.",
                "ops",
                _rate_by_worker("twostroke_steps_total", role),
            ),
            timeseries(
                "Longest wait",
                "Longest wait on each worker since its process began. A step up is a request that waited longer than "
                "any before it.",
                "s",
                _by_worker("twostroke_longest_wait_seconds", role),
            ),
        ),
    )


def _memory(role: str, leases: str) -> Row:
    return Row(
        "KV memory",
        (
            timeseries(
                "Blocks by state",
                "Blocks of the whole pool. free: unused; cached: kept for their prefix, free when needed; leased: in "
                "use. Promised blocks are part of free and cached.",
                "none",
                Query(total(of_workers(worker("twostroke_kv_blocks", role), "state"), "state"), "{{state}}"),
            ),
            timeseries(
                "In use by worker",
                "Share of each worker's blocks that is referenced or promised.",
                "percentunit",
                Query(kv_use(role), "{{worker}}"),
                steps=((0.9, "orange"), (0.98, "red")),
                max_value=1,
            ),
            timeseries(
                "Preemptions",
                "Sequences whose KV was dropped for want of room, to be computed again. Many of them: the pool is too "
                "small for its load.",
                "ops",
                _rate_by_worker("twostroke_preemptions_total", role),
            ),
            timeseries(
                "Prefix cache hits",
                "Share of prompt tokens found in each worker's prefix cache.",
                "percentunit",
                Query(hit_ratio(role, "worker"), "{{worker}}"),
                max_value=1,
            ),
            timeseries("Open leases", leases, "none", _by_worker("twostroke_kv_leases_open", role)),
            timeseries(
                "Prompt tokens by cache result",
                "Prompt tokens of the pool that were found in the cache (hit) or computed or received (miss).",
                "short",
                Query(
                    total(of_workers(rate(worker("twostroke_prefix_tokens_total", role)), "result"), "result"),
                    "{{result}} per second",
                ),
                is_stacked=True,
            ),
        ),
    )


def _worker_variable(role: str) -> Variable:
    return Variable("worker", "Worker", f'label_values(twostroke_steps_total{{role="{role}"}}, worker)')


_PREFILL_STAGES = Row(
    "What requests feel",
    (
        timeseries(
            "Waiting for prefill",
            "From arrival in the prefill worker to first scheduled: grows when the pool is too small.",
            "s",
            *stage_quantiles("ttft", "prefill_queue"),
        ),
        timeseries(
            "Computing prompts",
            "From first scheduled to the first token: grows with prompt length and with what shares the step.",
            "s",
            *stage_quantiles("ttft", "prefill_compute"),
        ),
        timeseries(
            "Return of the first token",
            "From the engine's first token to its message leaving the worker.",
            "s",
            *stage_quantiles("ttft", "return"),
        ),
    ),
)

_DECODE_STAGES = Row(
    "What requests feel",
    (
        timeseries(
            "Time between tokens",
            "Between two tokens of one choice, as the router sees them arrive.",
            "s",
            *quantiles("twostroke_itl_seconds"),
        ),
        timeseries(
            "Waiting for a place in the batch",
            "From complete KV to first scheduled on decode: grows when batches or memory are full.",
            "s",
            *stage_quantiles("second_token", "decode_admission"),
        ),
        timeseries(
            "First decode step",
            "From first scheduled on decode to the second token.",
            "s",
            *stage_quantiles("second_token", "first_step"),
        ),
    ),
)

PREFILL = Dashboard(
    "twostroke-prefill",
    "Twostroke / Prefill pool",
    "Load, queues, cache and memory of the workers that compute prompts.",
    (
        _now("prefill", "Requests that no prefill worker has scheduled yet. Scale the pool out on this."),
        _PREFILL_STAGES,
        _load("prefill"),
        _memory("prefill", "Hand-offs that each prefill worker has begun and not yet closed."),
    ),
    (NAMESPACE, _worker_variable("prefill")),
)

DECODE = Dashboard(
    "twostroke-decode",
    "Twostroke / Decode pool",
    "Load, batches, cache and memory of the workers that generate tokens.",
    (
        _now("decode", "Requests not yet scheduled and reservations without room. Scale the pool out on this."),
        _DECODE_STAGES,
        _load("decode"),
        _memory("decode", "Leases that each decode worker has granted and that have not yet come to their end."),
    ),
    (NAMESPACE, _worker_variable("decode")),
)
