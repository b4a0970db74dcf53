"""The raw JSON file of `twostroke bench`: what was asked for, every outcome, and what follows from them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import msgspec

from twostroke_cli.bench.comparison import Comparison
from twostroke_cli.bench.figures import Summary
from twostroke_cli.bench.job import Job
from twostroke_cli.bench.outcome import Run
from twostroke_cli.bench.waterfall import Waterfall
from twostroke_cli.errors import CommandError


class Measured(msgspec.Struct, frozen=True):
    """One server that was asked."""

    name: str
    url: str
    model: str
    flags: str = ""
    """Of `twostroke up`, where the benchmark started it."""


class Result(msgspec.Struct, kw_only=True):
    """The whole file."""

    schema: Literal["twostroke-bench/1"] = "twostroke-bench/1"
    written_unix_s: float
    client: dict[str, str]
    """Versions and machine of the client."""
    load: str
    """The load in words."""
    job: Job
    """The workload; `url` and `form.model` are those of the first target."""
    warm_up: int
    processes: int
    targets: list[Measured]
    summaries: list[Summary]
    comparisons: list[Comparison] = []
    waterfalls: dict[str, list[Waterfall]] = {}
    """By target, where `--explain` was asked for and the server is a Twostroke router."""
    runs: list[Run]


def client_facts() -> dict[str, str]:
    """Where the load came from."""
    try:
        own = version("twostroke")
    except PackageNotFoundError:
        own = "unknown"
    return {
        "version": f"twostroke {own}, Python {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def write_result(result: Result, path: Path) -> None:
    """Writes the file; `CommandError` where that cannot be."""
    write_file(path, "--json", msgspec.json.format(msgspec.json.encode(result), indent=0) + b"\n")


def write_file(path: Path, flag: str, content: bytes) -> None:
    """Writes a file that a flag named; `CommandError` where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise CommandError(f"{flag} {path}: {error.strerror or error}") from None


def read_result(path: Path) -> Result:
    """A file that `write_result` wrote; `CommandError` where it is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Result)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from None
    except msgspec.DecodeError as error:
        raise CommandError(f"{path}: not a result of `twostroke bench`: {error}") from None


def schema() -> dict[str, Any]:
    """The file's JSON schema."""
    return msgspec.json.schema(Result)
