"""Who came and went, who fits whom, and how many tenants get a name."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry
from twostroke_chassis.cluster_metrics import ClusterMetrics, TenantMetrics
from twostroke_chassis.membership import WorkerRecord
from twostroke_router.vitals import Sighting, changes, num_pairs


def record(role: str, **more: Any) -> WorkerRecord:
    given = {
        "worker_id": role,
        "role": role,
        "endpoint": "127.0.0.1:1",
        "epoch": 1,
        "model_name": "tiny",
        "model_fingerprint": "m",
        "kv_fingerprint": "k",
        "block_size": 16,
        "max_model_len": 256,
        "channels": ("tcp",),
    }
    return WorkerRecord(**{**given, **more})


def ready(epoch: int = 1) -> Sighting:
    return Sighting("decode", epoch, "ready")


def test_each_change_has_its_name() -> None:
    connecting, draining = Sighting("decode", 1, "connecting"), Sighting("decode", 1, "draining")
    cases = {
        "joined": ({}, {"d": ready()}),
        "restarted": ({"d": ready()}, {"d": ready(2)}),
        "disconnected": ({"d": ready()}, {"d": connecting}),
        "left": ({"d": draining}, {}),
        "lost": ({"d": connecting}, {}),
    }
    for change, (before, now) in cases.items():
        assert list(changes(before, now)) == [("decode", change)]
    assert list(changes({"d": connecting}, {"d": connecting})) == []
    assert list(changes({"d": connecting}, {"d": ready()})) == []
    assert list(changes({"d": ready()}, {"d": draining})) == []


def test_pairs_are_counted_by_fit() -> None:
    prefill, decode = record("prefill"), record("decode")
    assert num_pairs([]) == num_pairs([prefill]) == num_pairs([decode, decode]) == 0
    assert num_pairs([prefill, prefill, decode, decode, decode]) == 6
    assert num_pairs([prefill, record("decode", block_size=64)]) == 1
    for field, value in {"model_fingerprint": "x", "kv_fingerprint": "x", "channels": ("shm",)}.items():
        assert num_pairs([prefill, record("decode", **{field: value})]) == 0
    assert num_pairs([prefill, decode, record("decode", channels=("shm",))]) == 1


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    found: float | None = registry.get_sample_value(name, labels)
    return found


def test_series_exist_before_their_first_event() -> None:
    registry = CollectorRegistry()
    ClusterMetrics(registry)
    assert value(registry, "twostroke_worker_changes_total", role="decode", change="lost") == 0
    assert value(registry, "twostroke_workers", role="prefill", state="ready") == 0
    assert value(registry, "twostroke_dependency_up", dependency="etcd") == 0
    assert value(registry, "twostroke_ready_pairs") == 0


def test_tenants_beyond_the_limit_are_counted_together() -> None:
    registry = CollectorRegistry()
    tenants = TenantMetrics(registry, max_tenants=3)
    for tenant in ("", "alice", "bob", "carol", "dave", "alice"):
        tenants.ended(tenant, "stop")
        tenants.used(tenant, "prompt", 10)
    counts = {
        name: value(registry, "twostroke_tenant_requests_total", tenant=name, outcome="stop")
        for name in ("anonymous", "alice", "bob", "carol", "other")
    }
    assert counts == {"anonymous": 1, "alice": 2, "bob": 1, "carol": None, "other": 2}
    assert value(registry, "twostroke_tenant_tokens_total", tenant="other", kind="prompt") == 20
    assert value(registry, "twostroke_tenant_requests_total", tenant="alice", outcome="internal") == 0
