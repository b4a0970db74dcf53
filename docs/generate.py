"""`make docs`: docs/reference, made from the code, and the list of ADRs. A test compares the committed files."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from prometheus_client import CollectorRegistry
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from twostroke_chassis.settings import ENV_PREFIX, ServiceSettings, flag_of
from twostroke_chassis.telemetry import RouterMetrics, WorkerMetrics
from twostroke_cli.__main__ import app
from twostroke_router.openapi import openapi_document
from twostroke_router.settings import RouterSettings
from twostroke_worker.settings import WorkerSettings

FOLDER = Path(__file__).parent
HEAD = "<!-- Made from the code by `make docs`: change the code, not this file. -->\n"

SERVICES: tuple[tuple[str, type[ServiceSettings], str], ...] = (
    ("Every service", ServiceSettings, "The router and both kinds of workers take these."),
    ("Router", RouterSettings, "`python -m twostroke_router`"),
    ("Workers", WorkerSettings, "`python -m twostroke_prefill` and `python -m twostroke_decode`"),
)

VARIABLES = {
    "TWOSTROKE_API_KEY": "the key that the `twostroke` command sends to a router",
    "TWOSTROKE_HOME": "where fetched models are kept; `~/.cache/twostroke` otherwise",
    "POD_IP": "the address that a service tells its peers when it listens on 0.0.0.0; the host's own otherwise",
    "HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE": "as for huggingface_hub: where models of the hub come from",
    "OTEL_*": "OpenTelemetry's own, beside `--otlp-endpoint`; see [observability](../observability.md)",
    "TRITON_CACHE_DIR": "where compiled GPU kernels are kept; `~/.triton/cache` otherwise",
    "TORCH_INDEX": "`make setup`: the index that PyTorch comes from; `pypi` is pip's own",
    "PYTHON": "`make setup`: the interpreter that `.venv` is made with",
}
"""What is read from the environment and has no flag."""

METRICS = """\
What routers and workers serve at `/metrics`, by name as Prometheus sees it. Histograms have `_bucket`, `_sum` and
`_count`. [Observability](../observability.md) says what the stages mean,
[operations](../operations.md) what to watch."""

DECISIONS = "One page each: what was to be decided, what was, and what follows. A change of design is a new one."


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(text) for text in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _code(value: object) -> str:
    return "" if value is None or value is False or value == "" else f"`{value}`"


# ---- the command line ------------------------------------------------------------------------------------------------


def cli_reference() -> str:
    """Every command with its arguments and options."""
    root = typer.main.get_command(app)
    return f"{HEAD}\n# The `twostroke` command\n" + "".join(_commands(root, "twostroke"))


def _commands(command: Any, path: str) -> Iterator[str]:
    for name, each in sorted(getattr(command, "commands", {}).items()):
        if not each.hidden:
            yield from (_command(each, f"{path} {name}"), *_commands(each, f"{path} {name}"))


def _command(command: Any, path: str) -> str:
    arguments = " ".join(_usage(each) for each in command.params if each.param_type_name == "argument")
    usage = f"{path} {arguments}".strip()
    rows = (_parameter(each) for each in command.params if each.name != "help")
    text = f"\n## `{usage}`\n\n{inspect.cleandoc(command.help or '')}\n"
    return f"{text}\n{table(('option', 'default', 'meaning'), rows)}" if command.params else text


def _usage(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required or name.startswith("[") else f"[{name}]"


def _parameter(each: Any) -> tuple[str, str, str]:
    if each.param_type_name == "argument":
        return _code(each.metavar or each.name.upper()), _default(each), each.help or ""
    names = " / ".join([*each.opts, *each.secondary_opts])
    shown = names if each.is_flag else f"{names} {each.metavar or each.name.upper()}"
    return _code(shown), _default(each), each.help or ""


def _default(each: Any) -> str:
    return "required" if each.required else _code(None if callable(each.default) else each.default)


# ---- settings --------------------------------------------------------------------------------------------------------


def settings_reference() -> str:
    """Every flag of every service."""
    text = (
        f"{HEAD}\n# Settings of the services\n\n"
        "A flag counts before the environment, the environment before the default. `twostroke up` passes the flags on "
        "that it has itself ([the command line](cli.md)); the others reach the services by the environment.\n"
    )
    inherited: set[str] = set()
    for title, kind, intro in SERVICES:
        fields = {name: field for name, field in kind.model_fields.items() if name not in inherited}
        rows = (_setting(name, field) for name, field in fields.items())
        text += f"\n## {title}\n\n{intro}\n\n{table(('flag', 'environment', 'default', 'meaning'), rows)}"
        inherited |= set(fields) if kind is ServiceSettings else set()
    variables = ((", ".join(map(_code, name.split(", "))), meaning) for name, meaning in VARIABLES.items())
    return f"{text}\n## The environment alone\n\n{table(('variable', 'meaning'), variables)}"


def _setting(name: str, field: FieldInfo) -> tuple[str, str, str, str]:
    flag = flag_of(name)
    if field.annotation is bool:
        flag = f"{flag} / --no-{flag.removeprefix('--')}"
    choices = "|".join(map(str, _choices(field.annotation)))
    required = field.default is PydanticUndefined
    default = (
        "required" if required else _code(str(field.default).lower() if field.annotation is bool else field.default)
    )
    return _code(f"{flag} {choices}".strip()), _code(ENV_PREFIX + name.upper()), default, field.description or ""


def _choices(annotation: Any) -> tuple[Any, ...]:
    """The values of a Literal, optional or not."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for each in get_args(annotation) for choice in _choices(each))


