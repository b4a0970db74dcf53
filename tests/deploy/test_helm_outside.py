"""Values of telemetry, network, routes, rights and secrets, one a line: what it says, values, how it is seen."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.helm_values import DEFAULT, PODS, Seen, hub, keda, rendered

GATEWAY = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateway"}}}
MONITORING = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
ROUTES = {"parentRefs": [{"name": "public"}], "hostnames": ["a.test"]}

TABLE: list[tuple[str, dict[str, Any], Seen]] = [
    # ---- telemetry
    (
        "nothing is exported by default, and logs are JSON",
        DEFAULT,
        lambda r: "otlp-endpoint" not in r.flags("router") and r.flags("decode")["log-format"] == "json",
    ),
    (
        "spans and metrics go to a collector, with the pod's name",
        {"telemetry": {"otlpEndpoint": "http://otel.test:4318", "otlpProtocol": "http/protobuf", "traceSample": 0.25}},
        lambda r: (
            (
                r.flags("decode")["otlp-endpoint"],
                r.flags("decode")["otlp-protocol"],
                r.flags("decode")["trace-sample"],
            )
            == ("http://otel.test:4318", "http/protobuf", "0.25")
            and "k8s.pod.name=$(TWOSTROKE_ID)" in r.env("decode")["OTEL_RESOURCE_ATTRIBUTES"]
            and (None, [4318]) in r.opened("workers", "egress")
        ),
    ),
    (
        "vLLM's names can be left out",
        {"telemetry": {"vllmMetrics": False}},
        lambda r: "no-vllm-metrics" in r.flags("decode") and "no-vllm-metrics" in r.flags("router"),
    ),
    (
        "the operator scrapes routers and workers",
        {"telemetry": {"serviceMonitor": {"enabled": True, "interval": "5s", "labels": {"release": "p"}}}},
        lambda r: (
            {name: r.spec("ServiceMonitor", name)["endpoints"][0]["port"] for name in r.of("ServiceMonitor")}
            == {"router": "http", "workers": "metrics"}
            and all(m["metadata"]["labels"]["release"] == "p" for m in r.of("ServiceMonitor").values())
            and r.spec("ServiceMonitor", "workers")["endpoints"][0]["interval"] == "5s"
            and ([{"namespaceSelector": {}}], [9001]) in r.opened("workers", "ingress")
        ),
    ),
    (
        "what a monitor selects is a service with that port",
        {"telemetry": {"serviceMonitor": {"enabled": True}}},
        lambda r: all(
            [
                name
                for name, service in r.of("Service").items()
                if r.spec("ServiceMonitor", monitor)["selector"]["matchLabels"].items()
                <= service["metadata"]["labels"].items()
                and port in {p["name"] for p in service["spec"]["ports"]}
            ]
            == [monitor]
            for monitor, port in (("router", "http"), ("workers", "metrics"))
        ),
    ),
    (
        "rules are the tree's, untouched",
        {"telemetry": {"prometheusRule": {"enabled": True, "labels": {"release": "p"}}}},
        lambda r: (
            {"alerts", "recording"} <= set(r.of("PrometheusRule"))
            and "{{" in json.dumps(r.spec("PrometheusRule", "alerts"))
            and r.of("PrometheusRule")["alerts"]["metadata"]["labels"]["release"] == "p"
        ),
    ),
    (
        "dashboards are config maps that Grafana's sidecar finds",
        {"telemetry": {"dashboards": {"enabled": True, "annotations": {"folder": "llm"}}}},
        lambda r: (
            len(r.of("ConfigMap")) >= 6
            and all(
                m["metadata"]["labels"]["grafana_dashboard"] == "1"
                and m["metadata"]["annotations"] == {"folder": "llm"}
                and json.loads(next(iter(m["data"].values())))["panels"]
                for m in r.of("ConfigMap").values()
            )
        ),
    ),
    # ---- network
    (
        "nothing goes in or out that is not said",
        DEFAULT,
        lambda r: (
            r.spec("NetworkPolicy", "default-deny")["policyTypes"] == ["Ingress", "Egress"]
            and not {"ingress", "egress"} & set(r.spec("NetworkPolicy", "default-deny"))
            and all(
                r.spec("NetworkPolicy", "default-deny")["podSelector"]["matchLabels"].items()
                <= r.workload(name)["template"]["metadata"]["labels"].items()
                for name in PODS
            )
        ),
    ),
    (
        "every pod has a policy of its own",
        DEFAULT,
        lambda r: set(r.of("NetworkPolicy")) == {"default-deny", "router", "workers", "etcd", "redis", "test-ready"},
    ),
    (
        "everyone may call the router, or those that are named",
        DEFAULT,
        lambda r: (
            r.opened("router", "ingress") == [(None, [8000, 8001])]
            and rendered({"networkPolicy": {"clients": [GATEWAY]}}).opened("router", "ingress")
            == [([GATEWAY, "router-test"], [8000, 8001])]
        ),
    ),
    (
        "where clients are named, those that scrape still reach the router's metrics",
        {"networkPolicy": {"clients": [GATEWAY], "metricsFrom": [MONITORING]}},
        lambda r: ([MONITORING], [8000]) in r.opened("router", "ingress"),
    ),
    (
        "workers are called by routers, and by each other on every port",
        DEFAULT,
        lambda r: r.opened("workers", "ingress") == [(["router"], [9000]), (["worker"], None)],
    ),
    (
        "who scrapes workers is named",
        {"networkPolicy": {"metricsFrom": [GATEWAY]}},
        lambda r: ([GATEWAY], [9001]) in r.opened("workers", "ingress"),
    ),
    (
        "etcd and Redis are reached by the cluster's pods alone",
        DEFAULT,
        lambda r: (
            r.opened("etcd", "ingress") == [(["router", "worker"], [2379]), (["etcd"], [2380, 2379])]
            and r.opened("redis", "ingress") == [(["router", "worker"], [6379])]
            and r.opened("redis", "egress") == []
        ),
    ),
    (
        "what goes out is names, stores and workers",
        DEFAULT,
        lambda r: (
            r.opened("router", "egress")
            == [(["worker"], [9000]), (None, [53, 53]), (["etcd"], [2379]), (["redis"], [6379])]
        ),
    ),
    (
        "where outside parts are can be said, and more can be opened",
        {
            "etcd": {"url": "http://etcd.test:2379"},
            "networkPolicy": {"externalTo": [GATEWAY], "extraEgress": [{"ports": [{"port": 1}]}]},
        },
        lambda r: ([GATEWAY], [2379]) in r.opened("workers", "egress") and (None, [1]) in r.opened("router", "egress"),
    ),
    (
        "policies can be left out",
        {"networkPolicy": {"enabled": False}},
        lambda r: not r.of("NetworkPolicy"),
    ),
    ("nothing is public by default", DEFAULT, lambda r: not {"Ingress", "HTTPRoute", "GRPCRoute"} & r.kinds),
    (
        "an Ingress leads to the router's HTTP, with TLS by a secret",
        {"ingress": {"enabled": True, "className": "nginx", "hosts": ["a.test"], "tlsSecret": "cert"}},
        lambda r: (
            r.spec("Ingress", "router")["ingressClassName"] == "nginx"
            and r.spec("Ingress", "router")["tls"] == [{"secretName": "cert", "hosts": ["a.test"]}]
            and [
                (path["path"], path["backend"]["service"])
                for rule in r.spec("Ingress", "router")["rules"]
                for path in rule["http"]["paths"]
            ]
            == [("/v1", {"name": "r-twostroke-router", "port": {"name": "http"}})]
        ),
    ),
    (
        "more paths than the API are shown only when named",
        {"ingress": {"enabled": True, "hosts": ["a.test", "b.test"], "paths": ["/"], "annotations": {"k": "v"}}},
        lambda r: (
            [path["path"] for rule in r.spec("Ingress", "router")["rules"] for path in rule["http"]["paths"]]
            == ["/", "/"]
            and r.of("Ingress")["router"]["metadata"]["annotations"] == {"k": "v"}
            and "tls" not in r.spec("Ingress", "router")
        ),
    ),
    (
        "a Gateway has a route for HTTP that may stream without end",
        {"gateway": {**ROUTES, "http": {"enabled": True, "requestTimeout": "0s"}}},
        lambda r: (
            r.spec("HTTPRoute", "router")["parentRefs"] == [{"name": "public"}]
            and r.spec("HTTPRoute", "router")["hostnames"] == ["a.test"]
            and r.spec("HTTPRoute", "router")["rules"]
            == [
                {
                    "matches": [{"path": {"type": "PathPrefix", "value": "/v1"}}],
                    "backendRefs": [{"name": "r-twostroke-router", "port": 8000}],
                    "timeouts": {"request": "0s"},
                }
            ]
        ),
    ),
    (
        "and one for gRPC, of the public service alone",
        {"gateway": {**ROUTES, "grpc": {"enabled": True}}},
        lambda r: (
            r.spec("GRPCRoute", "router")["rules"]
            == [
                {
                    "matches": [{"method": {"service": "twostroke.v1.Inference"}}],
                    "backendRefs": [{"name": "r-twostroke-router", "port": 8001}],
                }
            ]
            and "HTTPRoute" not in r.kinds
        ),
    ),
    # ---- rights and secrets
    (
        "no container is root, gains rights or writes its root",
        hub(),
        lambda r: all(
            r.pod(name)["securityContext"]["runAsNonRoot"]
            and r.pod(name)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            and all(
                container["securityContext"]["readOnlyRootFilesystem"]
                and container["securityContext"]["allowPrivilegeEscalation"] is False
                and container["securityContext"]["capabilities"]["drop"] == ["ALL"]
                for container in (r.container(name), *r.init(name).values())
            )
            for name in PODS
        ),
    ),
    (
        "a pool may need other rights",
        {"poolDefaults": {"podSecurityContext": {"runAsUser": 0, "runAsNonRoot": False}}},
        lambda r: (
            (r.pod("decode")["securityContext"]["runAsUser"], r.pod("router")["securityContext"]["runAsUser"])
            == (0, 10001)
        ),
    ),
    (
        "every service has a place to write: /tmp",
        DEFAULT,
        lambda r: all("/tmp" in r.mounts(name) for name in ("router", "prefill", "decode")),
    ),
    (
        "the account has no token",
        DEFAULT,
        lambda r: (
            all(
                (r.pod(name)["serviceAccountName"], r.pod(name)["automountServiceAccountToken"])
                == ("r-twostroke", False)
                for name in PODS
            )
            and r.of("ServiceAccount")[""]["automountServiceAccountToken"] is False
        ),
    ),
    (
        "or it is one that exists",
        {"serviceAccount": {"create": False, "name": "mine"}},
        lambda r: r.pod("decode")["serviceAccountName"] == "mine" and not r.of("ServiceAccount"),
    ),
    (
        "API keys come from a secret",
        {"router": {"apiKeys": {"secretName": "keys", "key": "k"}}},
        lambda r: (
            r.flags("router")["api-keys-file"] == "/etc/twostroke/api-keys/keys"
            and r.volumes("router")["api-keys"]["secret"]["items"] == [{"key": "k", "path": "keys"}]
            and r.mounts("router")["/etc/twostroke/api-keys"]["readOnly"]
            and "api-keys-file" not in rendered(DEFAULT).flags("router")
        ),
    ),
    (
        "other certificates are trusted by what goes out",
        hub() | {"tls": {"caSecret": {"name": "ca", "key": "bundle.pem"}}},
        lambda r: all(
            r.env(name)["SSL_CERT_FILE"] == "/etc/twostroke/ca/ca.crt"
            and r.mounts(name)["/etc/twostroke/ca"]["readOnly"]
            and r.volumes(name)["ca"]["secret"]["items"] == [{"key": "bundle.pem", "path": "ca.crt"}]
            and {"name": "SSL_CERT_FILE", "value": "/etc/twostroke/ca/ca.crt"} in r.init(name)["fetch-model"]["env"]
            for name in ("router", "decode")
        ),
    ),
    (
        "no secret is written into a manifest",
        DEFAULT,
        lambda r: "Secret" not in r.kinds,
    ),
    (
        "`helm test` asks the router whether it has workers",
        DEFAULT,
        lambda r: (
            r.of("Pod")["test-ready"]["metadata"]["annotations"]["helm.sh/hook"] == "test"
            and "http://r-twostroke-router:8000/ready" in r.spec("Pod", "test-ready")["containers"][0]["args"]
            and r.opened("test-ready", "egress") == [(None, [53, 53]), (["router"], None)]
        ),
    ),
]


@pytest.mark.parametrize(("says", "values", "seen"), TABLE, ids=[says for says, _, _ in TABLE])
def test_values(says: str, values: dict[str, Any], seen: Seen) -> None:
    assert seen(rendered(values)), says


WITHOUT_CRDS: list[tuple[str, dict[str, Any], set[str]]] = [
    ("KEDA", keda(), {"ScaledObject"}),
    ("the operator's monitors", {"telemetry": {"serviceMonitor": {"enabled": True}}}, {"ServiceMonitor"}),
    ("the operator's rules", {"telemetry": {"prometheusRule": {"enabled": True}}}, {"PrometheusRule"}),
    (
        "routes",
        {"gateway": {**ROUTES, "http": {"enabled": True}, "grpc": {"enabled": True}}},
        {"HTTPRoute", "GRPCRoute"},
    ),
]


@pytest.mark.parametrize(("what", "values", "kinds"), WITHOUT_CRDS, ids=[what for what, _, _ in WITHOUT_CRDS])
def test_what_needs_a_crd_is_made_only_where_there_is_one(what: str, values: dict[str, Any], kinds: set[str]) -> None:
    assert kinds <= rendered(values).kinds
    without = rendered(values, crds=())
    assert not kinds & without.kinds
    assert all(without.workload(name)["replicas"] == 1 for name in ("prefill", "decode"))


def test_nothing_that_needs_a_crd_is_on_by_default() -> None:
    assert {m["apiVersion"] for m in rendered(DEFAULT).manifests} == {
        *("v1", "apps/v1", "policy/v1", "networking.k8s.io/v1"),
    }
