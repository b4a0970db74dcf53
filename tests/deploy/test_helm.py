"""The chart as a whole: lint, examples against every Kubernetes' schemas, what is refused, what is packaged."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support import helm
from tests.support.helm_values import HUB, SMALL

EXAMPLES = sorted(path.name for path in (helm.CHART / "examples").glob("*.yaml"))
TLS = {"ingress": {"enabled": True, "hosts": ["a.test"], "tlsSecret": "cert"}}
DEEP: dict[str, Any] = {
    **TLS,
    "poolDefaults": {
        "hpa": {"enabled": True},
        "hostNetwork": True,
        "cudaIpcAcrossPods": True,
        "kernelCache": {"claimName": "kernels"},
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "preStopSeconds": 3,
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
        "podSecurityContext": {"runAsUser": 0, "runAsNonRoot": False},
    },
    "router": {"hpa": {"enabled": True}, "service": {"type": "LoadBalancer", "annotations": {"a": "b"}}},
    "tls": {"caSecret": {"name": "ca"}},
    "redis": {"passwordSecret": {"name": "redis"}},
    "images": {"pullSecrets": ["registry"]},
    "telemetry": {"dashboards": {"enabled": True}, "vllmMetrics": False, "otlpEndpoint": "https://otel.test"},
    "networkPolicy": {"metricsFrom": [{"namespaceSelector": {}}], "extraEgress": [{"to": [{"podSelector": {}}]}]},
}
"""Much at once that no example has."""
RENDERED: dict[str, tuple[Mapping[str, Any] | str, ...]] = {
    **{name: (name,) for name in EXAMPLES},
    "small": (SMALL,),
    "deep": (SMALL, DEEP),
}


def is_known(manifest: helm.Manifest) -> bool:
    """Whether Kubernetes itself has this kind, not a CRD."""
    return manifest["apiVersion"].partition("/")[0] not in {crd.partition("/")[0] for crd in helm.CRDS}


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[helm.Manifest]]:
    return {name: helm.render(*values) for name, values in RENDERED.items()}


# ---- lint and schemas ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RENDERED)
def test_lint_finds_nothing(name: str) -> None:
    done = helm.lint(*RENDERED[name])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("version", ["1.28", "1.29", "1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37"])
def test_every_manifest_fits_the_schemas_of(version: str, rendered: dict[str, list[helm.Manifest]]) -> None:
    assert version in helm.versions()
    wrong = [
        f"{name}: {manifest['kind']} {manifest['metadata']['name']}: {fault}"
        for name, manifests in rendered.items()
        for manifest in filter(is_known, manifests)
        for fault in helm.faults(manifest, version)
    ]
    assert wrong == []


def test_every_version_with_a_schema_was_checked() -> None:
    assert helm.versions() == [f"1.{minor}" for minor in range(28, 38)]


def test_the_schemas_find_faults(rendered: dict[str, list[helm.Manifest]]) -> None:
    router = next(m for m in rendered["small"] if m["kind"] == "Deployment")
    broken = json.loads(json.dumps(router))
    broken["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    broken["spec"]["replicas"] = "two"
    found = " ".join(helm.faults(broken, "1.37"))
    assert "livenesProbe" in found
    assert "'two' is not of type" in found


# What of each CRD this chart writes; the operators' own schemas are not in any package.
_META = {"type": "object", "required": ["name", "namespace", "labels"]}
_OBJECTS = {"type": "array", "minItems": 1, "items": {"type": "object"}}


def _crd(api_version: str, required: list[str], **properties: Any) -> dict[str, Any]:
    spec = {"type": "object", "required": required, "properties": properties, "additionalProperties": False}
    return {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {"apiVersion": {"const": api_version}, "kind": {}, "metadata": _META, "spec": spec},
    }


_INTEGER = {"type": "integer", "minimum": 0}
CRD_SCHEMAS = {
    "ScaledObject": _crd(
        "keda.sh/v1alpha1",
        ["scaleTargetRef", "triggers"],
        scaleTargetRef={"type": "object", "required": ["name"]},
        minReplicaCount=_INTEGER,
        maxReplicaCount=_INTEGER,
        pollingInterval=_INTEGER,
        cooldownPeriod=_INTEGER,
        triggers={
            "type": "array",
            "minItems": 1,
            "items": {
                "required": ["type", "metadata"],
                "properties": {
                    "metricType": {"enum": ["AverageValue", "Value", "Utilization"]},
                    "metadata": {
                        "required": ["serverAddress", "query", "threshold"],
                        "additionalProperties": {"type": "string"},
                    },
                },
            },
        },
    ),
    "LeaderWorkerSet": _crd(
        "leaderworkerset.x-k8s.io/v1",
        ["leaderWorkerTemplate"],
        replicas=_INTEGER,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        leaderWorkerTemplate={
            "type": "object",
            "required": ["size", "workerTemplate"],
            "properties": {"size": _INTEGER, "restartPolicy": {"type": "string"}, "workerTemplate": {}},
            "additionalProperties": False,
        },
    ),
    "ServiceMonitor": _crd(
        "monitoring.coreos.com/v1",
        ["selector", "endpoints"],
        selector={"required": ["matchLabels"]},
        endpoints=_OBJECTS,
    ),
    "PrometheusRule": _crd("monitoring.coreos.com/v1", ["groups"], groups=_OBJECTS),
    "HTTPRoute": _crd(
        "gateway.networking.k8s.io/v1",
        ["parentRefs", "rules"],
        parentRefs=_OBJECTS,
        hostnames={"items": {"type": "string"}},
        rules=_OBJECTS,
    ),
    "GRPCRoute": _crd(
        "gateway.networking.k8s.io/v1",
        ["parentRefs", "rules"],
        parentRefs=_OBJECTS,
        hostnames={"items": {"type": "string"}},
        rules=_OBJECTS,
    ),
}


def test_objects_of_operators_have_their_shape(rendered: dict[str, list[helm.Manifest]]) -> None:
    foreign = [manifest for manifests in rendered.values() for manifest in manifests if not is_known(manifest)]
    assert {manifest["kind"] for manifest in foreign} == set(CRD_SCHEMAS)
    for manifest in foreign:
        jsonschema.validate(manifest, CRD_SCHEMAS[manifest["kind"]])


def test_the_pods_of_a_group_fit_the_schema_of_a_pod_template(rendered: dict[str, list[helm.Manifest]]) -> None:
    groups = [m for m in rendered["multi-node-tp.yaml"] if m["kind"] == "LeaderWorkerSet"]
    assert len(groups) == 2
    for group in groups:
        template = group["spec"]["leaderWorkerTemplate"]["workerTemplate"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"]}
        assert helm.faults(pod, "1.37") == []


def test_names_and_labels_keep_to_their_lengths() -> None:
    manifests = helm.render("4p4d.yaml", release="a-release-of-fifty-three-letters-the-most-helm-takes")
    for manifest in manifests:
        assert len(manifest["metadata"]["name"]) <= 63
        assert all(len(str(value)) <= 63 for value in manifest["metadata"]["labels"].values())


# ---- what is refused -------------------------------------------------------------------------------------------------

NO_PVC = {"pvc": {"claimName": "", "path": ""}}
REFUSED_BY_TEMPLATE: list[tuple[str, dict[str, Any]]] = [
    ("images.router.repository is empty", {"images": {"router": {"repository": ""}}}),
    ("images.workerGpu.repository is empty", {"images": {"workerGpu": {"repository": ""}}}),
    (
        "images.workerCpu.repository is empty",
        {"images": {"workerCpu": {"repository": ""}}, "poolDefaults": {"device": "cpu"}},
    ),
    ("images.etcd.repository is empty", {"images": {"etcd": {"repository": ""}}}),
    ("images.redis.repository is empty", {"images": {"redis": {"repository": ""}}}),
    ("model: give model.hf.repository", {"model": NO_PVC}),
    ("model.hf.repository and model.pvc.claimName: give one", {"model": {"hf": HUB}}),
    ("model.hf.revision is empty", {"model": {**NO_PVC, "hf": {"repository": "org/name"}}}),
    ("model.hf.offline: nothing is fetched", {"model": {**NO_PVC, "hf": {**HUB, "offline": True}}}),
    ("pools: no pool with role decode", {"pools": {"decode": {"role": "decode", "enabled": False}}}),
    ("pools: no pool with role decode", {"pools": {"decode": {"role": "prefill"}}}),
    (
        "pools.decode: hpa.enabled and keda.enabled",
        {"pools": {"decode": {"role": "decode", "hpa": {"enabled": True}, "keda": {"enabled": True}}}},
    ),
    (
        "pools.prefill.keda.serverAddress is empty",
        {"pools": {"prefill": {"role": "prefill", "keda": {"enabled": True}}}},
    ),
    ("the engine has no tensor parallelism yet", {"poolDefaults": {"leaderWorkerSet": {"enabled": True}}}),
    ("etcd.replicas: more than one member needs etcd.persistence", {"etcd": {"replicas": 3}}),
    ("etcd.persistence.enabled: etcd.url", {"etcd": {"url": "http://e:2379", "persistence": {"enabled": True}}}),
    ("redis.url and redis.urlSecret.name", {"redis": {"url": "redis://r:6379", "urlSecret": {"name": "s"}}}),
    ("redis.passwordSecret.name is of the chart's", {"redis": {"url": "redis://r:1", "passwordSecret": {"name": "s"}}}),
    ("ingress.hosts is empty", {"ingress": {"enabled": True}}),
    ("gateway.parentRefs is empty", {"gateway": {"grpc": {"enabled": True}}}),
]


@pytest.mark.parametrize(("line", "values"), REFUSED_BY_TEMPLATE, ids=[line for line, _ in REFUSED_BY_TEMPLATE])
def test_what_cannot_work_is_one_clear_line(line: str, values: dict[str, Any]) -> None:
    said = helm.refusal(SMALL, values).splitlines()
    assert [text for text in said if text.startswith("Error:") and line in text], said


def test_a_group_without_its_operator_is_one_clear_line() -> None:
    assert "install LeaderWorkerSet first" in helm.refusal("multi-node-tp.yaml", crds=())


REFUSED_BY_SCHEMA: list[tuple[str, dict[str, Any]]] = [
    ("'replica'", {"router": {"replica": 3}}),
    ("'routers'", {"routers": {}}),
    ("/router/replicas", {"router": {"replicas": -1}}),
    ("/router/replicas", {"router": {"replicas": "2"}}),
    ("'max-lives'", {"router": {"settings": {"max-lives": 1}}}),
    ("/router/settings/max-live", {"router": {"settings": {"max-live": 0}}}),
    ("/pools/decode/settings/dtype", {"pools": {"decode": {"role": "decode", "settings": {"dtype": "fp4"}}}}),
    ("/pools/decode/settings/block-size", {"pools": {"decode": {"role": "decode", "settings": {"block-size": 17}}}}),
    ("'listen'", {"pools": {"decode": {"role": "decode", "settings": {"listen": "0.0.0.0:1"}}}}),
    ("/pools/decode/role", {"pools": {"decode": {"role": "both"}}}),
    ("role", {"pools": {"more": {"replicas": 2}}}),
    ("/pools", {"pools": {"Decode": {"role": "decode"}}}),
    ("/pools", {"pools": {"router": {"role": "decode"}}}),
    ("/poolDefaults/device", {"poolDefaults": {"device": "tpu"}}),
    ("/poolDefaults/sharedMemory", {"poolDefaults": {"sharedMemory": "much"}}),
    ("/poolDefaults/keda/serverAddress", {"poolDefaults": {"keda": {"serverAddress": "prometheus:9090"}}}),
    ("/etcd/replicas", {"etcd": {"replicas": 2}}),
    ("/etcd/url", {"etcd": {"url": "https://etcd:2379"}}),
    ("/redis/url", {"redis": {"url": "redis://:secret@redis:6379"}}),
    ("/redis/maxMemory", {"redis": {"maxMemory": "1 GB"}}),
    ("/images/router/digest", {"images": {"router": {"digest": "sha256:12"}}}),
    ("/images/router/pullPolicy", {"images": {"router": {"pullPolicy": "Sometimes"}}}),
    ("/model/hf/repository", {"model": {"hf": {"repository": "name"}}}),
    ("/model/pvc/path", {"model": {"pvc": {"path": "../etc"}}}),
    ("/model/cache/accessModes", {"model": {"cache": {"accessModes": []}}}),
    ("/telemetry/otlpProtocol", {"telemetry": {"otlpProtocol": "udp"}}),
    ("/telemetry/traceSample", {"telemetry": {"traceSample": 2}}),
    ("/bindHost", {"bindHost": "127.0.0.1"}),
    ("/clusterName", {"clusterName": "a/b"}),
    ("/ingress/paths", {"ingress": {"paths": ["v1"]}}),
    ("/router/service/type", {"router": {"service": {"type": "ExternalName"}}}),
    ("/networkPolicy/clients", {"networkPolicy": {"clients": ["gateway"]}}),
]


@pytest.mark.parametrize(("where", "values"), REFUSED_BY_SCHEMA, ids=[str(values) for _, values in REFUSED_BY_SCHEMA])
def test_the_schema_refuses(where: str, values: dict[str, Any]) -> None:
    said = helm.refusal(SMALL, values)
    assert "values don't meet the specifications of the schema" in said
    assert where in said


# ---- the schema and what else the chart is made of -------------------------------------------------------------------


def test_the_schema_knows_the_flags_that_services_have() -> None:
    schema = json.loads(helm.SCHEMA.read_text())["definitions"]
    stale = {name: flags for name, flags in helm.flag_definitions().items() if schema[name] != flags}
    assert stale == {}, "`python -m tests.support.helm` brings values.schema.json up to date"


def test_every_default_is_in_the_schema_and_every_name_of_the_schema_has_a_default() -> None:
    schema = json.loads(helm.SCHEMA.read_text())
    values = yaml.safe_load((helm.CHART / "values.yaml").read_text())

    def compare(part: dict[str, Any], value: Any, where: str) -> list[str]:
        if "$ref" in part:
            part = schema["definitions"][part["$ref"].rpartition("/")[2]]
        if not isinstance(value, dict) or part.get("additionalProperties") is not False or where.endswith("settings"):
            return []
        if where == ".pools":
            return []
        here = [f"{where}.{name}" for name in set(part["properties"]) ^ set(value) if name != "global"]
        return here + [
            found
            for name, inner in part["properties"].items()
            if name in value
            for found in compare(inner, value[name], f"{where}.{name}")
        ]

    assert compare(schema, values, "") == []
    jsonschema.validate(values, schema)


def test_a_packaged_chart_holds_the_dashboards_and_rules_of_the_tree(tmp_path: Path) -> None:
    done = helm.run_helm("package", helm.CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    (package,) = tmp_path.glob("*.tgz")
    with tarfile.open(package) as archive:
        files = {m.name.partition("/")[2]: archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]
    deploy = helm.ROOT / "deploy"
    expected = {f"files/dashboards/{path.name}": path.read_bytes() for path in (deploy / "grafana").glob("*.json")}
    expected |= {f"files/rules/{path.name}": path.read_bytes() for path in (deploy / "prometheus").glob("*.rules.yaml")}
    assert expected
    assert {name: content for name, content in files.items() if name.startswith("files/")} == expected
    assert not [name for name in files if name.endswith((".py", ".pyc"))]


NOTES: list[tuple[str, dict[str, Any] | str]] = [
    ("WARNING: no API keys", {}),
    ("WARNING: no network policy", {"networkPolicy": {"enabled": False}}),
    ("pools.decode.keda is on, and this Kubernetes has no keda.sh/v1alpha1", "4p4d.yaml"),
    ("gateway asks for a route", "4p4d.yaml"),
    ("ServiceMonitor or PrometheusRule", "4p4d.yaml"),
    ("ReadWriteOnce: all pods must run on one node", "one-h100-colocated.yaml"),
    ("an engine uses one GPU; the others are idle", {"poolDefaults": {"gpus": {"count": 8}}}),
    ("its pods see the processes", {"poolDefaults": {"cudaIpcAcrossPods": True}}),
    ("is on its hosts' network: network policies do not hold", {"poolDefaults": {"hostNetwork": True}}),
]


@pytest.mark.parametrize(("line", "values"), NOTES, ids=[line for line, _ in NOTES])
def test_the_notes_warn(line: str, values: dict[str, Any] | str) -> None:
    given = (values,) if isinstance(values, str) else (SMALL, values)
    assert line in helm.notes(*given)


def test_the_notes_do_not_warn_without_cause() -> None:
    said = helm.notes(SMALL, {"router": {"apiKeys": {"secretName": "keys"}}})
    assert "WARNING" not in said
    assert "serves tiny as cluster ns.r-twostroke" in said
