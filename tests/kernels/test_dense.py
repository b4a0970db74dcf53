"""Linear layers, norms and the activation, against float64 and beside plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from twostroke_kernels.backend import Backend, RowNorm

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
@pytest.mark.parametrize("width", [1536, 7])
def test_silu_mul(
    backend: Backend, reference: Backend, rng: torch.Generator, dtype: torch.dtype, tokens: int, width: int
) -> None:
    gate_up = (4 * torch.randn(tokens, 2 * width, generator=rng)).to(dtype)
    plain = F.silu(gate_up[:, :width]) * gate_up[:, width:]
    assert_as_good_as_torch(backend.silu_mul(gate_up), reference.silu_mul(gate_up), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_of_normed_rows(
    backend: Backend, reference: Backend, rng: torch.Generator, dtype: torch.dtype, tokens: int, has_bias: bool
) -> None:
    x = (3 * torch.randn(tokens, 576, generator=rng)).to(dtype)
    weight = torch.randn(96, 576, generator=rng).to(dtype)
    bias = torch.randn(96, generator=rng).to(dtype) if has_bias else None
    norm = RowNorm(torch.randn(576, generator=rng).to(dtype), 1e-6)
    plain = F.linear(llama_norm(x, norm.weight, norm.eps), weight, bias)
    exact = reference.norm_linear(x, norm, weight, bias)
    assert_as_good_as_torch(backend.norm_linear(x, norm, weight, bias), exact, plain)
    gated = F.silu(plain[:, :48]) * plain[:, 48:]
    exact = reference.norm_gated_linear(x, norm, weight, bias)
    assert_as_good_as_torch(backend.norm_gated_linear(x, norm, weight, bias), exact, gated)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_add_linear(
    backend: Backend, reference: Backend, rng: torch.Generator, dtype: torch.dtype, tokens: int, has_bias: bool
) -> None:
    residual, x = (torch.randn(tokens, width, generator=rng).to(dtype) for width in (96, 33))
    weight = torch.randn(96, 33, generator=rng).to(dtype)
    bias = torch.randn(96, generator=rng).to(dtype) if has_bias else None
    plain, exact, before = residual + F.linear(x, weight, bias), residual.double(), x.clone()
    reference.add_linear(exact, x, weight, bias)
    backend.add_linear(residual, x, weight, bias)
    assert_as_good_as_torch(residual, exact, plain)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", TOKENS)
def test_logits(backend: Backend, reference: Backend, rng: torch.Generator, dtype: torch.dtype, rows: int) -> None:
    x, weight = torch.randn(rows, 64, generator=rng).to(dtype), torch.randn(301, 64, generator=rng).to(dtype)
    norm = RowNorm(torch.randn(64, generator=rng).to(dtype), 1e-6)
    plain = F.linear(llama_norm(x, norm.weight, norm.eps), weight).float()
    logits = backend.norm_logits(x, norm, weight)
    assert_as_good_as_torch(logits, reference.norm_logits(x, norm, weight), plain)
    out = torch.empty(rows + 2, 301)
    assert torch.equal(backend.norm_logits(x, norm, weight, out[1:-1]), logits)
    assert torch.equal(out[1:-1], logits)
    assert out[[0, -1]].isnan().all(), "rows beside those asked for were written"
