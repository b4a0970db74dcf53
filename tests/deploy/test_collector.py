"""The Collector's configuration, as far as it can be checked without a Collector: its own rules about itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.support.prometheus import ROOT

PATH = ROOT / "deploy" / "otel" / "collector.yaml"
KINDS = ("receivers", "processors", "exporters", "extensions")
CONTRIB = {
    "receivers": {"otlp"},
    "processors": {"memory_limiter", "k8sattributes", "transform", "batch"},
    "exporters": {"prometheus", "otlp"},
    "extensions": {"health_check"},
}
"""Types of components that the contrib distribution has, and that we use."""


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(PATH.read_text())
    return loaded


def test_components_are_known(config: dict[str, Any]) -> None:
    assert set(config) == {*KINDS, "service"}
    for kind in KINDS:
        assert {name.split("/")[0] for name in config[kind]} == CONTRIB[kind]


def test_every_component_is_used_and_every_one_used_is_there(config: dict[str, Any]) -> None:
    pipelines = config["service"]["pipelines"]
    assert set(pipelines) == {"metrics", "traces"}
    for kind in ("receivers", "processors", "exporters"):
        used = {name for pipeline in pipelines.values() for name in pipeline[kind]}
        assert used == set(config[kind])
    assert config["service"]["extensions"] == list(config["extensions"])


def test_memory_is_limited_first_and_batches_are_made_last(config: dict[str, Any]) -> None:
    for pipeline in config["service"]["pipelines"].values():
        assert pipeline["processors"][0] == "memory_limiter"
        assert pipeline["processors"][-1] == "batch"
    limiter = config["processors"]["memory_limiter"]
    assert 0 < limiter["spike_limit_percentage"] < limiter["limit_percentage"] < 100


def test_both_otlp_protocols_are_taken(config: dict[str, Any]) -> None:
    protocols = config["receivers"]["otlp"]["protocols"]
    assert {name: each["endpoint"].rpartition(":")[2] for name, each in protocols.items()} == {
        "grpc": "4317",
        "http": "4318",
    }


def test_names_and_labels_are_those_of_the_rules(config: dict[str, Any]) -> None:
    assert config["exporters"]["prometheus"]["add_metric_suffixes"] is True
    statements = config["processors"]["transform/labels"]["metric_statements"][0]["statements"]
    assert any('attributes["namespace"]' in statement for statement in statements)


def test_the_environment_it_needs_is_told() -> None:
    text = PATH.read_text()
    head = text[: text.index("extensions:")]
    for variable in re.findall(r"\$\{env:(\w+)", text):
        assert variable in head
