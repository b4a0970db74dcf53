"""Metrics of the cluster as a router sees it: who is there, what it depends on, and who uses it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge

ROLES = ("prefill", "decode")
WORKER_STATES = ("ready", "connecting", "draining")
WORKER_CHANGES = ("joined", "restarted", "disconnected", "left", "lost")
DEPENDENCIES = ("etcd", "redis")
OUTCOMES = ("stop", "length", "cancelled", "invalid", "context", "overloaded", "internal", "unavailable", "deadline")
TOKEN_KINDS = ("prompt", "cached", "completion")
MAX_TENANTS = 200
OTHER_TENANTS = "other"
"""What tenants beyond the first `MAX_TENANTS` are counted under."""
NO_TENANT = "anonymous"
"""The label of requests without an API key: Prometheus takes an empty label for none."""

Change = Literal["joined", "restarted", "disconnected", "left", "lost"]


class ClusterMetrics:
    """Every series exists from the start, at zero: an alert on a rare event needs a value before it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.workers = Gauge(
            "twostroke_workers", "Workers known, by role and state.", ("role", "state"), registry=registry
        )
        """state: ready, connecting (its stream is down), draining."""
        self.ready_pairs = Gauge(
            "twostroke_ready_pairs", "Pairs of a ready prefill and a ready decode worker that fit.", registry=registry
        )
        self.worker_changes = Counter(
            "twostroke_worker_changes", "Workers that came and went.", ("role", "change"), registry=registry
        )
        """change: joined, restarted (a new process under the same id), disconnected (its stream broke), left (after a
        drain), lost (without one)."""
        self.dependency_up = Gauge(
            "twostroke_dependency_up", "1 while etcd or Redis answers, else 0.", ("dependency",), registry=registry
        )
        self.requests_limit = Gauge(
            "twostroke_requests_limit", "Requests that this router takes at a time.", registry=registry
        )
        _start(self.workers, ROLES, WORKER_STATES)
        _start(self.worker_changes, ROLES, WORKER_CHANGES)
        _start(self.dependency_up, DEPENDENCIES)

    def changed(self, role: str, change: Change) -> None:
        """A worker came or went."""
        self.worker_changes.labels(role, change).inc()


class TenantMetrics:
    """Use by tenant, for a bounded number of tenants: the first ones seen, the others together."""

    def __init__(self, registry: CollectorRegistry, max_tenants: int = MAX_TENANTS) -> None:
        self._max_tenants = max_tenants
        self._labels: dict[str, str] = {}
        self._tokens = Counter(
            "twostroke_tenant_tokens", "Tokens billed, by tenant.", ("tenant", "kind"), registry=registry
        )
        """kind: prompt, cached (of the prompt), completion."""
        self._requests = Counter(
            "twostroke_tenant_requests", "Requests by tenant and end.", ("tenant", "outcome"), registry=registry
        )
        """outcome: as of twostroke_requests."""

    def ended(self, tenant: str, outcome: str) -> None:
        """A request of this tenant is over."""
        self._requests.labels(self._label(tenant), outcome).inc()

    def used(self, tenant: str, kind: str, num_tokens: int) -> None:
        """Tokens were billed to this tenant."""
        self._tokens.labels(self._label(tenant), kind).inc(num_tokens)

    def _label(self, tenant: str) -> str:
        if tenant not in self._labels and len(self._labels) < self._max_tenants:
            label = self._labels[tenant] = tenant or NO_TENANT
            _start(self._requests, (label,), OUTCOMES)
            _start(self._tokens, (label,), TOKEN_KINDS)
        return self._labels.get(tenant, OTHER_TENANTS)


def _start(metric: Counter | Gauge, *labels: Iterable[str]) -> None:
    """Makes the series of every combination of labels."""
    for values in product(*labels):
        metric.labels(*values)
