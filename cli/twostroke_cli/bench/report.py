"""The HTML report: one file that asks nothing of any network, light or dark as its reader likes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from twostroke_cli.bench.lengths import Length
from twostroke_cli.bench.prompts import FromFile, FromTrace
from twostroke_cli.bench.result import Result, write_file
from twostroke_cli.bench.screen_table import LATENCY_ROWS, in_figure, in_rate, in_ratio, in_time

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from twostroke_cli.bench.outcome import Outcome

TEMPLATE = "report.html.j2"


def write_report(result: Result, path: Path) -> None:
    """Writes the page; `CommandError` where that cannot be."""
    write_file(path, "--html", render(result).encode())


def render(result: Result) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("twostroke_cli.bench", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "time": in_time,
        "ratio": in_ratio,
        "rate": in_rate,
        "figure": lambda each, name: in_figure(name, each),
    }
    return environment.get_template(TEMPLATE).render(
        result=result,
        title=" against ".join(summary.target for summary in result.summaries),
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(result.written_unix_s)),
        latency_rows=LATENCY_ROWS,
        workload=workload(result),
        # Drawn here; what servers and users called things is escaped by matplotlib.
        charts=[Markup(chart) for chart in _charts(result)],
        waterfalls=[Markup(chart) for chart in _waterfalls(result)],
        examples={(o.error, run.target): o.message for run in result.runs for o in run.outcomes if o.error},
    )


def _charts(result: Result) -> Sequence[str]:
    from twostroke_cli.bench import charts  # matplotlib takes a moment: not for those who want no report

    runs = result.runs

    def values(of: Callable[[Outcome], Sequence[float | None]]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for run in runs:
            each = found.setdefault(run.target, [])
            each.extend(value for o in run.outcomes if not o.error for value in of(o) if value is not None)
        return found

    drawn = [
        charts.ratio_plot(result.comparisons) if result.comparisons else None,
        charts.latency_curves("TTFT", values(lambda outcome: [outcome.ttft_s])),
        charts.latency_curves("ITL", values(lambda outcome: outcome.gaps_s)),
        charts.latency_curves("E2E", values(lambda outcome: [outcome.e2e_s])),
        charts.ttft_over_time(runs),
        charts.load_over_time(runs),
        charts.tokens_over_time(runs),
    ]
    return [chart for chart in drawn if chart]


def _waterfalls(result: Result) -> Sequence[str]:
    from twostroke_cli.bench import charts

    names = ("ttft", "second_token")
    return [chart for name in names if (chart := charts.waterfall_plot(result.waterfalls, name))]


def workload(result: Result) -> list[tuple[str, str]]:
    """What was asked, in words."""
    job = result.job
    spec: Any = job.prompts
    lines = [("load", result.load), ("requests", _amount(result))]
    if isinstance(spec, FromTrace):
        cut = f", prompts cut at {spec.max_prompt_len}" if spec.max_prompt_len else ""
        lines.append(("prompts", f"trace {Path(spec.path).name}, lengths x {spec.length_scale:g}{cut}"))
    elif isinstance(spec, FromFile):
        lines.append(("prompts", f"file {Path(spec.path).name}, at most {spec.max_tokens} tokens out"))
    else:
        lines.append(("prompts", _made_up(spec.length, spec.max_tokens, spec.vocab_size)))
        if spec.prefix_share:
            lines.append(("shared prefix", f"{100 * spec.prefix_share:.0f} % of a prompt, {spec.groups} of them"))
    form = job.form
    more = "".join(f", {name} {value}" for name, value in form.more.items())
    lines.append(("form", f"{form.endpoint}, {'streamed' if form.is_streamed else 'whole'}{more}"))
    lines.append(("seed, warm-up", f"{job.seed}, {result.warm_up} requests"))
    lines.append(("client", f"{result.processes} process(es), {result.client['version']} on {result.client['system']}"))
    return lines


def _amount(result: Result) -> str:
    job = result.job
    words = [f"{job.num_requests}" if job.num_requests is not None else "as many as begin"]
    if job.duration_s is not None:
        words.append(f"within {job.duration_s:g} s")
    rounds = max(summary.rounds for summary in result.summaries)
    return " ".join(words) + (f", {rounds} rounds" if rounds > 1 else "")


def _made_up(length: Length, max_tokens: Length, vocab_size: int) -> str:
    return f"{length} {'random token ids' if vocab_size else 'random words'} in, at most {max_tokens} tokens out"
