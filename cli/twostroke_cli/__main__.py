"""The `twostroke` command. Each command imports what it needs when it runs: help and errors come at once."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twostroke_cli import options as opt
from twostroke_cli.bench.commands import app as bench
from twostroke_cli.errors import CommandError
from twostroke_cli.flag_groups import takes_flags
from twostroke_cli.options import DEFAULT_GRPC, DEFAULT_HTTP, DEFAULT_MODEL
from twostroke_cli.replay.commands import replay
from twostroke_cli.up_flags import ROUTER_FLAGS, SERVICE_FLAGS, WORKER_FLAGS, UpFlags, passed_on

if TYPE_CHECKING:
    from twostroke_cli.plan import ClusterPlan

DEFAULT_QUESTION = "What is the capital of France?"

app = typer.Typer(
    name="twostroke",
    help="LLM inference in two strokes: prefill and decode on separate pools of workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")
app.command("replay")(replay)


@app.command()
@takes_flags(UpFlags)
def up(*, flags: UpFlags) -> None:
    """Run a cluster on this machine: etcd, Redis, a router and workers, until Ctrl-C."""
    from twostroke_cli.models import resolve_model
    from twostroke_cli.plan import ClusterPlan
    from twostroke_cli.ports import claim

    plan = ClusterPlan(
        model=resolve_model(flags.model, typer.echo, needs_weights=flags.load_format != "random"),
        http=claim(flags.http, "--http"),
        grpc=claim(flags.grpc, "--grpc"),
        run_dir=flags.run_dir.resolve(),
        prefill=flags.prefill,
        decode=flags.decode,
        etcd=flags.etcd,
        redis=flags.redis,
        wait_s=flags.wait,
        grace_s=flags.grace,
        is_restarted=not flags.no_restart,
        num_threads=flags.threads,
        service_flags=passed_on(flags, SERVICE_FLAGS),
        worker_flags=passed_on(flags, WORKER_FLAGS),
        router_flags=passed_on(flags, ROUTER_FLAGS),
    )
    _run_on_screen(plan)


def _run_on_screen(plan: ClusterPlan) -> None:
    from twostroke_cli.screen import Screen
    from twostroke_cli.up import run_cluster

    run_cluster(plan, Screen())


@app.command()
def demo(
    question: Annotated[str, typer.Argument(help="What to ask.")] = DEFAULT_QUESTION,
    model: opt.Model = DEFAULT_MODEL,
    prefill: opt.Prefill = 1,
    decode: opt.Decode = 1,
    http: opt.Http = DEFAULT_HTTP,
    grpc: opt.Grpc = DEFAULT_GRPC,
) -> None:
    """Start a cluster, ask it one question, show where the answer came from, stop it.

    An address that is taken is replaced by a free one.
    """
    import asyncio

    from twostroke_cli.demo import demo as run_demo
    from twostroke_cli.models import resolve_model
    from twostroke_cli.plan import ClusterPlan
    from twostroke_cli.ports import claim_or_any
    from twostroke_cli.screen import Screen

    plan = ClusterPlan(
        model=resolve_model(model, typer.echo),
        http=claim_or_any(http, "--http"),
        grpc=claim_or_any(grpc, "--grpc"),
        run_dir=Path(tempfile.mkdtemp(prefix="twostroke-demo-")),
        prefill=prefill,
        decode=decode,
    )
    asyncio.run(run_demo(plan, question, Screen()))


@app.command()
def pull(name: Annotated[str, typer.Argument(help="A known model.")] = DEFAULT_MODEL) -> None:
    """Fetch a known model and turn it into a HuggingFace folder, once."""
    from twostroke_cli.pull import pull as fetch

    typer.echo(fetch(name, lambda text: typer.echo(text, err=True)))


@app.command()
def chat(
    http: opt.Http = DEFAULT_HTTP,
    model: Annotated[str, typer.Option(metavar="NAME", help="Which model; the only one by default.")] = "",
    system: opt.System = "",
    temperature: opt.Temperature = None,
    max_tokens: opt.MaxTokens = None,
) -> None:
    """Talk to a running cluster."""
    from twostroke_cli.chat import chat as talk

    talk(http, model, system, given(temperature=temperature, max_tokens=max_tokens))


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    http: opt.Http = DEFAULT_HTTP,
    temperature: opt.Temperature = None,
    max_tokens: opt.MaxTokens = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show where each part of the answer ran.")] = False,
) -> None:
    """Ask a running cluster one question."""
    import asyncio

    from twostroke_cli.chat import ask as put_question
    from twostroke_cli.chat import print_explanation

    answer = asyncio.run(put_question(http, question, given(temperature=temperature, max_tokens=max_tokens)))
    if explain:
        print_explanation(answer)


@app.command()
def status(
    http: opt.Http = DEFAULT_HTTP,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
) -> None:
    """Show the workers of a running cluster and their load."""
    import asyncio

    from twostroke_cli.status import print_status, watch_status

    asyncio.run(watch_status(http) if watch else print_status(http, as_json))


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument(help="The X-Request-Id of an answer.")],
    http: opt.Http = DEFAULT_HTTP,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where the time of a request went: any router knows the last 10,000, or 15 minutes."""
    import asyncio

    from twostroke_cli.explain import print_explanation

    asyncio.run(print_explanation(http, request_id, as_json))


@app.command("support-bundle")
def support_bundle(
    file: Annotated[Path, typer.Argument(metavar="FILE.tar.gz", help="What to write.")],
    http: opt.Http = DEFAULT_HTTP,
    run_dir: opt.RunDirectory = Path(".run"),
) -> None:
    """Pack versions, configuration, logs, metrics and recent requests, without secrets, for someone to look at."""
    import asyncio

    from twostroke_cli.bundle import write_bundle

    names = asyncio.run(write_bundle(http, run_dir, file))
    typer.echo(f"{file}: " + ", ".join(names))


def given(**values: Any) -> dict[str, Any]:
    """Those that the user gave."""
    return {name: value for name, value in values.items() if value is not None}


def main() -> None:
    """Runs the command; an error that the user can mend is one line and status 1."""
    try:
        app()
    except CommandError as error:
        message = str(error)  # a service's own last words carry its name
        sys.exit(message if message.startswith("twostroke-") else f"twostroke: {message}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
