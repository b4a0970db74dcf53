"""`twostroke support-bundle`: what someone else needs to see what a cluster is doing, in one file, without its secrets.

Taken are versions, cluster.json, the ends of the logs, and the router's `/cluster`, `/metrics` and `/requests`. Not
taken are prompts and answers (nothing records them), environment variables, key files and command lines. What looks
like a secret all the same is blacked out: see `redacted`.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import re
import tarfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from twostroke_cli.client import RouterClient
from twostroke_cli.errors import CommandError
from twostroke_cli.supervisor import CLUSTER_FILE

LOG_TAIL_BYTES = 1 << 20
NUM_REQUESTS = 1_000
PACKAGES = ("twostroke", "torch", "triton", "grpcio", "protobuf", "redis", "etcd3aio", "tokenizers", "transformers")
SECRET = "***"
_NAMED = re.compile(
    r"""(?ix) (?P<name> ["']? [\w.-]*
    (?: api[-_]?key | access[-_]?key | private[-_]?key | secret | passw(?:or)?d | authorization | credentials?
      | (?<!first_)(?<!second_)(?<!output_)token(?!s|iz|_) )
    (?: [-_.]\w+ )? ["']? \s* [:=] \s* )
    (?P<value> (?: (?: bearer | basic ) \s+ )? (?: "[^"]*" | '[^']*' | [^\s,;}'"]+ ) )"""
)
_BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{4,}")
_URL = re.compile(r"(?<=://)[^/@\s\"']*@")
_KNOWN = re.compile(r"\b(?:hf_|sk-|ghp_|gho_|xox[abp]-|AKIA)[A-Za-z0-9_-]{8,}")
_SECRET_VARIABLE = re.compile(r"(?i)key|token|secret|passw|credential|auth")


def redacted(text: str, also: tuple[str, ...] = ()) -> str:
    """The text without values of fields named like secrets, bearer tokens, passwords in URLs, and `also`."""
    for value in also:
        text = text.replace(value, SECRET)
    text = _NAMED.sub(lambda match: match["name"] + _like(match["value"]), text)
    text = _BEARER.sub(lambda match: f"{match[1]} {SECRET}", text)
    return _KNOWN.sub(SECRET, _URL.sub(f"{SECRET}@", text))


def _like(value: str) -> str:
    """A secret's stand-in, in its quotes: JSON stays JSON."""
    quote = value[0] if value[0] in "\"'" else ""
    return f"{quote}{SECRET}{quote}"


async def write_bundle(http: str, run_dir: Path, target: Path) -> list[str]:
    """Writes the file; returns the names in it. What a cluster that does not answer leaves out is named there.

    Raises:
        CommandError: the file cannot be written.
    """
    also = secret_values()
    parts = [*_local_parts(run_dir), *[part async for part in _router_parts(http)]]
    try:
        with tarfile.open(target, "w:gz") as archive:
            for name, text in parts:
                _add(archive, name, redacted(text, also))
    except OSError as error:
        raise CommandError(f"cannot write {target}: {error.strerror or error}") from None
    return [name for name, _ in parts]


def secret_values() -> tuple[str, ...]:
    """Values of this process's variables that are named like secrets: a log may quote them in any form."""
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name) and len(value) >= 8}
    return tuple(sorted(values, key=len, reverse=True))


def _local_parts(run_dir: Path) -> Iterator[tuple[str, str]]:
    yield "versions.json", json.dumps(_versions(), indent=1)
    cluster = run_dir / CLUSTER_FILE
    yield CLUSTER_FILE, _read(cluster)
    for log in sorted((run_dir / "logs").glob("*.log")):
        yield f"logs/{log.name}", _read(log)


async def _router_parts(http: str) -> AsyncIterator[tuple[str, str]]:
    client = RouterClient(http)
    for name, path in (
        ("cluster.json", "/cluster"),
        ("metrics.txt", "/metrics"),
        ("requests.json", f"/requests?limit={NUM_REQUESTS}"),
    ):
        try:
            yield f"router/{name}", await client.text(path)
        except CommandError as error:
            yield f"router/{name}.missing", str(error)


def _versions() -> dict[str, object]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "taken_unix_s": round(time.time()),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "packages": found,
    }


def _read(path: Path) -> str:
    """The end of a file, from the beginning of a line; why not, if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError as error:
        return f"cannot read {path.name}: {error.strerror or error}\n"
    return text.partition("\n")[2] if size > LOG_TAIL_BYTES else text


def _add(archive: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode()
    entry = tarfile.TarInfo(f"twostroke-support/{name}")
    entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
    archive.addfile(entry, io.BytesIO(data))
