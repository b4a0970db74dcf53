"""CONTRIBUTING's first change: its patches fit this tree; the test fails without the code and passes with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import ROOT, blocks

FOLDERS = ("proto", "kernels", "engine", "services", "cli", "docs")
TEST = "tests/unit/test_openai_schema.py"

GENERATE = """
import runpy, sys, tomllib
sys.path[:0] = tomllib.load(open("pyproject.toml", "rb"))["tool"]["pytest"]["ini_options"]["pythonpath"]
runpy.run_path("docs/generate.py", run_name="__main__")
"""
"""`docs/generate.py` on a copy of the packages, not on the installed ones."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the change needs."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests" / "unit").mkdir(parents=True)
    for name in ("pyproject.toml", "tests/conftest.py", TEST):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(tree: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    return subprocess.run(argv, cwd=tree, env=env, capture_output=True, text=True, timeout=120, check=False)


def apply(tree: Path, patch: str) -> None:
    (tree / "a.patch").write_text(patch)
    applied = run(tree, "git", "apply", "a.patch")
    assert applied.returncode == 0, f"CONTRIBUTING.md's patch does not fit any more: {applied.stderr}"


@pytest.mark.slow
def test_the_first_change(tree: Path) -> None:
    test, code = [block.text for block in blocks(ROOT / "CONTRIBUTING.md") if block.language == "diff"]
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", TEST]
    apply(tree, test)
    failed = run(tree, *tests)
    assert failed.returncode == 1
    assert "prompt_cache_retention: unknown parameter" in failed.stdout
    apply(tree, code)
    passed = run(tree, *tests)
    assert passed.returncode == 0, passed.stdout
    written = run(tree, sys.executable, "-c", GENERATE)
    assert written.returncode == 0, written.stderr
    assert "docs/reference/openapi.json" in written.stdout
    assert "prompt_cache_retention" in (tree / "docs" / "reference" / "openapi.json").read_text()
