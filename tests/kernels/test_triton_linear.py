"""Linear layers of few rows in Triton, alone and with their neighbours, against float64 and beside PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from twostroke_kernels.backend import Backend, RowNorm

from tests.support.tolerance import assert_as_good_as_torch
from tests.support.triton_device import DEVICE, HAS_GPU, LLAMA_8B_PRODUCTS, assert_repeatable, gpu, normal

from twostroke_kernels.gpu.fusion import Fusion  # isort: skip
from twostroke_kernels.gpu.gemv import GemvConfig  # isort: skip
from twostroke_kernels.gpu.skinny import SkinnyConfig  # isort: skip
from twostroke_kernels.gpu.small_linear import LinearConfig, config_of, linear_config, small_linear  # isort: skip
from twostroke_kernels.triton_backend import TritonBackend  # isort: skip

pytestmark = pytest.mark.slow

BACKEND = TritonBackend(DEVICE)
HALVES = [torch.float16] + ([torch.bfloat16] if HAS_GPU else [])
HAS_BOXES = not HAS_GPU or torch.cuda.get_device_capability() >= (9, 0)
LEFT = SkinnyConfig(32, 64, num_warps=4, num_stages=3, weight_left=True)
RIGHT = dataclasses.replace(LEFT, weight_left=False)
SKINNY = [LEFT, RIGHT, *([dataclasses.replace(c, tma=True) for c in (LEFT, RIGHT)] if HAS_BOXES else [])]
GEMV = [GemvConfig(1, 256), GemvConfig(4, 64, num_warps=2)]


@dataclasses.dataclass
class Case:
    """Operands of one layer."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm: RowNorm

    @property
    def plain(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.x, self.weight, self.bias

    @property
    def normed(self) -> tuple[Tensor, RowNorm, Tensor, Tensor | None]:
        return self.x, self.norm, self.weight, self.bias

    def by_torch(self, fusion: Fusion, residual: Tensor) -> Tensor:
        """As PyTorch computes it, one operation after the other."""
        x = self.x
        if fusion.norm is not None:
            x = F.rms_norm(x, (x.shape[1],), self.norm.weight, self.norm.eps)
        out = F.linear(x, self.weight, self.bias)
        if fusion.gated:
            gate, up = out.chunk(2, 1)
            out = F.silu(gate) * up
        return residual + out if fusion.adds else out


def make(rng: torch.Generator, rows: int, out_in: tuple[int, int], dtype: torch.dtype, has_bias: bool = False) -> Case:
    """A product's terms are of the size that a model's are: its outputs are near 1."""
    bias = normal(rng, out_in[0], dtype=dtype) if has_bias else None
    weight = torch.randn(out_in, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)) * out_in[1] ** -0.5
    norm = RowNorm((normal(rng, out_in[1]).abs() + 0.5).to(dtype), 1e-5)
    return Case(normal(rng, rows, out_in[1], dtype=dtype), weight.to(dtype), bias, norm)


def double(case: Case) -> Case:
    """The same numbers in float64."""
    norm = RowNorm(case.norm.weight.double(), case.norm.eps)
    return Case(case.x.double(), case.weight.double(), None if case.bias is None else case.bias.double(), norm)


def check(rng: torch.Generator, case: Case, config: LinearConfig, fusion: Fusion) -> None:
    """`fusion` as PyTorch does it in float64, in a dtype of its own where nothing is added."""
    width = case.weight.shape[0] // (1 + fusion.gated)
    residual = normal(rng, case.x.shape[0], width, dtype=case.x.dtype, size=5)
    exact = double(case).by_torch(fusion, residual.double())
    before, out = case.by_torch(fusion, residual), residual.clone()
    if not fusion.adds:
        out.fill_(float("nan"))
    result = small_linear(*case.plain, config, fusion, out)
    assert result is out
    assert_as_good_as_torch(out, exact, before)
    if not fusion.adds:
        wide = torch.full(out.shape, float("nan"), dtype=torch.float32, device=DEVICE)
        small_linear(*case.plain, config, fusion, wide)
        assert torch.equal(wide.to(out.dtype), out)
        assert torch.equal(small_linear(*case.plain, config, fusion), out)


def all_fusions(norm: RowNorm) -> list[Fusion]:
    """Those that a model asks for, and all of them at once."""
    return [
        Fusion(),
        Fusion(norm=norm),
        Fusion(norm=norm, gated=True),
        Fusion(adds=True),
        Fusion(norm=norm, gated=True, adds=True),
    ]


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
    assert_as_good_as_torch(BACKEND.linear(*case.plain), reference.linear(*case.plain), F.linear(*case.plain))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 17])
