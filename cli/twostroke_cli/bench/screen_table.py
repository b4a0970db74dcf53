"""What `twostroke bench` shows in a terminal: a bar while it runs, tables when it is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from twostroke_cli.bench.comparison import Comparison
from twostroke_cli.bench.figures import Spread, Summary
from twostroke_cli.bench.outcome import Outcome
from twostroke_cli.bench.result import Result

LATENCY_ROWS = (
    ("TTFT", "ttft_s"),
    ("ITL", "itl_s"),
    ("TPOT", "tpot_s"),
    ("E2E", "e2e_s"),
    ("client late", "lateness_s"),
)


class Bar:
    """The progress of one load after another, on stderr where that is a terminal."""

    def __init__(self, is_shown: bool) -> None:
        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(
            *columns,
            TextColumn("{task.fields[more]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not (is_shown and console.is_terminal),
        )
        self._task = self._progress.add_task("starting", total=None, more="")
        self._tokens = self._failed = 0
        self._begin_s = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, title: str, total: int | None, seconds: float | None) -> None:
        """A load begins."""
        self._progress.remove_task(self._task)
        self._tokens = self._failed = 0
        self._begin_s = time.monotonic()
        more = f"for {seconds:g} s" if seconds else ""
        self._task = self._progress.add_task(title, total=total, more=more)

    def on_outcome(self, outcome: Outcome) -> None:
        """A request has ended."""
        self._tokens += outcome.num_tokens
        self._failed += bool(outcome.error)
        rate = self._tokens / max(1e-9, time.monotonic() - self._begin_s)
        failed = f"  {self._failed} failed" if self._failed else ""
        self._progress.update(self._task, advance=1, more=f"{rate:.0f} tokens/s{failed}")


def show(result: Result, console: Console | None = None) -> None:
    """Everything of a result that fits a terminal."""
    # No markup: names and messages come from elsewhere, and may hold brackets.
    console = console or Console(markup=False, highlight=False)
    for summary in result.summaries:
        console.print(_latencies(summary))
        console.print(_facts(summary))
        for warning in summary.warnings:
            console.print(Text.assemble(("note: ", "yellow"), warning))
        for kind, count in summary.errors.items():
            example = _example(result, summary.target, kind)
            console.print(Text.assemble(("failed: ", "red"), f"{count} x {kind}: {example}"))
        console.print()
    for comparison in result.comparisons:
        console.print(_ratios(comparison))
    for name in result.waterfalls:
        console.print(_stages(result, name))


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _latencies(summary: Summary) -> Table:
    table = _table(summary.target, ("mean", "p50", "p90", "p99", "longest", "of"))
    for name, attribute in LATENCY_ROWS:
        found: Spread | None = getattr(summary, attribute)
        if found is not None:
            values = (found.mean, found.p50, found.p90, found.p99, found.most)
            table.add_row(name, *map(in_time, values), str(found.count))
    return table


def _facts(summary: Summary) -> str:
    lines = [
        f"answered   {summary.answered} of {summary.requests} in {summary.duration_s:.1f} s: "
        f"{summary.request_rate:.2f} requests/s",
        f"tokens     in {in_rate(summary.input_rate)}/s "
        f"({summary.prompt_tokens}, {summary.cached_tokens} of them cached), "
        f"out {in_rate(summary.output_rate)}/s ({summary.completion_tokens}, counted by {summary.token_source})",
    ]
    if good := summary.goodput:
        limits = ", ".join(f"{name} {in_time(limit)}" for name, limit in good.slo.items())
        lines.append(f"goodput    {good.rate:.2f} requests/s, {100 * good.share:.1f} % of all, within {limits}")
    return "\n".join(lines)


def _ratios(comparison: Comparison) -> Table:
    rounds = f"{comparison.rounds} round{'s' if comparison.rounds > 1 else ''}"
    table = _table(
        f"{comparison.target} over {comparison.base} ({rounds})",
        (comparison.base, comparison.target, "ratio", "95 % interval", ""),
    )
    for each in comparison.ratios:
        values = (in_figure(each.figure, value) for value in (each.base, each.value))
        table.add_row(
            each.figure, *values, in_ratio(each.ratio), f"{in_ratio(each.low)} to {in_ratio(each.high)}", each.verdict
        )
    return table


def _stages(result: Result, target: str) -> Table:
    table = _table(f"where the time went: {target}", ("mean", "share"))
    for waterfall in result.waterfalls[target]:
        table.add_row(f"{waterfall.name} ({waterfall.requests})", in_time(waterfall.total_s), "")
        for stage in waterfall.stages:
            share = stage.seconds / waterfall.total_s if waterfall.total_s else 0.0
            table.add_row(f"  {stage.stage}", in_time(stage.seconds), f"{100 * share:.1f} %")
    return table


def _example(result: Result, target: str, error: str) -> str:
    outcomes = (outcome for run in result.runs if run.target == target for outcome in run.outcomes)
    return next((outcome.message for outcome in outcomes if outcome.error == error), "")


def in_figure(name: str, value: float) -> str:
    """A figure of a comparison with its unit: latencies are times, the others rates."""
    return in_time(value) if " p" in name else f"{value:.2f}"


def in_rate(per_second: float) -> str:
    """Small rates with their tenths."""
    return f"{per_second:.1f}" if per_second < 100 else f"{per_second:.0f}"


def in_ratio(ratio: float) -> str:
    """Three digits or four."""
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.1f}"


def in_time(seconds: float) -> str:
    """Seconds for people."""
    if abs(seconds) < 1:
        return f"{1000 * seconds:.3g} ms" if abs(seconds) < 0.1 else f"{1000 * seconds:.0f} ms"
    return f"{seconds:.2f} s"
