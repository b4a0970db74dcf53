"""`twostroke bench run`, `compare` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twostroke_cli.bench.flags import Flags
from twostroke_cli.errors import CommandError
from twostroke_cli.flag_groups import takes_flags

if TYPE_CHECKING:
    from twostroke_cli.bench.result import Result
    from twostroke_cli.bench.targets import Target

DEFAULT_URL = "http://127.0.0.1:8000"
_WHOM = "Whom"
Wait = Annotated[
    float,
    typer.Option(metavar="SECONDS", min=1, help="For a started cluster to be ready.", rich_help_panel=_WHOM),
]

app = typer.Typer(
    help="Put load on any OpenAI server and see how it answers: latencies, rates, goodput, side by side.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("run")
@takes_flags(Flags)
def run(
    url: Annotated[
        str, typer.Option(metavar="URL", help=f"The server; {DEFAULT_URL} by default.", rich_help_panel=_WHOM)
    ] = "",
    spawn: Annotated[
        str | None,
        typer.Option(metavar="FLAGS", help="Start `twostroke up FLAGS` and measure that.", rich_help_panel=_WHOM),
    ] = None,
    wait: Wait = 120.0,
    *,
    flags: Flags,
) -> None:
    """Measure one server."""
    from twostroke_cli.bench.targets import spawned, with_url

    if url and spawn is not None:
        raise CommandError("--url names a server and --spawn starts one: give one of them")
    _measure([with_url(url or DEFAULT_URL) if spawn is None else spawned(spawn)], flags, 1, wait)


@app.command("compare")
@takes_flags(Flags)
def compare(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=URL", help="Servers; the first is what others are held to.")
    ] = None,
    spawn: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME:]FLAGS",
            help="Start `twostroke up FLAGS` for its turn; as often as you like.",
            rich_help_panel=_WHOM,
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="The targets take turns so many times.", rich_help_panel=_WHOM)
    ] = 3,
    wait: Wait = 120.0,
    *,
    flags: Flags,
) -> None:
    """Measure several servers with the same load, in turns, and say what the difference is worth."""
    from twostroke_cli.bench.targets import named_url, spawned

    found = [*map(named_url, targets or ()), *map(spawned, spawn or ())]
    if len(found) < 2:
        raise CommandError("nothing to compare: give at least two of NAME=URL and --spawn")
    _measure(found, flags, rounds, wait)


@app.command("report")
def report(
    file: Annotated[Path, typer.Argument(help="What `--json` wrote.")],
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="The report; FILE.html by default.")
    ] = None,
) -> None:
    """Show a result again, and write its report."""
    from twostroke_cli.bench.result import read_result

    _tell(read_result(file), html_file or file.with_suffix(".html"))


def _measure(targets: list[Target], flags: Flags, rounds: int, wait_s: float) -> None:
    from twostroke_cli.bench.benchmark import Benchmark
    from twostroke_cli.bench.result import write_result
    from twostroke_cli.bench.screen_table import Bar

    benchmark = Benchmark(targets, flags, rounds, wait_s)
    with Bar(not flags.no_progress) as bar:
        result = benchmark.run(bar)
    if flags.json_file is not None:
        write_result(result, flags.json_file)
    _tell(result, flags.html_file)
    if not any(summary.answered for summary in result.summaries):
        raise CommandError("no request was answered")


def _tell(result: Result, html_file: Path | None) -> None:
    from twostroke_cli.bench.report import write_report
    from twostroke_cli.bench.screen_table import show

    show(result)
    if html_file is not None:
        write_report(result, html_file)
        print(f"report: {html_file}")