@pytest.mark.parametrize(("width_out", "width_in"), [(2, 1), (14, 33), (48, 576)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_what_a_model_asks_for(
    rng: torch.Generator,
    reference: Backend,
    dtype: torch.dtype,
    rows: int,
    width_out: int,
    width_in: int,
    has_bias: bool,
) -> None:
    case = make(rng, rows, (width_out, width_in), dtype, has_bias)
    norm, none = Fusion(norm=case.norm), case.x.new_zeros(())
    out = BACKEND.norm_linear(*case.normed)
    assert_as_good_as_torch(out, reference.norm_linear(*case.normed), case.by_torch(norm, none))
    out, gated = BACKEND.norm_gated_linear(*case.normed), dataclasses.replace(norm, gated=True)
    assert_as_good_as_torch(out, reference.norm_gated_linear(*case.normed), case.by_torch(gated, none))
    residual = normal(rng, rows, width_out, dtype=dtype)
    exact, plain = residual.double(), case.by_torch(Fusion(adds=True), residual)
    reference.add_linear(exact, *case.plain)
    BACKEND.add_linear(residual, *case.plain)
    assert_as_good_as_torch(residual, exact, plain)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_logits(rng: torch.Generator, reference: Backend, dtype: torch.dtype, rows: int) -> None:
    case = make(rng, rows, (40, 96), dtype)
    exact = reference.norm_logits(case.x, case.norm, case.weight)
    plain = case.by_torch(Fusion(norm=case.norm), case.x.new_zeros(())).float()
    wide = torch.full((rows + 2, 40), float("nan"), device=DEVICE)
    out = BACKEND.norm_logits(case.x, case.norm, case.weight, wide[1 : rows + 1])
    assert_as_good_as_torch(out, exact, plain)
    assert torch.equal(out, BACKEND.norm_logits(case.x, case.norm, case.weight))
    assert bool(wide[[0, -1]].isnan().all())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("config", GEMV, ids=str)
@pytest.mark.parametrize("out_in", [(8, 256), (14, 200)], ids=str)
def test_gemv(rng: torch.Generator, dtype: torch.dtype, config: GemvConfig, out_in: tuple[int, int]) -> None:
    case = make(rng, 1, out_in, dtype, has_bias=out_in[0] == 14)
    for fusion in all_fusions(case.norm):
        check(rng, case, config, fusion)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 64])
@pytest.mark.parametrize("config", SKINNY, ids=str)
def test_skinny(rng: torch.Generator, dtype: torch.dtype, rows: int, config: SkinnyConfig) -> None:
    for out_in, has_bias in (((80, 200), True), ((64, 128), False)):
        case = make(rng, rows, out_in, dtype, has_bias)
        for fusion in all_fusions(case.norm) if rows in (5, 17) else [Fusion(norm=case.norm, gated=True, adds=True)]:
            check(rng, case, config, fusion)


def test_more_padding_changes_no_row(rng: torch.Generator) -> None:
    case = make(rng, 3, (64, 128), torch.float16)
    padded = dataclasses.replace(LEFT, min_rows=64)
    torch.testing.assert_close(small_linear(*case.plain, padded), small_linear(*case.plain, LEFT))


def test_strided_operands(rng: torch.Generator) -> None:
    x, weight, bias = normal(rng, 80, 1).T[:, ::2], normal(rng, 9, 40), normal(rng, 9, 2)[:, 1]
    norm = RowNorm(normal(rng, 80)[::2], 1e-5)
    out = BACKEND.linear(x, weight, bias)
    assert torch.equal(out, BACKEND.linear(x.clone(), weight, bias.clone()))
    torch.testing.assert_close(out, F.linear(x, weight, bias))
    normed = BACKEND.norm_linear(x, norm, weight, bias)
    assert torch.equal(normed, BACKEND.norm_linear(x.clone(), RowNorm(norm.weight.clone(), 1e-5), weight, bias))