# ---- metrics ---------------------------------------------------------------------------------------------------------


def metrics_reference() -> str:
    """Every metric of a router and of a worker."""
    worker = WorkerMetrics("decode-0", "decode", "")
    found: dict[str, tuple[str, ...]] = {}
    for source, registry in (("router", RouterMetrics().registry), ("worker", worker.registry)):
        for name, *facts in _metrics(registry):
            sources = f"{found[name][3]}, {source}" if name in found else source
            found[name] = (*facts, sources)
    rows = ((_code(name), kind, labels, sources, text) for name, (kind, labels, text, sources) in sorted(found.items()))
    return f"{HEAD}\n# Metrics\n\n{METRICS}\n\n{table(('metric', 'type', 'labels', 'from', 'meaning'), rows)}"


def _metrics(registry: CollectorRegistry) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, labels and meaning of each family."""
    # A family without a series says its labels only by private names: of a wrapper, or of a collector's family.
    for collector in registry._collector_to_names:
        named = {collector._name: collector} if hasattr(collector, "_name") else {}
        for family in getattr(collector, "describe", collector.collect)():
            labels = getattr(named.get(family.name, family), "_labelnames", ())
            name = f"{family.name}_total" if family.type == "counter" else family.name
            yield name, family.type, ", ".join(_code(label) for label in labels), family.documentation


# ---- decisions -------------------------------------------------------------------------------------------------------


def decisions() -> str:
    """The ADRs by their titles."""
    pages = [(path, path.read_text().partition("\n")[0]) for path in sorted((FOLDER / "adr").glob("[0-9]*.md"))]
    lines = (f"- [{path.name[:4]}]({path.name}): {title.partition('. ')[2]}\n" for path, title in pages)
    return f"{HEAD}\n# Decisions\n\n{DECISIONS}\n\n{''.join(lines)}"


# ---- all of it -------------------------------------------------------------------------------------------------------


def references() -> dict[str, str]:
    """Every generated file's name and text."""
    return {
        "adr/README.md": decisions(),
        "reference/cli.md": cli_reference(),
        "reference/settings.md": settings_reference(),
        "reference/metrics.md": metrics_reference(),
        "reference/openapi.json": json.dumps(openapi_document(), indent=1, ensure_ascii=False) + "\n",
    }


def main() -> int:
    """Writes what has changed, and names it."""
    for name, text in references().items():
        path = FOLDER / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            sys.stdout.write(f"docs/{name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
