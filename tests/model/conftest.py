"""Tiny checkpoints and loaded models, made once a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.model_oracle import load, transformers_model
from tests.support.tiny_model import make_tiny

if TYPE_CHECKING:
    from pathlib import Path

    from twostroke_engine.runner.model_runner import LoadedModel


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, 4 query and 2 KV heads, fp32."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="session")
def loaded(tiny_llama: Path) -> LoadedModel:
    return load(tiny_llama)


@pytest.fixture(scope="session")
def reference(tiny_llama: Path) -> Any:
    return transformers_model(tiny_llama)
