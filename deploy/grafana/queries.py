"""PromQL that several panels share.

Every router reports every worker, and a worker reports itself: the same series comes several times. Whatever adds
workers up therefore takes the greatest of each worker's first (`of_workers`).
"""

from __future__ import annotations

from deploy.grafana.panels import Query

RATE = "$__rate_interval"
QUANTILES = (0.5, 0.9, 0.99)


def is_(label: str, value: str) -> str:
    """A matcher for one value of a label."""
    return f'{label}="{value}"'


def router(metric: str, *matchers: str) -> str:
    """A router's metric in the chosen namespaces."""
    return metric + "{" + ",".join(('namespace=~"$namespace"', *matchers)) + "}"


def worker(metric: str, role: str, *matchers: str) -> str:
    """A metric of the chosen workers of a role; an empty role is every one."""
    role_is = (is_("role", role),) if role else ()
    return router(metric, *role_is, 'worker=~"$worker"', *matchers)


def rate(series: str) -> str:
    """Per second, over what Grafana thinks fit."""
    return f"rate({series}[{RATE}])"


def of_workers(series: str, *labels: str) -> str:
    """One series for each worker, whoever reported it."""
    return f"max by ({', '.join(('namespace', 'role', 'worker', *labels))}) ({series})"


def total(series: str, *labels: str) -> str:
    """Added up, but for these labels."""
    return f"sum by ({', '.join(labels)}) ({series})" if labels else f"sum({series})"


def ratio(part: str, whole: str) -> str:
    """A share from 0 to 1; 0 where there is nothing yet."""
    return f"{part} / ({whole} > 0) or 0 * {whole}"


def quantile(q: float, metric: str, *matchers: str) -> str:
    """A quantile of a router's histogram."""
    buckets = total(rate(router(f"{metric}_bucket", *matchers)), "le")
    return f"histogram_quantile({q:g}, {buckets})"


def quantiles(metric: str, *matchers: str) -> tuple[Query, ...]:
    """p50, p90 and p99 of a router's histogram."""
    return tuple(Query(quantile(q, metric, *matchers), f"p{q * 100:g}") for q in QUANTILES)


def stage_quantiles(waterfall: str, stage: str) -> tuple[Query, ...]:
    """p50, p90 and p99 of one stage of a waterfall."""
    return quantiles("twostroke_stage_seconds", is_("waterfall", waterfall), is_("stage", stage))


def mean_stages(waterfall: str, whole: str) -> Query:
    """By stage: seconds it adds to the mean request; together they are the mean of `whole`."""
    parts = total(rate(router("twostroke_stage_seconds_sum", is_("waterfall", waterfall))), "stage")
    requests = total(rate(router(f"{whole}_count")))
    return Query(f"{parts} / ignoring (stage) group_left () {requests}", "{{stage}}")


def kv_use(role: str) -> str:
    """By worker: share of KV blocks that are referenced or promised, so not to be had."""
    taken, whole = (
        total(of_workers(worker("twostroke_kv_blocks", role, f'state=~"{states}"'), "state"), "worker")
        for states in ("leased|promised", "free|cached|leased")
    )
    return ratio(taken, whole)


def hit_ratio(role: str, *labels: str) -> str:
    """Share of prompt tokens that were found in a prefix cache."""
    hits, tokens = (
        total(of_workers(rate(worker("twostroke_prefix_tokens_total", role, *matchers)), "result"), *labels)
        for matchers in (('result="hit"',), ())
    )
    return ratio(hits, tokens)
