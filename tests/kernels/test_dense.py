"""Linear layers, norms and the activation, against float64 and beside plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from twostroke_kernels.backend import Backend

from tests.support.tolerance import assert_as_good_as_torch

DTYPES = [torch.float32, torch.bfloat16]
TOKENS = [0, 1, 2, 17]


def llama_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The text of transformers' LlamaRMSNorm."""
    hidden = x.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return weight * hidden.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width_in", "width_out"), [(64, 64), (576, 960), (33, 7)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(
    backend: Backend,
    reference: Backend,
    rng: torch.Generator,
    dtype: torch.dtype,
    tokens: int,
    width_in: int,
    width_out: int,
    has_bias: bool,
) -> None:
    x = torch.randn(tokens, width_in, generator=rng).to(dtype)
    weight = torch.randn(width_out, width_in, generator=rng).to(dtype)
    bias = torch.randn(width_out, generator=rng).to(dtype) if has_bias else None
    out = backend.linear(x, weight, bias)
    assert_as_good_as_torch(out, reference.linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("width", "size"), [(64, 1.0), (576, 30.0), (80, 1e-3)])
def test_rms_norm(
    backend: Backend,
    reference: Backend,
    rng: torch.Generator,
    dtype: torch.dtype,
    tokens: int,
    width: int,
    size: float,
) -> None:
    x = (size * torch.randn(tokens, width, generator=rng)).to(dtype)
    weight = torch.randn(width, generator=rng).to(dtype)
    out = backend.rms_norm(x, weight, 1e-5)
    assert_as_good_as_torch(out, reference.rms_norm(x, weight, 1e-5), F.rms_norm(x, (width,), weight, 1e-5))
    assert torch.equal(out, llama_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_add_rms_norm(
    backend: Backend, reference: Backend, rng: torch.Generator, dtype: torch.dtype, tokens: int
) -> None:
    x, residual = (torch.randn(tokens, 576, generator=rng).to(dtype) for _ in range(2))
    before = x.clone(), residual.clone()
    weight = torch.randn(576, generator=rng).to(dtype)
    out, total = backend.add_rms_norm(x, residual, weight, 1e-6)
    normed, total64 = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(total.double(), total64)
    assert torch.equal(out, llama_norm(x + residual, weight, 1e-6))
    assert_as_good_as_torch(out, normed, F.rms_norm(x + residual, (576,), weight, 1e-6))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("width", [1536, 7])
def test_silu_mul(
    backend: Backend, reference: Backend, rng: torch.Generator, dtype: torch.dtype, tokens: int, width: int
) -> None:
    gate_up = (4 * torch.randn(tokens, 2 * width, generator=rng)).to(dtype)
    plain = F.silu(gate_up[:, :width]) * gate_up[:, width:]
    assert_as_good_as_torch(backend.silu_mul(gate_up), reference.silu_mul(gate_up), plain)
