"""What is installed stands alone: the router without torch, the client without servers, models without scripts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution, built from the sources as pip builds it: with a build environment of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("proto", "kernels", "engine", "services", "cli"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*_pb2*"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-qq", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", folder, source], check=True)
    return next(folder.glob("twostroke-*.whl"))


def clean_venv(folder: Path, wheel: Path, extra: str) -> Path:
    """A virtual env that holds one extra; returns its interpreter."""
    base = getattr(sys, "_base_executable", sys.executable)
    subprocess.run([base, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, f"twostroke[{extra}] @ {wheel.as_uri()}"], check=True, cwd=folder)
    return python


def output(python: Path, *argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([python, *argv], capture_output=True, text=True, timeout=60, cwd=cwd, env=env, check=False)


def test_the_router_comes_without_torch(wheel: Path, tmp_path: Path) -> None:
    python = clean_venv(tmp_path, wheel, "router")
    listed = output(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).stdout.lower().splitlines()
    names = {line.partition("==")[0] for line in listed}
    assert "twostroke" in names
    assert not names & {"torch", "triton", "transformers"}
    assert not [name for name in names if name.startswith("nvidia")]
    shown = output(python, "-m", "twostroke_router", "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "--model-dir" in shown.stdout
    started = output(
        python,
        *("-m", "twostroke_router", "--model-dir", str(tmp_path / "nowhere"), "--http", "127.0.0.1:0"),
        *("--grpc", "127.0.0.1:0", "--wait", "0"),
        cwd=tmp_path,
    )
    assert started.returncode == 1
    assert started.stderr.strip().splitlines()[-1].startswith("twostroke-router: ")
    assert "Traceback" not in started.stderr


def test_the_client_is_the_stubs_alone(wheel: Path, tmp_path: Path) -> None:
    python = clean_venv(tmp_path, wheel, "client")
    listed = output(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).stdout.lower().splitlines()
    names = {line.partition("==")[0] for line in listed}
    assert names <= {"twostroke", "grpcio", "protobuf", "typing_extensions", "typing-extensions", "pip", "setuptools"}
    shutil.copy(ROOT / "examples" / "generate_grpc.py", tmp_path)
    shown = output(python, "generate_grpc.py", "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    refused = output(python, "generate_grpc.py", "127.0.0.1:9", "Hello?", "--timeout", "5", cwd=tmp_path)
    assert refused.returncode == 1
    assert "UNAVAILABLE" in refused.stderr
