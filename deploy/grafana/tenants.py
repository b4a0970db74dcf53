"""Who uses the cluster."""

from __future__ import annotations

from deploy.grafana.cluster import COUNTED, FAILED, NAMESPACE
from deploy.grafana.panels import Dashboard, Panel, Query, Row, Variable, timeseries
from deploy.grafana.queries import is_, rate, ratio, router, total

_TENANT = 'tenant=~"$tenant"'


def _tenant_tokens(kind: str) -> str:
    return total(rate(router("twostroke_tenant_tokens_total", _TENANT, is_("kind", kind))), "tenant")


def _tenant_requests(*matchers: str) -> str:
    return total(rate(router("twostroke_tenant_requests_total", _TENANT, *matchers)), "tenant")


def _over_time(metric: str, label: str) -> Query:
    return Query(total(f"increase({router(metric, _TENANT)}[$__range])", "tenant", label))


_USE = Row(
    "Use",
    (
        timeseries("Requests", "Requests ended, by tenant.", "reqps", Query(_tenant_requests(), "{{tenant}}")),
        timeseries(
            "Prompt tokens",
            "Prompt tokens per second, by tenant.",
            "short",
            Query(_tenant_tokens("prompt"), "{{tenant}}"),
        ),
        timeseries(
            "Completion tokens",
            "Generated tokens per second, by tenant.",
            "short",
            Query(_tenant_tokens("completion"), "{{tenant}}"),
        ),
        timeseries(
            "Cached share",
            "Share of each tenant's prompt tokens that was found in a prefix cache. Prefixes are shared by "
            "all requests of one cache salt.",
            "percentunit",
            Query(ratio(_tenant_tokens("cached"), _tenant_tokens("prompt")), "{{tenant}}"),
            max_value=1,
        ),
        timeseries(
            "Failed or refused",
            "Share of each tenant's requests that failed or were refused for lack of room.",
            "percentunit",
            Query(ratio(_tenant_requests(FAILED), _tenant_requests(COUNTED)), "{{tenant}}"),
            steps=((0.005, "orange"), (0.05, "red")),
        ),
        timeseries(
            "Ends",
            "Requests of the chosen tenants by how they ended.",
            "reqps",
            Query(
                total(rate(router("twostroke_tenant_requests_total", _TENANT)), "outcome"),
                "{{outcome}}",
            ),
            is_stacked=True,
        ),
    ),
)

_BILL = Row(
    "In the chosen time",
    (
        Panel(
            "Tokens by tenant",
            "Tokens of the chosen time, by tenant and kind. cached is part of prompt.",
            "short",
            (_over_time("twostroke_tenant_tokens_total", "kind"),),
            kind="table",
            width=12,
        ),
        Panel(
            "Requests by tenant",
            "Requests of the chosen time, by tenant and end.",
            "short",
            (_over_time("twostroke_tenant_requests_total", "outcome"),),
            kind="table",
            width=12,
        ),
    ),
)

TENANTS = Dashboard(
    "twostroke-tenants",
    "Twostroke / Tenants",
    "Who uses the cluster. The first 200 tenants that a router sees have a name here, the rest is `other`; requests "
    "without an API key are `anonymous`.",
    (_USE, _BILL),
    (NAMESPACE, Variable("tenant", "Tenant", "label_values(twostroke_tenant_requests_total, tenant)")),
)
