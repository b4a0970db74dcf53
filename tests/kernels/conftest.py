"""Every kernel test runs with poisoned `empty`, against each backend that this machine can run.

Without a GPU the Triton kernels are interpreted: that must be said before the first of them is decorated.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch import Tensor
from twostroke_kernels.backend import Backend
from twostroke_kernels.choice import choose_backend
from twostroke_kernels.reference import ReferenceBackend

CPU = torch.device("cpu")


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = make(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-(1 << 5))

    return poisoned


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read without having been written shows up as NaN (or a negative index)."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", _poisoned(Tensor.new_empty))


@pytest.fixture(autouse=True)
def _refuse_interpreted_products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bfloat16 as the integers of its bits and multiplies those, without a word."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        return
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if "bf16" in (str(a.dtype.scalar), str(b.dtype.scalar)):
            pytest.fail("tl.dot of bfloat16 in Triton's interpreter is silently wrong: test it on a GPU")
        return multiply(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def backend() -> Backend:
    return choose_backend(CPU)


@pytest.fixture
def reference() -> Backend:
    return ReferenceBackend(CPU)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20240607)
