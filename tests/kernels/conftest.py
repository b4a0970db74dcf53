"""Every kernel test runs with poisoned `empty`, against each backend that this machine can run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
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


@pytest.fixture
def backend() -> Backend:
    return choose_backend(CPU)


@pytest.fixture
def reference() -> Backend:
    return ReferenceBackend(CPU)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20240607)
