"""What happens before anything is installed: an interpreter is found, or one line says what is missing."""

from __future__ import annotations

import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKS = f'#!/bin/sh\ncase "$*" in *bootstrap.py*) echo "bootstrap by $0";; *) exec {sys.executable} "$@";; esac\n'
FAILS = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"
NO_VENV = f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac\n'
OLD = f'#!/bin/sh\ncase "$*" in *version_info*) exit 1;; *) exec {sys.executable} "$@";; esac\n'


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("twostroke_bootstrap", ROOT / "deploy" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_setup(tmp_path: Path, pythons: dict[str, str], **env: str) -> subprocess.CompletedProcess[str]:
    """setup.sh in a tree without .venv, on a PATH that holds these interpreters alone."""
    (tmp_path / "tree" / "deploy").mkdir(parents=True)
    shutil.copy(ROOT / "deploy" / "setup.sh", tmp_path / "tree" / "deploy")
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "dirname"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    for name, script in pythons.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    return subprocess.run(
        [tmp_path / "bin" / "sh", tmp_path / "tree" / "deploy" / "setup.sh"],
        env={"PATH": str(tmp_path / "bin"), **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_the_first_interpreter_that_really_runs_is_taken(tmp_path: Path) -> None:
    done = run_setup(tmp_path, {"python3": FAILS, "python3.12": OLD, "python3.13": WORKS, "python3.11": WORKS})
    assert done.returncode == 0
    assert done.stdout == f"bootstrap by {tmp_path / 'bin' / 'python3.13'}\n"
    assert done.stderr == ""


def test_python_names_another(tmp_path: Path) -> None:
    mine = tmp_path / "my python"
    mine.write_text(WORKS)
    mine.chmod(0o755)
    assert run_setup(tmp_path, {"python3": WORKS}, PYTHON=str(mine)).stdout == f"bootstrap by {mine}\n"


@pytest.mark.parametrize(
    ("pythons", "env", "said"),
    [
        ({}, {}, "no working Python 3.11, 3.12 or 3.13 found"),
        ({"python3": FAILS, "python3.12": OLD}, {}, "no working Python 3.11, 3.12 or 3.13 found"),
        ({"python3": NO_VENV}, {}, "python3 lacks the venv module"),
        ({"python3": WORKS}, {"PYTHON": "/nowhere/python3.12"}, "PYTHON=/nowhere/python3.12 is not a working Python"),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    pythons: dict[str, str], env: dict[str, str], said: str, tmp_path: Path
) -> None:
    done = run_setup(tmp_path, pythons, **env)
    assert done.returncode == 1
    assert done.stderr.startswith("setup: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path) -> Iterator[str]:
    """A package index with one torch wheel for each of two interpreters."""
    (tmp_path / "torch").mkdir()
    names = [f"torch-2.13.0%2Bcpu-cp{tag}-cp{tag}-manylinux_2_28_{os.uname().machine}.whl" for tag in (_tag(), "27")]
    links = "".join(f'<a href="/torch/{name}#sha256=00">{name}</a>' for name in names)
    (tmp_path / "torch" / "index.html").write_text(f"<html>{links}</html>")
    (tmp_path / "torch" / names[0].replace("%2B", "+")).write_bytes(b"x" * 1234)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def _tag() -> str:
    return f"{sys.version_info[0]}{sys.version_info[1]}"


def test_the_size_of_torch_is_known_before_it_is_downloaded(
    bootstrap: ModuleType, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    answers, url = bootstrap.wheel_on_index(index, "2.13.0")
    assert answers
    assert f"cp{_tag()}" in url
    assert bootstrap.head_bytes(url) == 1234
    assert bootstrap.wheel_on_index(index, "9.9.9") == (True, "")
    assert bootstrap.wheel_on_index("http://127.0.0.1:9", "2.13.0") == (False, "")


def test_the_constraints_pin_torch_and_everything_in_pyproject(bootstrap: ModuleType) -> None:
    assert bootstrap.pinned_torch().startswith("torch==2.")
    pinned = {
        re.split(r"[=;\s]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {
        re.split(r"[\[<>=;\s]", requirement)[0].lower().replace("_", "-")
        for extra, requirements in extras.items()
        if extra != "gpu"
        for requirement in requirements
    }
    assert wanted - pinned == {"twostroke"}


def test_the_stamp_changes_with_what_it_stands_for(bootstrap: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = bootstrap.digest([tmp_path / "a"])
    assert bootstrap.digest([tmp_path / "a"]) == before
    (tmp_path / "a").write_text("2")
    assert bootstrap.digest([tmp_path / "a"]) != before
