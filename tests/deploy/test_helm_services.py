"""Values of addresses, probes, stores, budgets and scale, one a line: what it says, values, how it is seen."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.helm_values import DEFAULT, PODS, Seen, keda, pool, rendered

TABLE: list[tuple[str, dict[str, Any], Seen]] = [
    # ---- addresses
    (
        "servers listen on every address and tell peers the pod's",
        DEFAULT,
        lambda r: (
            r.flags("decode")["listen"] == "0.0.0.0:9000"
            and r.flags("decode")["metrics"] == "0.0.0.0:9001"
            and (r.flags("router")["http"], r.flags("router")["grpc"]) == ("0.0.0.0:8000", "0.0.0.0:8001")
            and r.env("decode")["POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
        ),
    ),
    (
        "where pods have IPv6 addresses alone, everything listens there",
        {"bindHost": "[::]"},
        lambda r: (
            r.flags("decode")["listen"] == "[::]:9000"
            and "--listen-client-urls=http://[::]:2379" in r.container("etcd")["args"]
            and "::" in r.container("redis")["args"]
        ),
    ),
    (
        "a worker keeps its name over restarts",
        DEFAULT,
        lambda r: r.env("decode")["TWOSTROKE_ID"] == {"fieldRef": {"fieldPath": "metadata.name"}},
    ),
    (
        "Kubernetes adds no TWOSTROKE_ variables of its own",
        DEFAULT,
        lambda r: all(r.pod(name)["enableServiceLinks"] is False for name in PODS),
    ),
    (
        "releases that share an etcd have clusters of their own",
        DEFAULT,
        lambda r: (
            r.flags("decode")["cluster"] == r.flags("router")["cluster"] == "ns.r-twostroke"
            and rendered({"clusterName": "one"}).flags("decode")["cluster"] == "one"
        ),
    ),
    (
        "the router's service has both protocols, gRPC marked as HTTP/2",
        {"router": {"service": {"type": "LoadBalancer", "httpPort": 80, "annotations": {"a": "b"}}}},
        lambda r: (
            [(p["name"], p["port"], p["appProtocol"]) for p in r.spec("Service", "router")["ports"]]
            == [("http", 80, "http"), ("grpc", 8001, "kubernetes.io/h2c")]
            and r.spec("Service", "router")["type"] == "LoadBalancer"
            and r.of("Service")["router"]["metadata"]["annotations"] == {"a": "b"}
        ),
    ),
    # ---- probes and ends
    (
        "startup, readiness and liveness are asked by gRPC",
        DEFAULT,
        lambda r: all(
            r.container(name)[probe]["grpc"] == {"port": port}
            for name, port in (("router", 8001), ("prefill", 9000), ("decode", 9000))
            for probe in ("startupProbe", "readinessProbe", "livenessProbe")
        ),
    ),
    (
        "a worker may take as long to load as it is told",
        pool(startupSeconds=3601),
        lambda r: (
            r.container("decode")["startupProbe"]["failureThreshold"]
            * r.container("decode")["startupProbe"]["periodSeconds"]
            >= 3601
        ),
    ),
    (
        "a pod is killed only after its drain",
        {"poolDefaults": {"grace": 600, "shutdownMarginSeconds": 20, "preStopSeconds": 3}, "router": {"grace": 45.5}},
        lambda r: (
            r.pod("decode")["terminationGracePeriodSeconds"] == 623
            and r.flags("decode")["grace"] == "600"
            and r.container("decode")["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "3"]
            and r.pod("router")["terminationGracePeriodSeconds"] == 61
            and r.flags("router")["grace"] == "45.5"
        ),
    ),
    (
        "a router leaves its services before it refuses connections; a worker need not wait",
        DEFAULT,
        lambda r: (
            r.container("router")["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "5"]
            and "lifecycle" not in r.container("decode")
        ),
    ),
    (
        "signals reach the service through tini",
        DEFAULT,
        lambda r: all(r.container(name)["command"][:2] == ["tini", "--"] for name in ("router", "prefill", "decode")),
    ),
    (
        "gRPC clients come again and spread over routers",
        {"router": {"maxConnectionAge": 90}},
        lambda r: r.flags("router")["max-connection-age"] == "90",
    ),
    # ---- etcd and Redis
    (
        "etcd and Redis are in the chart, and the services know them",
        DEFAULT,
        lambda r: (
            set(r.of("StatefulSet")) == {"etcd", "redis"}
            and r.flags("decode")["etcd"] == "http://r-twostroke-etcd:2379"
            and r.env("decode")["TWOSTROKE_REDIS"] == "redis://r-twostroke-redis:6379"
        ),
    ),
    (
        "or elsewhere",
        {"etcd": {"url": "http://etcd.test:2379"}, "redis": {"url": "rediss://redis.test:6380/2"}},
        lambda r: (
            not r.of("StatefulSet")
            and r.flags("router")["etcd"] == "http://etcd.test:2379"
            and r.env("router")["TWOSTROKE_REDIS"] == "rediss://redis.test:6380/2"
            and {(None, (2379,)), (None, (6380,))}
            <= {(peers, tuple(ports or ())) for peers, ports in r.opened("router", "egress") if peers is None}
        ),
    ),
    (
        "Redis' URL with its password comes from a secret",
        {"redis": {"urlSecret": {"name": "s", "key": "u"}, "port": 7000}},
        lambda r: (
            r.env("decode")["TWOSTROKE_REDIS"] == {"secretKeyRef": {"name": "s", "key": "u"}}
            and (None, [7000]) in r.opened("workers", "egress")
        ),
    ),
    (
        "the chart's Redis has a password by a secret",
        {"redis": {"passwordSecret": {"name": "s", "key": "p"}}},
        lambda r: (
            r.env("decode")["TWOSTROKE_REDIS"] == "redis://:$(REDIS_PASSWORD)@r-twostroke-redis:6379"
            and r.env("decode")["REDIS_PASSWORD"] == r.env("redis")["REDIS_PASSWORD"]
            and "$(REDIS_PASSWORD)" in r.container("redis")["args"]
            and list(r.env("decode")).index("REDIS_PASSWORD") < list(r.env("decode")).index("TWOSTROKE_REDIS")
        ),
    ),
    (
        "three etcd members know each other and keep a majority",
        {"etcd": {"replicas": 3, "persistence": {"enabled": True, "size": "3Gi", "storageClassName": "fast"}}},
        lambda r: (
            sum(word.count("=http://r-twostroke-etcd-") for word in r.container("etcd")["args"]) == 3
            and r.spec("PodDisruptionBudget", "etcd")["maxUnavailable"] == 1
            and r.workload("etcd")["volumeClaimTemplates"][0]["spec"]["resources"]["requests"]["storage"] == "3Gi"
            and r.workload("etcd")["volumeClaimTemplates"][0]["spec"]["storageClassName"] == "fast"
            and r.spec("Service", "etcd-peers")["publishNotReadyAddresses"]
        ),
    ),
    # ---- budgets and scale
    (
        "each pool and the router have a disruption budget",
        DEFAULT,
        lambda r: (
            set(r.of("PodDisruptionBudget")) == {"router", "prefill", "decode"}
            and r.spec("PodDisruptionBudget", "decode")["selector"] == r.workload("decode")["selector"]
        ),
    ),
    (
        "budgets can be changed and left out",
        {"poolDefaults": {"pdb": {"maxUnavailable": "25%"}}, "router": {"pdb": {"enabled": False}}},
        lambda r: (
            set(r.of("PodDisruptionBudget")) == {"prefill", "decode"}
            and r.spec("PodDisruptionBudget", "decode")["maxUnavailable"] == "25%"
        ),
    ),
    (
        "nothing scales by default",
        DEFAULT,
        lambda r: not r.of("HorizontalPodAutoscaler") and not r.of("ScaledObject") and r.workload("decode")["replicas"],
    ),
    (
        "an HPA scales prefill by its queue",
        pool(hpa={"enabled": True, "waiting": 5, "maxReplicas": 9}),
        lambda r: (
            r.spec("HorizontalPodAutoscaler", "prefill")["metrics"][0]["pods"]
            == {
                "metric": {"name": "twostroke_sequences", "selector": {"matchLabels": {"state": "waiting"}}},
                "target": {"type": "AverageValue", "averageValue": "5"},
            }
            and r.spec("HorizontalPodAutoscaler", "prefill")["maxReplicas"] == 9
            and "replicas" not in r.workload("prefill")
        ),
    ),
    (
        "an HPA scales decode by KV use and by the time of a step",
        pool(hpa={"enabled": True, "kvUsagePercent": 75, "itlMilliseconds": 40}),
        lambda r: (
            [
                (metric["pods"]["metric"]["name"], metric["pods"]["target"]["averageValue"])
                for metric in r.spec("HorizontalPodAutoscaler", "decode")["metrics"]
            ]
            == [("twostroke_kv_usage_ratio", "750m"), ("twostroke_step_seconds", "40m")]
        ),
    ),
    (
        "an HPA takes other metrics and a behavior",
        pool(hpa={"enabled": True, "metrics": [{"type": "X"}], "behavior": {"scaleDown": {"policies": []}}}),
        lambda r: (
            r.spec("HorizontalPodAutoscaler", "decode")["metrics"] == [{"type": "X"}]
            and r.spec("HorizontalPodAutoscaler", "decode")["behavior"] == {"scaleDown": {"policies": []}}
        ),
    ),
    (
        "routers scale by CPU",
        {"router": {"hpa": {"enabled": True, "targetCPUUtilization": 55}}},
        lambda r: (
            r.spec("HorizontalPodAutoscaler", "router")["metrics"][0]["resource"]["target"]["averageUtilization"] == 55
            and "replicas" not in r.workload("router")
        ),
    ),
    (
        "KEDA scales prefill by its queue, each worker counted once",
        keda(waiting=4),
        lambda r: (
            [
                (t["metricType"], t["metadata"]["query"], t["metadata"]["threshold"])
                for t in r.spec("ScaledObject", "prefill")["triggers"]
            ]
            == [
                (
                    "AverageValue",
                    'sum(max by (worker) (twostroke_sequences{state="waiting",'
                    'worker=~"r-twostroke-prefill-[a-z0-9]+-[a-z0-9]+",namespace="ns"}))',
                    "4",
                )
            ]
        ),
    ),
    (
        "KEDA scales decode by KV use and by ITL",
        keda(kvUsagePercent=70, itlMilliseconds=30, authenticationRef="prometheus"),
        lambda r: (
            [
                (
                    "kv_usage_ratio" in t["metadata"]["query"],
                    "itl_seconds_bucket" in t["metadata"]["query"],
                    t["metadata"]["threshold"],
                    t["authenticationRef"]["name"],
                )
                for t in r.spec("ScaledObject", "decode")["triggers"]
            ]
            == [(True, False, "70", "prometheus"), (False, True, "30", "prometheus")]
        ),
    ),
    (
        "KEDA has its numbers and may have other triggers",
        keda(minReplicas=2, maxReplicas=6, pollingInterval=7, cooldownPeriod=70, triggers=[{"type": "cron"}]),
        lambda r: (
            r.spec("ScaledObject", "decode")
            == {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "r-twostroke-decode"},
                "minReplicaCount": 2,
                "maxReplicaCount": 6,
                "pollingInterval": 7,
                "cooldownPeriod": 70,
                "triggers": [{"type": "cron"}],
            }
            and "replicas" not in r.workload("decode")
        ),
    ),
    (
        "a group of hosts is a LeaderWorkerSet, and what scales it knows",
        keda() | {"poolDefaults": {**keda()["poolDefaults"], "leaderWorkerSet": {"enabled": True, "preview": True}}},
        lambda r: (
            set(r.of("LeaderWorkerSet")) == {"prefill", "decode"}
            and set(r.of("Deployment")) == {"router"}
            and r.spec("LeaderWorkerSet", "decode")["leaderWorkerTemplate"]["size"] == 2
            and r.spec("ScaledObject", "decode")["scaleTargetRef"]["kind"] == "LeaderWorkerSet"
            and "[0-9]+(-[0-9]+)?" in r.spec("ScaledObject", "decode")["triggers"][0]["metadata"]["query"]
        ),
    ),
]


@pytest.mark.parametrize(("says", "values", "seen"), TABLE, ids=[says for says, _, _ in TABLE])
def test_values(says: str, values: dict[str, Any], seen: Seen) -> None:
    assert seen(rendered(values)), says
