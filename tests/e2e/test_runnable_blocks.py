"""What the documents tell a reader to run does run, and what the OpenAPI document says of answers is so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from twostroke_router import openapi_answers as answers

from tests.support.cluster import Cluster
from tests.support.documents import ROOT, Block, blocks, documents

pytestmark = pytest.mark.e2e

RUNNABLE = [block for path in documents() for block in blocks(path) if block.is_runnable and "zh-CN" not in path.name]
SHELL = {"sh": "sh", "bash": "bash"}
ASKING = re.compile(r"\.venv/bin/twostroke (ask|chat|status|explain|support-bundle)\b")


def as_run_here(block: Block, cluster: Cluster) -> str:
    """A block with this cluster's addresses instead of the default ones."""
    text = ASKING.sub(rf".venv/bin/twostroke \1 --http {cluster.http}", block.text)
    return text.replace("127.0.0.1:8000", cluster.http).replace("127.0.0.1:8001", cluster.grpc)


@pytest.fixture
def checkout(cluster: Cluster, tmp_path: Path) -> Path:
    """A folder that looks like the reader's: the tree's files, `.venv`, and the run directory of this cluster."""
    for path in ROOT.iterdir():
        if path.name != ".run":
            (tmp_path / path.name).symlink_to(path)
    if not (tmp_path / ".venv").exists():
        (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    if cluster.run_dir is not None:
        (tmp_path / ".run").symlink_to(cluster.run_dir)
    return tmp_path


def test_there_are_blocks_to_run() -> None:
    named = {str(block.document.relative_to(ROOT)) for block in RUNNABLE}
    assert {"README.md", "docs/quick-start.md", "docs/api.md"} <= named
    assert {block.language for block in RUNNABLE} <= {*SHELL, "python"}


@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: block.name)
def test_a_block_runs(block: Block, cluster: Cluster, checkout: Path) -> None:
    text = as_run_here(block, cluster)
    command = [SHELL[block.language], "-euc", text] if block.language in SHELL else [sys.executable, "-c", text]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        cwd=checkout,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
        env={**os.environ, "PATH": path, "COLUMNS": "100", "NO_PROXY": "127.0.0.1"},
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}"
    assert [text for text in block.shows if text not in done.stdout] == [], done.stdout


def test_node_over_grpc(cluster: Cluster, tmp_path: Path) -> None:
    """The example of examples/node, with the versions that its lock file names."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        pytest.skip("Node.js is not on this machine")
    example = tmp_path / "examples" / "node"
    shutil.copytree(ROOT / "examples" / "node", example, ignore=shutil.ignore_patterns("node_modules"))
    (tmp_path / "proto").symlink_to(ROOT / "proto")
    install = [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--silent"]
    installed = subprocess.run(install, cwd=example, capture_output=True, text=True, timeout=90, check=False)
    if installed.returncode and re.search(r"ENOTFOUND|ECONNREFUSED|ETIMEDOUT|EAI_AGAIN", installed.stderr):
        pytest.skip("the npm registry is out of reach")
    assert installed.returncode == 0, installed.stderr
    question = [node, str(example / "generate.mjs"), cluster.grpc, "What is the capital of France?"]
    done = subprocess.run(question, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert re.search(r"\(\d+ tokens in, \d+ out\)", done.stdout)


# ---- what the OpenAPI document says of answers -----------------------------------------------------------------------

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
COMPLETION: dict[str, Any] = {"prompt": "Hello", "max_tokens": 4}
EXPLAIN = {"x-twostroke-explain": "1"}


def post(cluster: Cluster, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(cluster.url + path, json=body, headers=EXPLAIN, timeout=60, trust_env=False)


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/v1/chat/completions", CHAT, answers.ChatCompletion),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "n": 2}, answers.ChatCompletion),
        ("/v1/completions", {**COMPLETION, "logprobs": 2}, answers.Completion),
        ("/tokenize", {"prompt": "Hello"}, answers.Tokenized),
        ("/detokenize", {"tokens": [5, 6]}, answers.Detokenized),
        ("/v1/completions", {**COMPLETION, "no_such_field": 1}, answers.ErrorBody),
    ],
)
def test_answers_have_their_schema(cluster: Cluster, path: str, body: dict[str, Any], kind: type) -> None:
    answer = post(cluster, path, body)
    assert answer.status_code == (400 if kind is answers.ErrorBody else 200), answer.text
    msgspec.json.decode(answer.content, type=kind)


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/v1/chat/completions", CHAT, answers.ChatCompletionChunk),
        ("/v1/completions", {**COMPLETION, "logprobs": 1}, answers.Completion),
    ],
)
def test_events_have_their_schema(cluster: Cluster, path: str, body: dict[str, Any], kind: type) -> None:
    stream = post(cluster, path, {**body, "stream": True, "stream_options": {"include_usage": True}}).text
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    assert len(events) >= 2
    for event in events:
        msgspec.json.decode(event, type=kind)


def test_what_a_router_tells_has_its_schema(cluster: Cluster) -> None:
    for path, kind in [
        ("/v1/models", answers.ModelList),
        ("/cluster", answers.ClusterState),
        ("/health", answers.Health),
        ("/ready", answers.Readiness),
        ("/requests?limit=5", answers.ExplanationList),
    ]:
        msgspec.json.decode(cluster.get(path).content, type=kind)
    served = cluster.get("/v1/models").json()["data"][0]["id"]
    msgspec.json.decode(cluster.get(f"/v1/models/{served}").content, type=answers.ModelCard)


def test_every_documented_path_is_served(cluster: Cluster) -> None:
    document = cluster.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    for path, operations in document["paths"].items():
        for method in operations:
            answer = httpx.request(method, cluster.url + re.sub(r"{\w+}", "none", path), timeout=10, trust_env=False)
            code = answer.json()["error"]["code"] if answer.status_code >= 400 else None
            assert code not in {"unknown_url", "method_not_allowed", "internal_error"}, (method, path)
