"""Plots as SVG inside a page: matplotlib draws, the page's own style sheet gives ink, grid and series their colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from twostroke_cli.bench.comparison import Comparison
from twostroke_cli.bench.outcome import Outcome, Run
from twostroke_cli.bench.waterfall import Waterfall

INK, GRID = "#010101", "#020202"
SERIES = tuple(f"#0303{number:02x}" for number in range(1, 9))
"""Stand-ins, replaced by the page's variables `--ink`, `--grid` and `--s1` to `--s8`."""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "twostroke",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a target may be named as it likes
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2,
}
SIZE_IN = (6.4, 3.3)
MOST_POINTS = 2000
"""Of a scatter; of more requests evenly chosen ones are drawn."""
WIDE_RATIO = 3.0
"""Ratios further apart than this stand on a logarithmic axis."""
CURVE_POINTS = 200
STEPS = 60
"""Parts that the time of a run is cut into."""


def drawn(figure: Figure, label: str) -> str:
    """The figure as an element of a page; `label` says what it shows to those who do not see it."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' id="[A-Za-z.]+_\d+"', "", svg)  # numbered anew in each figure: not unique in a page
    for stand_in, name in ((INK, "ink"), (GRID, "grid"), *zip(SERIES, (f"s{n}" for n in range(1, 9)), strict=True)):
        svg = svg.replace(stand_in, f"var(--{name})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _axes(title: str, size: tuple[float, float] = SIZE_IN) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _as_time(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, place: _tick(value)))


def _tick(seconds: float) -> str:
    if seconds == 0:
        return "0"
    return f"{seconds:g} s" if abs(seconds) >= 1 else f"{1000 * seconds:g} ms"


def latency_curves(title: str, values: Mapping[str, Sequence[float]]) -> str | None:
    """For each target the latency that a share of its requests stays under; None where there is nothing to show."""
    values = {name: found for name, found in values.items() if len(found) > 1}
    if not values:
        return None
    with rc_context(STYLE):
        figure, axes = _axes(f"{title}: share that took at most")
        shares = np.linspace(0, 100, CURVE_POINTS)
        for colour, (name, found) in zip(cycle(SERIES), values.items(), strict=False):
            axes.plot(np.percentile(found, shares), shares, color=colour, label=name)
        axes.set_ylim(0, 101)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:.0f} %"))
        if _is_wide(values.values()):
            axes.set_xscale("log")
        _as_time(axes.xaxis)
        axes.xaxis.set_minor_formatter(NullFormatter())
        if len(values) > 1:
            axes.legend(loc="lower right")
        return drawn(figure, f"{title}, cumulative distribution")


def _is_wide(values: Iterable[Sequence[float]]) -> bool:
    """Whether a linear axis would press the most of it into a corner."""
    every = np.concatenate([np.asarray(found) for found in values])
    return bool(every.min() > 0 and every.max() > 20 * np.median(every))


def ttft_over_time(runs: Sequence[Run]) -> str | None:
    """A dot for each request where it was due; what failed stands at the bottom."""
    with rc_context(STYLE):
        figure, axes = _axes("TTFT by the time at which requests were due")
        has_points = False
        for colour, (name, outcomes) in zip(cycle(SERIES), _by_target(runs).items(), strict=False):
            points = [(o.due_at_s, o.ttft_s) for o in _thinned(outcomes) if o.ttft_s is not None and not o.error]
            if points:
                has_points = True
                times, latencies = zip(*points, strict=True)
                size = _dot_size(len(points))
                axes.scatter(times, latencies, s=size, color=colour, alpha=0.8, linewidths=0, label=name)
        failed = [outcome.due_at_s for run in runs for outcome in run.outcomes if outcome.error]
        if failed:
            axes.scatter(failed, [0.0] * len(failed), s=26, marker="x", color=SERIES[7], label="failed", clip_on=False)
        if not has_points:
            return None
        axes.set_ylim(bottom=0)
        _as_time(axes.yaxis)
        _as_time(axes.xaxis)
        if failed or len(_by_target(runs)) > 1:
            axes.legend(loc="upper right")
        return drawn(figure, "time to first token of each request over time")


def _first_rounds(runs: Sequence[Run]) -> list[Run]:
    """Each target's first, in the order of the targets."""
    firsts = {run.target: run for run in reversed(runs)}
    return sorted(firsts.values(), key=runs.index)


