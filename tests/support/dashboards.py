"""Panels and PromQL: what tests need of dashboards and rules without a Grafana."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.prometheus import ROOT

FOLDER = ROOT / "deploy" / "grafana"
VARIABLES = {
    "$__rate_interval": "30s",
    "$__range": "5m",
    "$namespace": ".*",
    "$worker": ".*",
    "$tenant": ".*",
}
"""What Grafana would put in place of each, every choice at All."""

_NAME = re.compile(r"\b(?:twostroke|gen_ai|vllm)[\w:]*\b")
_SUFFIX = re.compile(r"_(bucket|sum|count|total)$")


def panels(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every panel that shows something."""
    return (panel for panel in dashboard["panels"] if panel["type"] != "row")


def expressions(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and PromQL of every query."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield f"{dashboard['title']}: {panel['title']}", target["expr"]


def substituted(expr: str) -> str:
    """The expression as Grafana would send it."""
    for variable, value in VARIABLES.items():
        expr = expr.replace(variable, value)
    return expr


def metric_names(expr: str) -> set[str]:
    """Names of the series that an expression reads; label names and strings are none."""
    without_strings = re.sub(r'"[^"]*"', '""', expr)
    without_labels = re.sub(r"\b(by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)", " ", without_strings)
    return set(_NAME.findall(re.sub(r"\{[^}]*\}", "{}", without_labels)))


def family(series: str) -> str:
    """The metric that a series belongs to: a histogram's parts and a counter's total lose their ending."""
    return _SUFFIX.sub("", series)


@dataclass(frozen=True)
class Selector:
    """A metric and what its labels must be, as PromQL's `name{label="value"}` says."""

    metric: str
    matchers: tuple[tuple[str, str, str], ...]
    """Label, operator, value."""

    def __str__(self) -> str:
        return (
            self.metric
            + "{"
            + ",".join(f'{label}{operator}"{value}"' for label, operator, value in self.matchers)
            + "}"
        )

    def takes(self, labels: Mapping[str, Any]) -> bool:
        """Whether a series of the metric with these labels is selected; an absent label is empty."""
        return all(_matches(operator, value, str(labels.get(label, ""))) for label, operator, value in self.matchers)


def _matches(operator: str, wanted: str, value: str) -> bool:
    is_equal = bool(re.fullmatch(wanted, value)) if "~" in operator else wanted == value
    return is_equal is not operator.startswith("!")


def selectors(expr: str) -> Iterator[Selector]:
    """Every selector of an expression, but for the bounds of a histogram's buckets."""
    for name in metric_names(expr):
        for braces in re.findall(rf"(?<![\w:]){name}(?![\w:])({{[^}}]*}})?", expr):
            matchers = re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', braces)
            yield Selector(name, tuple(each for each in matchers if each[0] != "le"))
