"""The dashboards as files: what Grafana needs of them, and that they are what their source says."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from deploy.grafana.__main__ import DASHBOARDS, file_text
from tests.support.dashboards import FOLDER, VARIABLES, expressions, panels, substituted
from tests.support.prometheus import promtool, write_rules

FILES = sorted(FOLDER.glob("*.json"))
UNITS = {"none", "short", "s", "reqps", "ops", "cps", "Bps", "bytes", "percentunit"}
COLOURS = {"green", "orange", "red"}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(request.param.read_text())
    return loaded


def test_the_files_are_what_the_source_says() -> None:
    assert {path.name: path.read_text() for path in FILES} == {
        f"{dashboard.uid}.json": file_text(dashboard) for dashboard in DASHBOARDS
    }, "run `python -m deploy.grafana`"


def test_no_two_dashboards_share_an_id_or_a_title() -> None:
    loaded = [json.loads(path.read_text()) for path in FILES]
    assert len(loaded) == 6
    for key in ("uid", "title"):
        assert len({each[key] for each in loaded}) == len(loaded)
    assert [each["uid"] for each in loaded] == [path.stem for path in FILES]


def test_a_dashboard_can_be_imported(dashboard: dict[str, Any]) -> None:
    assert dashboard["schemaVersion"] >= 39
    assert "id" not in dashboard  # the database's; it would overwrite what has it
    assert dashboard["description"]
    assert dashboard["tags"] == ["twostroke"]
    variables = {each["name"]: each for each in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert "namespace" in variables
    for name, variable in variables.items():
        if name != "datasource":
            assert variable["allValue"] == ".*"
            assert variable["definition"] == variable["query"]["query"]


def test_every_panel_says_what_it_shows(dashboard: dict[str, Any]) -> None:
    for panel in panels(dashboard):
        defaults = panel["fieldConfig"]["defaults"]
        assert panel["title"], panel
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert defaults["unit"] in UNITS, panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        steps = defaults["thresholds"]["steps"]
        values = [step["value"] for step in steps]
        assert values[0] is None
        assert values[1:] == sorted(values[1:])
        assert {step["color"] for step in steps} <= COLOURS
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_panels_have_ids_and_places_of_their_own(dashboard: dict[str, Any]) -> None:
    everything = dashboard["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    places = [(panel["title"], panel["gridPos"]) for panel in everything]
    for title, place in places:
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24, title
        assert place["h"] > 0, title
    for (one, a), (other, b) in combinations(places, 2):
        is_beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        is_apart = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert is_beside or is_apart, f"{one} and {other} overlap"


def test_titles_are_unique_within_a_row(dashboard: dict[str, Any]) -> None:
    seen: set[str] = set()
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            seen = set()
        assert panel["title"] not in seen
        seen.add(panel["title"])


def test_expressions_use_only_variables_that_are_there(dashboard: dict[str, Any]) -> None:
    declared = {f"${each['name']}" for each in dashboard["templating"]["list"]}
    for title, expr in expressions(dashboard):
        used = {variable for variable in VARIABLES if variable in expr}
        assert used <= declared | {"$__rate_interval", "$__range"}, title
        assert "$" not in substituted(expr), title


def test_every_expression_parses(tmp_path: Path) -> None:
    found = [expr for path in FILES for _, expr in expressions(json.loads(path.read_text()))]
    rules = [{"record": f"test:{number}", "expr": substituted(expr)} for number, expr in enumerate(found)]
    assert len(rules) > 100
    assert "SUCCESS" in promtool("check", "rules", write_rules(tmp_path / "panels.json", rules))