def load_over_time(runs: Sequence[Run]) -> str:
    """Requests in flight, of each target's first round."""
    with rc_context(STYLE):
        figure, axes = _axes("Requests in flight")
        firsts = _first_rounds(runs)
        for colour, run in zip(SERIES, firsts, strict=False):
            times = np.linspace(0, run.duration_s, STEPS + 1)
            begun = np.sort([outcome.sent_at_s for outcome in run.outcomes])
            ended = np.sort([outcome.end_at_s for outcome in run.outcomes])
            flying = np.searchsorted(begun, times, "right") - np.searchsorted(ended, times, "right")
            axes.step(times, flying, where="post", color=colour, label=run.target)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _as_time(axes.xaxis)
        if len(firsts) > 1:
            axes.legend(loc="upper right")
        return drawn(figure, "requests in flight over time")


def tokens_over_time(runs: Sequence[Run]) -> str:
    """Pieces of text a second, of each target's first round."""
    with rc_context(STYLE):
        figure, axes = _axes("Pieces of text per second")
        firsts = _first_rounds(runs)
        for colour, run in zip(SERIES, firsts, strict=False):
            counts, edges = np.histogram(
                [time_s for outcome in run.outcomes for time_s in outcome.piece_times_s],
                bins=STEPS,
                range=(0, run.duration_s or 1.0),
            )
            axes.step(edges[:-1], counts / np.diff(edges), where="post", color=colour, label=run.target)
        axes.set_ylim(bottom=0)
        _as_time(axes.xaxis)
        if len(firsts) > 1:
            axes.legend(loc="upper right")
        return drawn(figure, "pieces of text per second over time")


def ratio_plot(comparisons: Sequence[Comparison]) -> str | None:
    """Every ratio with its interval; an interval that holds 1 shows no difference."""
    names = list(dict.fromkeys(ratio.figure for each in comparisons for ratio in each.ratios))
    if not names:
        return None
    with rc_context(STYLE):
        figure, axes = _axes(f"Ratio to {comparisons[0].base}, with 95 % interval", (6.4, 0.9 + 0.34 * len(names)))
        for number, (colour, each) in enumerate(zip(cycle(SERIES[1:]), comparisons, strict=False)):
            shift = 0.22 * (number - (len(comparisons) - 1) / 2)
            rows = [names.index(ratio.figure) + shift for ratio in each.ratios]
            axes.hlines(rows, [r.low for r in each.ratios], [r.high for r in each.ratios], color=colour, linewidth=2)
            axes.plot([r.ratio for r in each.ratios], rows, "o", color=colour, label=each.target)
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        if _spans(comparisons) > WIDE_RATIO:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        if len(comparisons) > 1:
            axes.legend(loc="best")
        return drawn(figure, "ratios with their confidence intervals")


def _spans(comparisons: Sequence[Comparison]) -> float:
    """How many times the largest end of an interval is the smallest."""
    ratios = [ratio for each in comparisons for ratio in each.ratios]
    return max(ratio.high for ratio in ratios) / max(1e-9, min(ratio.low for ratio in ratios))


def waterfall_plot(waterfalls: Mapping[str, Sequence[Waterfall]], name: str) -> str | None:
    """A bar for each target, its stages one after another."""
    found = {target: one for target, each in waterfalls.items() for one in each if one.name == name}
    if not found:
        return None
    title = "TTFT" if name == "ttft" else "Second token"
    with rc_context(STYLE):
        figure, axes = _axes(f"{title}, by stage (mean)", (6.4, 1.5 + 0.45 * len(found)))
        # Colocated workers skip stages: the order is that of a target that has most of them.
        fullest = sorted(found.values(), key=lambda one: len(one.stages), reverse=True)
        stages = list(dict.fromkeys(stage.stage for one in fullest for stage in one.stages))
        lefts = dict.fromkeys(found, 0.0)
        for colour, stage in zip(cycle(SERIES), stages, strict=False):
            widths = [sum(s.seconds for s in one.stages if s.stage == stage) for one in found.values()]
            axes.barh(list(found), widths, left=list(lefts.values()), height=0.55, color=colour, label=stage)
            lefts = {target: left + width for (target, left), width in zip(lefts.items(), widths, strict=True)}
        axes.grid(axis="y", visible=False)
        axes.invert_yaxis()
        _as_time(axes.xaxis)
        figure.legend(loc="outside lower center", ncols=4)
        return drawn(figure, f"{title} by stage")


def _by_target(runs: Sequence[Run]) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}
    for run in runs:
        found.setdefault(run.target, []).extend(run.outcomes)
    return found


def _dot_size(num_points: int) -> float:
    """Fewer requests are larger dots."""
    return float(np.clip(8000 / num_points, 6, 30))


def _thinned(outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
    return outcomes[:: 1 + len(outcomes) // MOST_POINTS]
