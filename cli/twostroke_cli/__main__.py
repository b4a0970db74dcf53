"""The `twostroke` command. Each command imports what it needs when it runs: help and errors come at once."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twostroke_cli import options as opt
from twostroke_cli.errors import CommandError

if TYPE_CHECKING:
    from twostroke_cli.plan import ClusterPlan

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_HTTP = "127.0.0.1:8000"
DEFAULT_GRPC = "127.0.0.1:8001"
DEFAULT_QUESTION = "What is the capital of France?"

app = typer.Typer(
    name="twostroke",
    help="LLM inference in two strokes: prefill and decode on separate pools of workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def up(  # noqa: PLR0913 - a command's arguments are its flags
    model: opt.Model = DEFAULT_MODEL,
    prefill: opt.Prefill = 1,
    decode: opt.Decode = 1,
    http: opt.Http = DEFAULT_HTTP,
    grpc: opt.Grpc = DEFAULT_GRPC,
    run_dir: opt.RunDirectory = Path(".run"),
    etcd: opt.Etcd = "",
    redis: opt.Redis = "",
    cluster: opt.Cluster = "default",
    wait: opt.Wait = 60.0,
    grace: opt.Grace = 30.0,
    no_restart: opt.NoRestart = False,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "bfloat16",
    threads: opt.Threads = 0,
    load_format: opt.LoadFormat = "safetensors",
    block_size: opt.BlockSize = None,
    num_blocks: opt.NumBlocks = None,
    kv_cache_bytes: opt.KVCacheBytes = None,
    gpu_memory_fraction: opt.GpuMemoryFraction = None,
    max_model_len: opt.MaxModelLen = None,
    max_step_tokens: opt.MaxStepTokens = None,
    max_running: opt.MaxRunning = None,
    batch_invariant: opt.BatchInvariant = False,
    channels: opt.Channels = "",
    transfer_layers: opt.TransferLayers = None,
    transfer_dtype: opt.TransferDtype = None,
    transfer_timeout_s: opt.TransferTimeout = None,
    api_keys_file: opt.ApiKeys = None,
    max_body_bytes: opt.MaxBody = None,
    log_level: opt.LogLevel = "info",
) -> None:
    """Run a cluster on this machine: etcd, Redis, a router and workers, until Ctrl-C."""
    from twostroke_cli.models import resolve_model
    from twostroke_cli.plan import ClusterPlan
    from twostroke_cli.ports import claim

    worker: dict[str, Any] = {"device": device, "dtype": dtype, "load_format": load_format, "block_size": block_size}
    worker |= {"num_blocks": num_blocks, "kv_cache_bytes": kv_cache_bytes, "max_step_tokens": max_step_tokens}
    worker |= {"gpu_memory_fraction": gpu_memory_fraction, "max_model_len": max_model_len, "max_running": max_running}
    worker |= {"batch_invariant": batch_invariant, "channels": channels or None, "transfer_dtype": transfer_dtype}
    plan = ClusterPlan(
        model=resolve_model(model, typer.echo, needs_weights=load_format != "random"),
        http=claim(http, "--http"),
        grpc=claim(grpc, "--grpc"),
        run_dir=run_dir.resolve(),
        prefill=prefill,
        decode=decode,
        etcd=etcd,
        redis=redis,
        wait_s=wait,
        grace_s=grace,
        is_restarted=not no_restart,
        num_threads=threads,
        service_flags=flags(cluster=cluster, log_level=log_level),
        worker_flags=flags(**worker, transfer_layers=transfer_layers, transfer_timeout_s=transfer_timeout_s),
        router_flags=flags(api_keys_file=api_keys_file, max_body_bytes=max_body_bytes),
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


def given(**values: Any) -> dict[str, Any]:
    """Those that the user gave."""
    return {name: value for name, value in values.items() if value is not None}


def flags(**values: Any) -> tuple[str, ...]:
    """Settings as a service's command line takes them; None and False are left to the service."""
    return tuple(
        word
        for name, value in given(**values).items()
        if value is not False
        for word in (f"--{name.replace('_', '-')}", *(() if value is True else (str(value),)))
    )


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
