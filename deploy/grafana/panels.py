"""What a Grafana dashboard consists of, as plain values; `dashboard_json` lays it out on Grafana's grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

GRID_COLUMNS = 24
SCHEMA_VERSION = 39
"""Grafana 11's; newer ones migrate it when they load it."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

Kind = Literal["timeseries", "stat", "heatmap", "table", "bargauge"]
Json = dict[str, Any]


@dataclass(frozen=True)
class Query:
    """One PromQL expression and what its series are called."""

    expr: str
    legend: str = "__auto"


@dataclass(frozen=True)
class Panel:
    """One panel; sizes are in grid units of 24 columns."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    steps: tuple[tuple[float, str], ...] = ()
    """Thresholds: from which value on which colour; below the first it is green."""
    lowest_good: bool = True
    """Whether small values are the good ones: decides the colour below the first threshold."""
    is_stacked: bool = False
    names: tuple[tuple[float, str], ...] = ()
    """Words shown in place of values."""
    width: int = 8
    height: int = 7
    max_value: float | None = None


@dataclass(frozen=True)
class Row:
    """Panels under one heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a dashboard, filled from a label's values; all of them is the default."""

    name: str
    label: str
    query: str


@dataclass(frozen=True)
class Dashboard:
    """One dashboard; `uid` is also its file's name."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    variables: tuple[Variable, ...] = field(default=())


def timeseries(title: str, description: str, unit: str, *queries: Query, **more: Any) -> Panel:
    """Values over time."""
    return Panel(title, description, unit, queries, **more)


def stat(title: str, description: str, unit: str, expr: str, **more: Any) -> Panel:
    """The latest value, large."""
    return Panel(title, description, unit, (Query(expr),), kind="stat", **{"width": 4, "height": 4, **more})


# ---- JSON ------------------------------------------------------------------------------------------------------------


def dashboard_json(dashboard: Dashboard) -> Json:
    """The dashboard as Grafana imports it."""
    return {
        "annotations": {"list": []},
        "description": dashboard.description,
        "editable": True,
        "graphTooltip": 1,
        "links": [_links()],
        "panels": list(_placed(dashboard.rows)),
        "refresh": "30s",
        "schemaVersion": SCHEMA_VERSION,
        "tags": ["twostroke"],
        "templating": {"list": [_datasource(), *map(_variable, dashboard.variables)]},
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "title": dashboard.title,
        "uid": dashboard.uid,
        "version": 1,
        "weekStart": "",
    }


def _links() -> Json:
    """To the other dashboards, with the same time and choices."""
    return {
        "asDropdown": True,
        "icon": "external link",
        "includeVars": True,
        "keepTime": True,
        "tags": ["twostroke"],
        "targetBlank": False,
        "title": "Twostroke",
        "tooltip": "",
        "type": "dashboards",
    }


def _datasource() -> Json:
    return {
        "current": {"selected": False, "text": "default", "value": "default"},
        "hide": 0,
        "includeAll": False,
        "label": "Data source",
        "multi": False,
        "name": "datasource",
        "options": [],
        "query": "prometheus",
        "refresh": 1,
        "regex": "",
        "type": "datasource",
    }


def _variable(variable: Variable) -> Json:
    return {
        # A regular expression that also matches the label where it is absent.
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "datasource": DATASOURCE,
        "definition": variable.query,
        "hide": 0,
        "includeAll": True,
        "label": variable.label,
        "multi": True,
        "name": variable.name,
        "options": [],
        "query": {"qryType": 1, "query": variable.query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
        "refresh": 2,
        "regex": "",
        "sort": 1,
        "type": "query",
    }


def _placed(rows: Sequence[Row]) -> Iterator[Json]:
    """Every panel with an id and a place: left to right, then down."""
    number, y = 0, 0
    for row in rows:
        number += 1
        yield _row(row.title, number, y)
        x, y, tallest = 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > GRID_COLUMNS:
                x, y, tallest = 0, y + tallest, 0
            number += 1
            yield _panel(panel, number, x, y)
            x, tallest = x + panel.width, max(tallest, panel.height)
        y += tallest


def _row(title: str, number: int, y: int) -> Json:
    place = {"h": 1, "w": GRID_COLUMNS, "x": 0, "y": y}
    return {"collapsed": False, "gridPos": place, "id": number, "panels": [], "title": title, "type": "row"}


def _panel(panel: Panel, number: int, x: int, y: int) -> Json:
    return {
        "datasource": DATASOURCE,
        "description": panel.description,
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "gridPos": {"h": panel.height, "w": panel.width, "x": x, "y": y},
        "id": number,
        "options": _OPTIONS[panel.kind],
        "targets": [_target(panel, place, query) for place, query in enumerate(panel.queries)],
        "title": panel.title,
        "transformations": _TRANSFORMATIONS.get(panel.kind, []),
        "type": panel.kind,
    }


def _defaults(panel: Panel) -> Json:
    defaults: Json = {
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "custom": _custom(panel),
        "mappings": _mappings(panel),
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": _steps(panel)},
        "unit": panel.unit,
    }
    return defaults if panel.max_value is None else {**defaults, "max": panel.max_value}


def _steps(panel: Panel) -> list[Json]:
    first = "green" if panel.lowest_good else "red"
    return [{"color": first, "value": None}, *({"color": color, "value": value} for value, color in panel.steps)]


def _mappings(panel: Panel) -> list[Json]:
    if not panel.names:
        return []
    options = {f"{value:g}": {"index": place, "text": text} for place, (value, text) in enumerate(panel.names)}
    return [{"options": options, "type": "value"}]


def _custom(panel: Panel) -> Json:
    if panel.kind != "timeseries":
        return {}
    return {
        "drawStyle": "line",
        "fillOpacity": 40 if panel.is_stacked else 8,
        "lineWidth": 1,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"group": "A", "mode": "normal" if panel.is_stacked else "none"},
        "thresholdsStyle": {"mode": "dashed" if panel.steps else "off"},
    }


def _target(panel: Panel, place: int, query: Query) -> Json:
    is_instant = panel.kind in ("table", "bargauge")
    return {
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "format": {"heatmap": "heatmap", "table": "table"}.get(panel.kind, "time_series"),
        "instant": is_instant,
        "legendFormat": query.legend,
        "range": not is_instant,
        "refId": chr(ord("A") + place),
    }


_REDUCE = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[Kind, Json] = {
    "timeseries": {
        "legend": {"calcs": ["mean", "lastNotNull"], "displayMode": "table", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": _REDUCE,
        "textMode": "auto",
    },
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {"exponent": 0.5, "mode": "scheme", "scheme": "Spectral", "steps": 64},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "unit": "s"},
    },
    "table": {
        "cellHeight": "sm",
        "footer": {"countRows": False, "fields": "", "reducer": ["sum"], "show": False},
        "showHeader": True,
    },
    "bargauge": {
        "displayMode": "gradient",
        "orientation": "horizontal",
        "reduceOptions": _REDUCE,
        "showUnfilled": True,
        "valueMode": "color",
    },
}
_TRANSFORMATIONS: dict[Kind, list[Json]] = {
    "table": [{"id": "organize", "options": {"excludeByName": {"Time": True}, "indexByName": {}, "renameByName": {}}}]
}
