"""The report and the raw file of `twostroke bench`: whole, self-contained, and documented."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from twostroke_cli.__main__ import app
from twostroke_cli.bench.arrivals import Open
from twostroke_cli.bench.comparison import compare
from twostroke_cli.bench.figures import summarize
from twostroke_cli.bench.job import Form, Job
from twostroke_cli.bench.lengths import Length
from twostroke_cli.bench.prompts import FromFile, FromTrace, Synthetic
from twostroke_cli.bench.report import render, workload
from twostroke_cli.bench.result import Measured, Result, read_result, schema, write_result
from twostroke_cli.bench.screen_table import in_time, show
from twostroke_cli.bench.waterfall import Stage, Waterfall
from twostroke_cli.errors import CommandError
from typer.testing import CliRunner

from tests.unit.test_bench_figures import failed, outcome, run_of, runs

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "<script>alert('x')</script>"
NAMES = ("plain", "p & <b>d</b> $1$ [/b]")
LENGTH = Length("fixed", 8, 8)


def result(has_two: bool = True, has_failures: bool = True) -> Result:
    """Of two targets, one with an unfriendly name."""
    first, second = runs(NAMES[0], 1.0, 1), runs(NAMES[1], 1.3, 2)
    if has_failures:
        first[0].outcomes[3] = failed(3)
        first[0].outcomes[3].message = HOSTILE
    chosen = [first, second] if has_two else [first]
    slo = {"ttft": 0.3, "itl": 0.05}
    stages = [Stage(name, 0.01) for name in ("admission", "placement", "reserve", "prefill_queue", "unattributed")]
    job = Job(
        url="http://h/v1",
        form=Form("m", more={"temperature": 0}),
        prompts=Synthetic(LENGTH, LENGTH, 0.5, 2),
        arrivals=Open(3.0),
        num_requests=60,
    )
    return Result(
        written_unix_s=0.0,
        client={"version": "twostroke 1", "system": "Linux"},
        load="open loop, 3 requests/s, poisson",
        job=job,
        warm_up=4,
        processes=1,
        targets=[Measured(run[0].target, "http://h/v1", "m", "--prefill 1") for run in chosen],
        summaries=[summarize(run[0].target, run, slo) for run in chosen],
        comparisons=[compare(first, second, slo)] if has_two else [],
        waterfalls={NAMES[0]: [Waterfall("ttft", 60, 0.05, stages), Waterfall("second_token", 60, 0.05, stages)]},
        runs=[run for each in chosen for run in each],
    )


@pytest.fixture(scope="module")
def both() -> str:
    """The report of two targets; drawing it takes a moment."""
    return render(result())


class Page(HTMLParser):
    """Collects what a page would load, and its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.loads += [value for name in ("src", "href", "xlink:href", "srcset") if (value := named.get(name))]


def test_the_report_stands_alone(both: str) -> None:
    page = Page(both)
    assert all(load.startswith("#") for load in page.loads), "only references inside the page"
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "@import" not in both
    assert re.findall(r"url\((?!#)", both) == []
    outside = set(re.findall(r"https?://[^\s\"'<),]+", both)) - {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert outside <= {"http://h/v1"}, "the target's own address, as text"


def test_the_report_shows_everything_and_escapes_it(both: str) -> None:
    for words in ("TTFT", "worse", "goodput", "95 % interval", "unattributed", "refused", "second token"):
        assert words in both, words
    assert HOSTILE not in both
    assert "&lt;script&gt;" in both
    assert "p &amp; &lt;b&gt;d&lt;/b&gt; $1$ [/b]" in both
    assert "<b>d</b>" not in both
    assert Page(both).tags.count("svg") == 9, "ratios, three curves, three over time, two waterfalls"


def test_the_report_s_colours_follow_the_reader_s_theme(both: str) -> None:
    assert re.findall(r"#0[123]0[13]0\w", both) == [], "every stand-in was replaced"
    assert "prefers-color-scheme: dark" in both
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", both))
    light, dark = re.findall(r":root \{([^}]*)\}", both)
    for theme in (light, dark):
        assert used <= set(re.findall(r"--([a-z0-9-]+):", theme))


def test_few_or_no_answers_make_a_report_too() -> None:
    empty = result(has_two=False)
    empty.runs = [run_of(failed(0), failed(1))]
    empty.summaries = [summarize("a", empty.runs, {})]
    empty.waterfalls = {}
    assert Page(render(empty)).tags.count("svg") == 2
    empty.runs = [run_of(outcome(0))]
    assert "svg" in Page(render(empty)).tags


def test_the_terminal_shows_it_as_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    shown = result()
    shown.runs[0].outcomes[3].message = "[/red] no room [bold]"
    show(shown)
    text = capsys.readouterr().out
    for words in ("TTFT", "1 x refused: [/red] no room [bold]", "95 % interval", "where the time went", "goodput"):
        assert words in text, words
    assert "counted by usage" in text
    assert NAMES[1] in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.00012, "0.12 ms"), (0.0123, "12.3 ms"), (0.123, "123 ms"), (1.5, "1.50 s"), (90, "90.00 s")],
)
def test_times_for_people(seconds: float, words: str) -> None:
    assert in_time(seconds) == words


def test_workloads_have_words() -> None:
    found = result()
    assert dict(workload(found))["shared prefix"] == "50 % of a prompt, 2 of them"
    job: Any = found.job
    for spec, says in (
        (FromFile("/x/p.jsonl", LENGTH), "file p.jsonl"),
        (FromTrace("/x/t.csv", 0.5, 90), "trace t.csv"),
    ):
        found.job = Job(url=job.url, form=job.form, prompts=spec, arrivals=job.arrivals, duration_s=5.0)
        assert dict(workload(found))["prompts"].startswith(says)
    assert dict(workload(found))["requests"] == "as many as begin within 5 s, 3 rounds"


# ---- the raw file ----------------------------------------------------------------------------------------------------


def test_the_raw_file_comes_back_as_it_was(both: str, tmp_path: Path) -> None:
    written = result()
    write_result(written, tmp_path / "new" / "r.json")
    assert read_result(tmp_path / "new" / "r.json") == written
    shown = CliRunner().invoke(app, ["bench", "report", str(tmp_path / "new" / "r.json")])
    assert shown.exit_code == 0
    assert (tmp_path / "new" / "r.html").read_text() == both


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="No such file"):
        read_result(tmp_path / "r.json")
    for content in ("{", "[]", '{"schema": "other/1"}'):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(CommandError, match="not a result"):
            read_result(tmp_path / "r.json")


def test_every_field_of_the_raw_file_is_documented() -> None:
    document = (ROOT / "docs" / "benchmarks.md").read_text()
    spans = set(re.findall(r"`([^`\n]+)`", document))
    fields = {name for definition in schema()["$defs"].values() for name in definition.get("properties", {})}
    assert sorted(fields - spans - {"type"}) == []


def test_every_flag_is_documented() -> None:
    document = (ROOT / "docs" / "benchmarks.md").read_text()
    helps = [
        CliRunner().invoke(app, ["bench", name, "--help"], env={"COLUMNS": "200"}).output for name in ("run", "compare")
    ]
    flags = set(re.findall(r"--[a-z][a-z-]+", "".join(helps))) - {"--help"}
    assert len(flags) > 30
    assert sorted(flag for flag in flags if f"`{flag}" not in document) == []
