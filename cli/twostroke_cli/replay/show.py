"""A replay's figures for people: a table, and a chart of who waited how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from twostroke_cli.bench.figures import Spread
from twostroke_cli.replay.cluster import Outcome
from twostroke_cli.replay.figures import Figures


def show_table(found: Sequence[Figures], ideal: float, console: Console) -> None:
    """One line a replay."""
    first = found[0]
    title = f"{first.requests} requests, {first.routers} routers; hits of an endless cache {100 * ideal:.1f} %"
    caption = "TTFT in s: mean, median, 99 %; ITL in ms: median, 99 %"
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    for name in ("workers", "hits %", "TTFT", "ITL", "refused", "goodput %"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found:
        table.add_row(
            each.policy,
            f"{each.prefill}P{each.decode}D" if each.prefill else str(each.decode),
            f"{100 * each.hit_share:.2f}",
            _numbers(each.ttft_s, ("mean", "p50", "p99"), 1, 2),
            _numbers(each.itl_s, ("p50", "p99"), 1000, 1),
            str(each.refused),
            "" if each.goodput is None else f"{100 * each.goodput:.1f}",
        )
    console.print(table)


def _numbers(spread: Spread | None, names: Sequence[str], factor: float, digits: int) -> str:
    return " ".join(f"{factor * getattr(spread, name):.{digits}f}" for name in names) if spread else ""


def write_chart(outcomes: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    """Shares of requests by TTFT, and by mean time between tokens, one line a replay; a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, some in outcomes.items():
        for axes, values in (
            (left, [outcome.ttft_s for outcome in some]),
            (right, [outcome.itl_s for outcome in some if outcome.output_len > 1]),
        ):
            known = sorted(value for value in values if value is not None)
            if known:  # those that were refused keep the line below the top
                axes.step(known, [(at + 1) / len(values) for at in range(len(known))], label=name, where="post")
    for axes, title in ((left, "time to first token (s)"), (right, "mean time between tokens (s)")):
        axes.set(xscale="log", xlabel=title, ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    left.set_ylabel("share of requests")
    left.legend(loc="lower right")
    figure.savefig(path, format="png", dpi=150)
