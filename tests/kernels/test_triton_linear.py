"""Linear layers of few rows in Triton, against float64 and beside PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from twostroke_kernels.backend import Backend

from tests.support.tolerance import assert_as_good_as_torch
from tests.support.triton_device import DEVICE, HAS_GPU, assert_repeatable, gpu, normal

from twostroke_kernels.gpu.gemv import GemvConfig, SkinnyConfig, linear_config, small_linear  # isort: skip
from twostroke_kernels.triton_backend import TritonBackend  # isort: skip

BACKEND = TritonBackend(DEVICE)
HALVES = [torch.float16] + ([torch.bfloat16] if HAS_GPU else [])
LLAMA_8B = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def make(rng: torch.Generator, rows: int, out_in: tuple[int, int], dtype: torch.dtype, has_bias: bool = False) -> Case:
    bias = normal(rng, out_in[0], dtype=dtype) if has_bias else None
    weight = torch.randn(out_in, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).to(dtype)
    return normal(rng, rows, out_in[1], dtype=dtype), weight, bias


def check(reference: Backend, case: Case, config: GemvConfig | SkinnyConfig) -> None:
    assert_as_good_as_torch(small_linear(*case, config), reference.linear(*case), F.linear(*case))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 17])
@pytest.mark.parametrize(("width_out", "width_in"), [(1, 1), (7, 33), (24, 576), (5, 4100)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(
    rng: torch.Generator,
    reference: Backend,
    dtype: torch.dtype,
    rows: int,
    width_out: int,
    width_in: int,
    has_bias: bool,
) -> None:
    case = make(rng, rows, (width_out, width_in), dtype, has_bias)
    assert_as_good_as_torch(BACKEND.linear(*case), reference.linear(*case), F.linear(*case))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 64])
@pytest.mark.parametrize("weight_left", [False, True])
def test_skinny(rng: torch.Generator, reference: Backend, dtype: torch.dtype, rows: int, weight_left: bool) -> None:
    for out_in, has_bias in (((48, 200), True), ((32, 128), False)):
        check(reference, make(rng, rows, out_in, dtype, has_bias), SkinnyConfig(32, 64, 4, 3, weight_left))


def test_strided_operands(rng: torch.Generator) -> None:
    x, weight, bias = normal(rng, 80, 1).T[:, ::2], normal(rng, 9, 40), normal(rng, 9, 2)[:, 1]
    out = BACKEND.linear(x, weight, bias)
    assert torch.equal(out, BACKEND.linear(x.clone(), weight, bias.clone()))
    torch.testing.assert_close(out, F.linear(x, weight, bias))


def test_what_does_not_fit_is_refused(rng: torch.Generator) -> None:
    x, weight = normal(rng, 1, 8), normal(rng, 4, 8)
    with pytest.raises(ValueError, match="weight"):
        BACKEND.linear(x[:, :7], weight)
    with pytest.raises(ValueError, match="bias"):
        BACKEND.linear(x, weight, normal(rng, 5))


@pytest.mark.parametrize("out_in", [*LLAMA_8B.values(), (960, 576), (152064, 896), (1, 1)], ids=str)
def test_every_config_fits_the_card(out_in: tuple[int, int]) -> None:
    """A GEMV's sums into registers, a skinny product's stages into 227 KB of shared memory."""
    gemv = linear_config(1, *out_in, torch.bfloat16)
    assert isinstance(gemv, GemvConfig)
    assert gemv.outputs * gemv.inputs <= 64 * 32 * gemv.num_warps
    for rows in (2, 16, 32, 64):
        config = linear_config(rows, *out_in, torch.bfloat16)
        assert config is None or isinstance(config, SkinnyConfig)
        if config is not None:
            stage = 2 * config.inputs * (config.outputs + max(16, rows))
            assert stage * config.num_stages <= 227 * 1024


def test_what_is_left_to_cublas() -> None:
    assert linear_config(0, 4096, 4096, torch.bfloat16) is None
    assert linear_config(2, 4096, 4096, torch.float32) is None
    assert linear_config(64, 6144, 4096, torch.bfloat16) is None
    assert linear_config(65, 128256, 4096, torch.bfloat16) is None


@gpu
@pytest.mark.parametrize("name", LLAMA_8B)
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 32, 64])
def test_real(rng: torch.Generator, reference: Backend, name: str, rows: int) -> None:
    x, weight, _ = make(rng, rows, LLAMA_8B[name], torch.bfloat16)
    config = linear_config(rows, *LLAMA_8B[name], torch.bfloat16)
    if config is None:
        pytest.skip("left to cuBLAS")
    exact = torch.cat([reference.linear(x, part) for part in weight.split(8192)], 1)
    assert_as_good_as_torch(small_linear(x, weight, None, config), exact, F.linear(x, weight))
    assert_repeatable(lambda: small_linear(x, weight, None, config))


@pytest.mark.parametrize("rows", [1, 3])
def test_repeatable(rng: torch.Generator, rows: int) -> None:
    case = make(rng, rows, (20, 576), torch.float16)
    assert_repeatable(lambda: BACKEND.linear(*case))
    assert_repeatable(lambda: small_linear(*case, SkinnyConfig(32, 64, 4, 3, weight_left=True)))


@pytest.mark.skipif(HAS_GPU, reason="a GPU multiplies bfloat16 well")
def test_the_interpreter_is_not_trusted_with_products_of_bfloat16(rng: torch.Generator) -> None:
    case = make(rng, 4, (32, 64), torch.bfloat16)
    with pytest.raises(pytest.fail.Exception, match="bfloat16"):
        small_linear(*case, SkinnyConfig(32, 64, 4, 3, weight_left=True))
