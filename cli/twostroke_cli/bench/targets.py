"""Who is measured: servers that run already, by URL, and clusters that the benchmark starts for its time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from twostroke_cli.bench.servers import our_server, running
from twostroke_cli.errors import CommandError

OPENAI_KEY_VARIABLE = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Target:
    """A server by its name: one at `url`, or `twostroke up` with `flags`."""

    name: str
    url: str = ""
    flags: str = ""


@dataclass(frozen=True)
class Access:
    """What a client needs to be let in."""

    key_variable: str
    """The environment variable with the key; empty: none is sent."""

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a request."""
        key = os.environ.get(self.key_variable, "") if self.key_variable else ""
        return {"Authorization": f"Bearer {key}"} if key else {}


def access_by(variable: str) -> Access:
    """The key in `variable`, else the one that OpenAI's own client takes."""
    found = next((name for name in (variable, OPENAI_KEY_VARIABLE) if name and os.environ.get(name)), "")
    return Access(found)


def with_url(text: str, name: str = "") -> Target:
    """A running server; `/v1` is added where the URL has no path.

    Raises:
        CommandError: it is no URL of HTTP.
    """
    where = urlsplit(text)
    try:
        is_url = where.scheme in ("http", "https") and bool(where.hostname) and where.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise CommandError(f"{text}: expected a URL such as http://127.0.0.1:8000")
    path = where.path.rstrip("/") or "/v1"
    return Target(name or where.netloc.rpartition("@")[2], f"{where.scheme}://{where.netloc}{path}")


def named_url(text: str) -> Target:
    """`NAME=URL`; `CommandError` if it is something else."""
    name, equals, url = text.partition("=")
    if not equals or not name or "/" in name:
        raise CommandError(f"{text}: expected NAME=URL")
    return with_url(url, name)


def spawned(text: str) -> Target:
    """Flags of `twostroke up`, with `NAME:` before them or named by themselves."""
    name, colon, flags = text.partition(":")
    if colon and name.strip() and "-" not in name and " " not in name:
        return Target(name, flags=flags.strip())
    return Target(text.strip() or "default", flags=text.strip())


def check_names(targets: Sequence[Target]) -> None:
    """`CommandError` where two targets have one name."""
    names = [target.name for target in targets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise CommandError(f"two targets are named {twice[0]}")


@contextmanager
def serving(target: Target, wait_s: float) -> Iterator[str]:
    """The target's URL, up to and with `/v1`, for as long as the body runs."""
    if target.url:
        yield target.url
        return
    folder = Path(tempfile.mkdtemp(prefix="twostroke-bench-"))
    try:
        with running(our_server(target.flags, folder), wait_s) as server:
            yield server.url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def model_at(url: str, access: Access, wanted: str) -> str:
    """The model to ask for: `wanted`, else the first that the server lists.

    Raises:
        CommandError: the server does not answer, or lists none.
    """
    if wanted:
        return wanted
    try:
        response = httpx.get(f"{url}/models", headers=access.headers, timeout=30, trust_env=False)
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise CommandError(f"{url}/models: status {error.response.status_code}; name a model with --model") from None
    except httpx.HTTPError as error:
        raise CommandError(f"{url}: {error or type(error).__name__}") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise CommandError(f"{url}/models: lists no model; name one with --model") from None
