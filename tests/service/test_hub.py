"""`--model ORG/NAME` against a server that speaks the hub's protocol: what is fetched, pinned, refused."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"raise SystemExit",
}


class _Hub(BaseHTTPRequestHandler):
    """One public model, ours/tiny, with one commit, tagged v1."""

    asked: list[str]
    tokens: set[str]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        self.asked.append(self.path)
        self.tokens.add(self.headers.get("Authorization", ""))
        path = self.path.partition("?")[0]
        if path in (
            "/api/models/ours/tiny",
            *(f"/api/models/ours/tiny/revision/{name}" for name in ("v1", "main", COMMIT)),
        ):
            siblings = [{"rfilename": name} for name in FILES]
            return self._send(json.dumps({"id": "ours/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        if path.startswith("/api/models/ours/tiny/tree/"):
            tree = [{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in FILES.items()]
            return self._send(json.dumps(tree).encode())
        name = path.rpartition("/")[2]
        if path.startswith("/ours/tiny/resolve/") and name in FILES:
            return self._send(FILES[name], {"ETag": f'"{_etag(FILES[name])}"', "X-Repo-Commit": COMMIT})
        code = "RevisionNotFound" if "ours/tiny" in path else "RepoNotFound"
        self._send(b'{"error": "not found"}', {"X-Error-Code": code, "X-Error-Message": "not found"}, status=404)

    def _send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub() -> Iterator[tuple[str, type[_Hub]]]:
    handler = type("Hub", (_Hub,), {"asked": [], "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


def resolve(model: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`resolve_model` in a process of its own: huggingface_hub reads its environment once."""
    script = f"""
import sys
from twostroke_cli.errors import CommandError
from twostroke_cli.models import resolve_model
try:
    found = resolve_model({model!r}, lambda text: print(text, file=sys.stderr))
except CommandError as error:
    sys.exit(str(error))
print(found.dir, found.name)
"""
    return run(["-c", script], home, **env)


def run(argv: list[str], home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value for name, value in os.environ.items() if "proxy" not in name.lower() and not name.startswith("HF_")
    }
    env = {**clean, "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path), **env}
    return subprocess.run([sys.executable, *argv], env=env, capture_output=True, text=True, timeout=60, check=False)


def fetch(revision: str, folder: Path, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    """What an init container runs, with nothing but the target's parent to write into."""
    argv = ["-m", "twostroke_cli.fetch", "--repository", "ours/tiny", "--revision", revision, "--dir", str(folder)]
    return run([*argv, *flags], folder.parent / "home", **{"HF_ENDPOINT": "http://127.0.0.1:9", **env})


def test_a_snapshot_holds_no_code_and_is_pinned(hub: tuple[str, type[_Hub]], tmp_path: Path) -> None:
    url, seen = hub
    done = resolve("ours/tiny@v1", tmp_path, HF_ENDPOINT=url, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    folder, name = done.stdout.split()
    assert name == "ours/tiny"
    assert Path(folder).name == COMMIT
    assert sorted(path.name for path in Path(folder).iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert not [path for path in seen.asked if "pytorch_model" in path or "evil" in path]
    assert "Bearer hf_secret" in seen.tokens
    offline = resolve("ours/tiny@v1", tmp_path, HF_ENDPOINT=url, HF_HUB_OFFLINE="1")
    assert offline.stdout == done.stdout


def test_without_a_revision_the_one_found_is_named(hub: tuple[str, type[_Hub]], tmp_path: Path) -> None:
    done = resolve("ours/tiny", tmp_path, HF_ENDPOINT=hub[0])
    assert done.returncode == 0, done.stderr
    assert f"pin it with ours/tiny@{COMMIT}" in done.stderr


def test_what_cannot_be_had_is_one_line(hub: tuple[str, type[_Hub]], tmp_path: Path) -> None:
    cases = {
        "ours/other": {"HF_ENDPOINT": hub[0]},
        "ours/tiny@v9": {"HF_ENDPOINT": hub[0]},
        "ours/gone": {"HF_ENDPOINT": "http://127.0.0.1:9"},
        "ours/offline": {"HF_ENDPOINT": hub[0], "HF_HUB_OFFLINE": "1"},
    }
    for model, env in cases.items():
        done = resolve(model, tmp_path, **env)
        assert done.returncode == 1, done.stdout
        *_, last = done.stderr.strip().splitlines()
        assert last.startswith(f"--model {model}: "), done.stderr
        assert "Traceback" not in done.stderr


def test_a_fetched_folder_is_whole_and_is_not_fetched_again(hub: tuple[str, type[_Hub]], tmp_path: Path) -> None:
    url, seen = hub
    folder = tmp_path / "models" / "tiny"
    done = fetch("v1", folder, HF_ENDPOINT=url, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert not [path for path in seen.asked if "pytorch_model" in path or "evil" in path]
    assert "Bearer hf_secret" in seen.tokens
    again = fetch("v1", folder, HF_HUB_OFFLINE="1")
    assert (again.returncode, again.stdout) == (0, f"ours/tiny@v1 was already in {folder}\n"), again.stderr


def test_a_router_fetches_no_weights(hub: tuple[str, type[_Hub]], tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    done = fetch(COMMIT, folder, "--without-weights", HF_ENDPOINT=hub[0])
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "tokenizer.json"]
    worker = fetch(COMMIT, folder, HF_HUB_OFFLINE="1")
    assert worker.returncode == 1
    assert "no *.safetensors" in worker.stderr


def test_two_that_fetch_at_once_fetch_once(hub: tuple[str, type[_Hub]], tmp_path: Path) -> None:
    url, seen = hub
    folder = tmp_path / "models" / "tiny"
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: fetch("v1", folder, HF_ENDPOINT=url), range(2)))
    assert [done.returncode for done in both] == [0, 0], both
    assert sorted(done.stdout.split()[1] for done in both) == ["is", "was"]
    assert sum("model.safetensors" in path for path in seen.asked) <= 2, "one HEAD, one GET"


def test_what_cannot_be_fetched_is_one_line_and_leaves_no_folder(hub: tuple[str, type[_Hub]], tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    for revision, env in {"v9": {"HF_ENDPOINT": hub[0]}, "v1": {}, "main": {"HF_HUB_OFFLINE": "1"}}.items():
        done = fetch(revision, folder, **env)
        assert done.returncode == 1, done.stdout
        *_, last = done.stderr.strip().splitlines()
        assert last.startswith(f"twostroke-fetch: model ours/tiny@{revision}: "), done.stderr
        assert "Traceback" not in done.stderr
        assert not folder.exists()
