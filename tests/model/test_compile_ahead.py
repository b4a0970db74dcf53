"""Kernels compiled by several processes before a model is loaded: each kind of step has one, and none may hurt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from twostroke_engine.config import EngineConfig
from twostroke_engine.runner import compile_ahead as module
from twostroke_engine.runner.compile_ahead import compile_ahead
from twostroke_engine.runner.compile_share import compute_share, step_kinds
from twostroke_engine.runner.model_runner import build_runner

from benchmarks.workload import TINY
from tests.support.triton_device import DEVICE, gpu


def make_config(folder: Path, **changes: Any) -> EngineConfig:
    (folder / "config.json").write_text(json.dumps(TINY))
    told: dict[str, Any] = {
        "model_dir": str(folder),
        "device": str(DEVICE),
        "dtype": "bfloat16" if DEVICE.type == "cuda" else "float32",
        "load_format": "random",
        "max_model_len": 256,
        "max_step_tokens": 200,
        "max_running": 70,
        "num_blocks": 64,
    }
    return EngineConfig(**{**told, **changes})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    return folder


def test_shares_are_all_kinds_of_steps(tmp_path: Path) -> None:
    """On a CPU the steps run as well; there is only nothing to compile."""
    config = make_config(tmp_path)
    num_kinds = len(list(step_kinds(config).calls()))
    assert num_kinds > 10
    assert [compute_share(config, share, 3) for share in range(3)] == [
        len(range(share, num_kinds, 3)) for share in range(3)
    ]


def test_it_is_done_once_for_all_that_kernels_depend_on(tmp_path: Path, cache: Path) -> None:
    config = make_config(tmp_path)
    compile_ahead(config, num_children=2)
    (done,) = cache.glob("twostroke-*")
    began = done.stat().st_mtime_ns
    compile_ahead(config, num_children=2)
    assert [path.stat().st_mtime_ns for path in cache.glob("twostroke-*")] == [began]
    compile_ahead(make_config(tmp_path, max_running=3), num_children=2)
    assert len(list(cache.glob("twostroke-*"))) == 2


def test_one_core_has_nothing_to_share(tmp_path: Path, cache: Path) -> None:
    compile_ahead(make_config(tmp_path), num_children=1)
    assert not cache.exists()


def test_a_child_that_fails_is_told_of_and_tried_again_next_time(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ahead(make_config(tmp_path, dtype="float8"), num_children=2)
    assert "compiling ahead failed (AttributeError" in caplog.text
    monkeypatch.setattr(module, "TIMEOUT_S", 0.01)
    compile_ahead(make_config(tmp_path), num_children=2)
    assert "compiling ahead took longer" in caplog.text
    assert not list(cache.glob("twostroke-*"))


@gpu
def test_the_engine_finds_everything_compiled(tmp_path: Path, cache: Path) -> None:
    config = make_config(tmp_path)
    compile_ahead(config, num_children=4)
    before = set(cache.iterdir())
    build_runner(config)
    torch.cuda.synchronize()
    left = set(cache.iterdir()) - before
    assert not left, [kernel.name for folder in left for kernel in folder.iterdir()]
