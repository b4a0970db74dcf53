"""Values for the chart's tests: the least that renders, and short words for what is asked often."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tests.support.helm import CRDS, Rendered

Seen = Callable[[Rendered], object]

SMALL: dict[str, Any] = {
    "images": {name: {"repository": f"registry.test/{name}"} for name in ("router", "workerCpu", "workerGpu")},
    "model": {"pvc": {"claimName": "models", "path": "org/tiny"}},
}
"""The least that can be rendered."""
DEFAULT: dict[str, Any] = {}
HUB: dict[str, Any] = {"repository": "org/tiny", "revision": "abc"}
PODS = ("router", "prefill", "decode", "etcd", "redis")


def hub(**model: Any) -> dict[str, Any]:
    """A model of the hub, with more said of it."""
    return {"model": {"hf": HUB, "pvc": {"claimName": "", "path": ""}, **model}}


def pool(**values: Any) -> dict[str, Any]:
    """Values of every pool."""
    return {"poolDefaults": values}


def keda(**values: Any) -> dict[str, Any]:
    """KEDA for every pool."""
    return pool(keda={"enabled": True, "serverAddress": "http://prometheus.test:9090", **values})


def rendered(values: dict[str, Any], crds: tuple[str, ...] = CRDS) -> Rendered:
    """What `SMALL` and these values give; each once."""
    return _rendered(json.dumps(values, sort_keys=True), crds)


@cache
def _rendered(values: str, crds: tuple[str, ...]) -> Rendered:
    return Rendered(SMALL, json.loads(values), crds=crds)