@pytest.mark.parametrize("config", [GemvConfig(1, 16), LEFT], ids=str)
def test_what_does_not_fit_is_refused(rng: torch.Generator, config: LinearConfig) -> None:
    x, weight, adds = normal(rng, 1, 8), normal(rng, 5, 8), Fusion(adds=True)
    for name, call in {
        "weight": lambda: small_linear(x[:, :7], weight, None, config),
        "bias": lambda: small_linear(x, weight, normal(rng, 4), config),
        "norm": lambda: small_linear(x, weight, None, GemvConfig(1, 16), Fusion(RowNorm(normal(rng, 7), 1e-5))),
        "gate and up": lambda: small_linear(x, weight, None, config, Fusion(gated=True)),
        "out: ": lambda: small_linear(x, weight, None, config, adds),
        "out .* contiguous": lambda: small_linear(x, weight, None, config, adds, normal(rng, 5, 2).T[:1]),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("out_in", [*LLAMA_8B_PRODUCTS.values(), (960, 576), (152064, 896), (2, 1)], ids=str)
def test_every_config_fits_the_card(out_in: tuple[int, int], gated: bool) -> None:
    """A GEMV's sums into registers, a skinny product's stages into 227 KB of shared memory."""
    gemv = linear_config(1, *out_in, torch.bfloat16, gated)
    assert isinstance(gemv, GemvConfig)
    assert (1 + gated) * gemv.outputs * gemv.inputs <= 64 * 32 * gemv.num_warps
    for rows in (2, 16, 32, 64, 128):
        config = linear_config(rows, *out_in, torch.bfloat16, gated)
        assert config is None or isinstance(config, SkinnyConfig)
        if config is not None:
            stage = 2 * config.inputs * ((1 + gated) * config.outputs + max(config.min_rows, rows))
            assert stage * config.num_stages <= 227 * 1024


def test_what_is_left_to_cublas() -> None:
    assert linear_config(0, 4096, 4096, torch.bfloat16) is None
    assert linear_config(2, 4096, 4096, torch.float32) is None
    assert linear_config(64, 6144, 512, torch.bfloat16) is None
    assert linear_config(65, 28672, 4096, torch.bfloat16) is None
    assert linear_config(129, 128256, 4096, torch.bfloat16) is None


@pytest.mark.parametrize("config", [*GEMV, *SKINNY], ids=str)
def test_a_config_comes_back_from_json(config: LinearConfig) -> None:
    assert config_of(dataclasses.asdict(config)) == config


def test_a_config_with_a_field_too_many_is_refused() -> None:
    with pytest.raises(TypeError, match="rows"):
        config_of({"outputs": 1, "inputs": 64, "rows": 3})


@gpu
@pytest.mark.parametrize("name", LLAMA_8B_PRODUCTS)
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 32, 64, 128])
def test_real(rng: torch.Generator, name: str, rows: int) -> None:
    """Each layer with what the model fuses into it."""
    case = make(rng, rows, LLAMA_8B_PRODUCTS[name], torch.bfloat16)
    gated, adds = name == "gate_up", name in ("o", "down")
    config = linear_config(rows, *LLAMA_8B_PRODUCTS[name], torch.bfloat16, gated)
    if config is None:
        pytest.skip("left to cuBLAS")
    fusion = Fusion(None if adds else case.norm, gated, adds)
    check(rng, case, config, fusion)
    held = normal(rng, rows, LLAMA_8B_PRODUCTS[name][0] // (1 + gated), dtype=torch.bfloat16)
    assert_repeatable(lambda: small_linear(*case.plain, config, fusion, held.clone()))


@pytest.mark.parametrize("compute", ["plain", "norm", "gated", "adds"])
@pytest.mark.parametrize("rows", [1, 3])
def test_repeatable(rng: torch.Generator, rows: int, compute: str) -> None:
    case = make(rng, rows, (24, 576), torch.float16)
    held = normal(rng, rows, 24, dtype=torch.float16)
    fusion = {
        "plain": Fusion(),
        "norm": Fusion(case.norm),
        "gated": Fusion(case.norm, gated=True),
        "adds": Fusion(adds=True),
    }[compute]
    into: Callable[[], Tensor | None] = held.clone if fusion.adds else lambda: None
    configs: list[LinearConfig] = [*SKINNY, *(GEMV if rows == 1 else [])]
    for config in configs:
        assert_repeatable(lambda config=config: small_linear(*case.plain, config, fusion, into()))


@pytest.mark.skipif(HAS_GPU, reason="a GPU multiplies bfloat16 well")
def test_the_interpreter_is_not_trusted_with_products_of_bfloat16(rng: torch.Generator) -> None:
    case = make(rng, 4, (32, 64), torch.bfloat16)
    with pytest.raises(pytest.fail.Exception, match="bfloat16"):
        small_linear(*case.plain, LEFT)
