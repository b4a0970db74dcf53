"""Norms and the activation in Triton, against float64 and beside PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from twostroke_kernels.backend import Backend

from tests.support.tolerance import assert_as_good_as_torch
from tests.support.triton_device import DEVICE, DTYPES, assert_repeatable, gpu, normal

from twostroke_kernels.torch_backend import TorchBackend  # isort: skip
from twostroke_kernels.triton_backend import TritonBackend  # isort: skip

BACKEND, PLAIN = TritonBackend(DEVICE), TorchBackend(DEVICE)
ROWS = [0, 1, 5]
Check = Callable[[torch.Generator, Backend, tuple[int, int], torch.dtype], None]


def check_norm(rng: torch.Generator, reference: Backend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = normal(rng, *shape, dtype=dtype, size=3), normal(rng, shape[1], dtype=dtype)
    out = BACKEND.rms_norm(x, weight, 1e-5)
    exact, plain = reference.rms_norm(x, weight, 1e-5), PLAIN.rms_norm(x, weight, 1e-5)
    assert_as_good_as_torch(out, exact, plain)
    if dtype != torch.float32 and out.numel():
        assert (out == plain).float().mean() > 0.99, "rounded otherwise than PyTorch's"


def check_silu_mul(rng: torch.Generator, reference: Backend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = normal(rng, shape[0], 2 * shape[1], dtype=dtype, size=4)
    plain = F.silu(gate_up[:, : shape[1]]) * gate_up[:, shape[1] :]
    assert_as_good_as_torch(BACKEND.silu_mul(gate_up), reference.silu_mul(gate_up), plain)


@pytest.mark.parametrize("check", [check_norm, check_silu_mul])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 33, 64, 576])
def test_tiny(
    rng: torch.Generator, reference: Backend, check: Check, dtype: torch.dtype, rows: int, width: int
) -> None:
    check(rng, reference, (rows, width), dtype)


@gpu
@pytest.mark.parametrize("check", [check_norm, check_silu_mul])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4096), (64, 4096), (777, 14336), (4096, 4096), (3, 5120), (2, 16384)], ids=str)
def test_real(
    rng: torch.Generator, reference: Backend, check: Check, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    check(rng, reference, shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_wider_tensor(rng: torch.Generator, dtype: torch.dtype) -> None:
    wide, weight = normal(rng, 4, 100, dtype=dtype), normal(rng, 50, dtype=dtype)
    part = wide[:, 20:70]
    assert torch.equal(BACKEND.rms_norm(part, weight, 1e-5), BACKEND.rms_norm(part.clone(), weight, 1e-5))
    assert torch.equal(BACKEND.silu_mul(part), BACKEND.silu_mul(part.clone()))


def test_an_extreme_gate(rng: torch.Generator) -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=DEVICE)
    out = BACKEND.silu_mul(torch.cat((gate, torch.ones_like(gate)), 1))
    assert out.tolist()[0] == [0.0, pytest.approx(-3.8e-42, abs=1e-41), 0.0, 100.0, 1e4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeatable(rng: torch.Generator, dtype: torch.dtype) -> None:
    x, weight = normal(rng, 8, 576, dtype=dtype), normal(rng, 576, dtype=dtype)
    assert_repeatable(lambda: BACKEND.rms_norm(x, weight, 1e-5))
    assert_repeatable(lambda: BACKEND.silu_mul(x))


def test_what_does_not_fit_is_refused(rng: torch.Generator) -> None:
    x = normal(rng, 2, 8)
    with pytest.raises(ValueError, match="weight"):
        BACKEND.rms_norm(x, normal(rng, 9), 1e-5)
    with pytest.raises(ValueError, match="gate_up"):
        BACKEND.silu_mul(x[:, :7])
