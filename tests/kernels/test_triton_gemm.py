"""Products of many rows in Triton, against float64 and beside PyTorch: SwiGLU's first half, and plain linear layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.tolerance import assert_as_good_as_torch
from tests.support.triton_device import DEVICE, HAS_GPU, assert_repeatable, gpu, normal

from twostroke_kernels.gpu.gated_gemm import GATED_TILES, gated_config, gated_linear, suits_gated_gemm  # isort: skip
from twostroke_kernels.gpu.gemm_tiles import GemmTile  # isort: skip
from twostroke_kernels.gpu.large_gemm import (  # isort: skip
    LARGE_TILES,
    add_large_linear,
    large_config,
    large_linear,
    suits_large_gemm,
)

HALVES = [torch.float16] + ([torch.bfloat16] if HAS_GPU else [])
SMALL = GemmTile(rows=64, outputs=64, inputs=64, num_warps=4, num_stages=2)
WIDE = GemmTile(rows=64, outputs=256, inputs=64, num_warps=4, num_stages=2)
LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "down": (4096, 14336)}
REAL_ROWS = [1, 63, 64, 65, 127, 128, 129, 1000]
FACTS = pytest.mark.parametrize("dtype", HALVES, ids=str)


def operands(rng: torch.Generator, rows: int, out_in: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight is drawn on the device: eighty million numbers take long on a CPU."""
    weight = torch.randn(out_in, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    return normal(rng, rows, out_in[1], dtype=dtype), (weight * out_in[1] ** -0.5).to(dtype)


def exact_gated(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = (x.double() @ part.double().T for part in weight.chunk(2))
    return F.silu(gate) * up


def plain_gated(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = F.linear(x, weight).chunk(2, 1)
    return F.silu(gate) * up


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([x.double() @ part.double().T for part in weight.split(8192)], 1)


def unrounded_linear(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's own way to a float32 result; on a card it leaves the sums to the tensor cores."""
    if x.device.type == "cuda":
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())


def check_gated(x: Tensor, weight: Tensor, tile: GemmTile) -> None:
    assert_as_good_as_torch(gated_linear(x, weight, tile), exact_gated(x, weight), plain_gated(x, weight))


def check_linear(rng: torch.Generator, x: Tensor, weight: Tensor, tile: GemmTile) -> None:
    """Plain, with a bias, unrounded, and added to a residual stream."""
    bias = normal(rng, weight.shape[0], dtype=x.dtype)
    exact, plain = exact_linear(x, weight), F.linear(x, weight)
    assert_as_good_as_torch(large_linear(x, weight, config=tile), exact, plain)
    assert_as_good_as_torch(large_linear(x, weight, bias, config=tile), exact + bias.double(), plain + bias)
    whole = torch.empty(plain.shape, device=DEVICE)
    assert large_linear(x, weight, None, whole, tile) is whole
    assert_as_good_as_torch(whole, exact, unrounded_linear(x, weight))
    residual = normal(rng, *plain.shape, dtype=x.dtype)
    total, plain_total = exact + residual.double() + bias.double(), residual + F.linear(x, weight, bias)
    add_large_linear(residual, x, weight, bias, tile)
    assert_as_good_as_torch(residual, total, plain_total)


@FACTS
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("width_in", [64, 72, 200])
def test_gated(rng: torch.Generator, dtype: torch.dtype, rows: int, width_in: int) -> None:
    for width in (8, 64, 136):
        check_gated(*operands(rng, rows, (2 * width, width_in), dtype), SMALL)


@FACTS
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("tile", [SMALL, WIDE], ids=["small", "wide"])
def test_linear(rng: torch.Generator, dtype: torch.dtype, rows: int, tile: GemmTile) -> None:
    for out_in in ((8, 64), (64, 72), (264, 200)):
        check_linear(rng, *operands(rng, rows, out_in, dtype), tile)


@FACTS
def test_no_rows(rng: torch.Generator, dtype: torch.dtype) -> None:
    x, weight = operands(rng, 0, (32, 64), dtype)
    assert gated_linear(x, weight, SMALL).shape == (0, 16)
    assert large_linear(x, weight).shape == (0, 32)
    add_large_linear(torch.empty((0, 32), dtype=dtype, device=DEVICE), x, weight)


@FACTS
def test_every_program_takes_many_tiles_in_an_order_that_leaves_none_out(
    rng: torch.Generator, dtype: torch.dtype
) -> None:
    """More row tiles than a group has, and a last group that is not full."""
    tile = GemmTile(rows=16, outputs=16, inputs=16, num_warps=4, num_stages=2)
    if HAS_GPU:
        tile = replace(tile, rows=64)
    x, weight = operands(rng, 18 * tile.rows + 1, (48, 16), dtype)
    check_gated(x, weight, tile)
    check_linear(rng, x, weight, tile)


@FACTS
@pytest.mark.parametrize("tile", [SMALL, WIDE], ids=["small", "wide"])
def test_nothing_is_written_but_the_rows_asked_for(rng: torch.Generator, dtype: torch.dtype, tile: GemmTile) -> None:
    x, weight = operands(rng, 70, (40, 64), dtype)
    for out_dtype in (dtype, torch.float32):
        room = torch.full((140, 48), 7.0, dtype=out_dtype, device=DEVICE)
        large_linear(x, weight, None, room[30:100, :40], tile)
        assert torch.equal(room[30:100, :40], large_linear(x, weight, None, torch.empty_like(room[30:100, :40]), tile))
        assert (room[:30] == 7).all() and (room[100:] == 7).all() and (room[:, 40:] == 7).all()  # noqa: PT018


@FACTS
def test_rows_of_a_wider_tensor(rng: torch.Generator, dtype: torch.dtype) -> None:
    wide, weight = normal(rng, 70, 200, dtype=dtype), operands(rng, 0, (48, 64), dtype)[1]
    part = wide[:, 32:96]
    assert torch.equal(gated_linear(part, weight, SMALL), gated_linear(part.clone(), weight, SMALL))
    assert torch.equal(large_linear(part, weight), large_linear(part.clone(), weight))


@FACTS
def test_a_row_depends_on_no_other(rng: torch.Generator, dtype: torch.dtype) -> None:
    """Neither on what the other rows hold, NaN included, nor on how many there are."""
    x, weight = operands(rng, 130, (80, 72), dtype)
    gated, plain = gated_linear(x, weight, SMALL), large_linear(x, weight, config=SMALL)
    others = torch.full_like(x, float("nan"))
    for row in (0, 63, 64, 129):
        alone = others.clone()
        alone[row] = x[row]
        assert torch.equal(gated_linear(alone[: row + 1], weight, SMALL)[row], gated[row])
        assert torch.equal(large_linear(alone[: row + 1], weight, config=SMALL)[row], plain[row])


@FACTS
def test_an_extreme_gate(dtype: torch.dtype) -> None:
    gates = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], dtype=dtype, device=DEVICE)
    x = torch.zeros(5, 64, dtype=dtype, device=DEVICE)
    x[:, 0] = gates
    weight = torch.zeros(16, 64, dtype=dtype, device=DEVICE)
    weight[:8, 0], x[:, 1], weight[8:, 1] = 1.0, 2.0, 1.0
    out = gated_linear(x, weight, SMALL)[:, 0]
    assert out.tolist() == (2 * F.silu(gates.float())).to(dtype).tolist()


@FACTS
def test_repeatable(rng: torch.Generator, dtype: torch.dtype) -> None:
    x, weight = operands(rng, 70, (80, 200), dtype)
    assert_repeatable(lambda: gated_linear(x, weight, SMALL))
    assert_repeatable(lambda: large_linear(x, weight, config=WIDE))


def test_what_does_not_fit_is_refused(rng: torch.Generator) -> None:
    x, weight = operands(rng, 4, (32, 64), torch.float16)
    with pytest.raises(ValueError, match="weight"):
        gated_linear(x[:, :56], weight, SMALL)
    with pytest.raises(ValueError, match="weight"):
        gated_linear(x, weight[:24], SMALL)
    with pytest.raises(ValueError, match="weight"):
        large_linear(x.float(), weight.float())
    with pytest.raises(ValueError, match="weight"):
        large_linear(x, weight[:28])
    with pytest.raises(ValueError, match="bias"):
        large_linear(x, weight, x[0])
    with pytest.raises(ValueError, match="output"):
        large_linear(x, weight, None, x)
    with pytest.raises(ValueError, match="residual"):
        add_large_linear(torch.zeros(4, 32, device=DEVICE), x, weight)


@pytest.mark.skipif(HAS_GPU, reason="the card decides")
def test_a_cpu_is_left_to_pytorch(rng: torch.Generator) -> None:
    x, weight = operands(rng, 128, (32, 64), torch.float16)
    assert not suits_gated_gemm(x, weight)
    assert not suits_large_gemm(x, weight)


@pytest.mark.parametrize("width", [14336, 1536, 18944, 8])
def test_the_choice_of_tiles(width: int) -> None:
    """Few rows get small tiles, many rows large ones; up to 64 rows are other kernels' business."""
    assert [gated_config(rows) for rows in (0, 64, 512)] == [None] * 3
    assert [gated_config(rows) for rows in (65, 129, 8192)] == [GATED_TILES[0], GATED_TILES[1], GATED_TILES[1]]
    for rows in (65, 128, 1000, 8192):
        assert large_config(rows, width, DEVICE) in LARGE_TILES
    assert large_config(100000, 4096, DEVICE) == LARGE_TILES[0]
    assert large_config(65, 4096, DEVICE).rows == 64


@pytest.mark.parametrize("tile", [*GATED_TILES, *LARGE_TILES], ids=str)
def test_every_tile_fits_the_card(tile: GemmTile) -> None:
    """The stages, a part of a tile that comes in and one that goes out, into 227 KB of shared memory."""
    outputs = 2 * tile.outputs if tile in GATED_TILES else tile.outputs
    stages = 2 * tile.inputs * (tile.rows + outputs) * tile.num_stages
    ends = 2 * 2 * tile.rows * min(128, tile.outputs)
    assert (stages + ends + 1024) * tile.programs <= 227 * 1024
    assert tile.rows * outputs <= 128 * 32 * tile.num_warps, "the sums would not fit into registers"


@gpu
@FACTS
@pytest.mark.parametrize("rows", REAL_ROWS)
def test_gated_at_real_shapes(rng: torch.Generator, dtype: torch.dtype, rows: int) -> None:
    x, weight = operands(rng, rows, (28672, 4096), dtype)
    assert suits_gated_gemm(x, weight)
    bits = [gated_linear(x, weight, tile) for tile in GATED_TILES]
    assert all(torch.equal(other, bits[0]) for other in bits), "the bits depend on the tile"
    for tile in GATED_TILES:
        check_gated(x, weight, tile)


@gpu
@FACTS
@pytest.mark.parametrize("name", LLAMA_8B)
@pytest.mark.parametrize("rows", REAL_ROWS)
def test_linear_at_real_shapes(rng: torch.Generator, dtype: torch.dtype, name: str, rows: int) -> None:
    x, weight = operands(rng, rows, LLAMA_8B[name], dtype)
    assert suits_large_gemm(x, weight)
    bits = [large_linear(x, weight, config=tile) for tile in LARGE_TILES]
    assert all(torch.equal(other, bits[0]) for other in bits), "the bits depend on the tile"
    for tile in LARGE_TILES:
        check_linear(rng, x, weight, tile)


@gpu
@pytest.mark.parametrize("name", LLAMA_8B)
def test_rows_do_not_depend_on_their_number(rng: torch.Generator, name: str) -> None:
    x, weight = operands(rng, 2048, LLAMA_8B[name], torch.bfloat16)
    whole = large_linear(x, weight)
    for rows in (1, 63, 64, 65, 128, 129, 300, 512, 1000):
        assert torch.equal(large_linear(x[:rows], weight), whole[:rows])
        residual = x.new_zeros(rows, weight.shape[0])
        add_large_linear(residual, x[:rows], weight)
        assert torch.equal(residual, whole[:rows])


@gpu
@pytest.mark.parametrize("rows", [65, 129, 1000, 4096])
def test_repeatable_at_real_shapes(rng: torch.Generator, rows: int) -> None:
    x, weight = operands(rng, rows, (28672, 4096), torch.bfloat16)
    for tile in GATED_TILES:
        assert_repeatable(lambda tile=tile: gated_linear(x, weight, tile))
    x, weight = operands(rng, rows, LLAMA_8B["down"], torch.bfloat16)
    start = normal(rng, rows, weight.shape[0], dtype=torch.bfloat16)

    def added(tile: GemmTile) -> Tensor:
        residual = start.clone()
        add_large_linear(residual, x, weight, None, tile)
        return residual

    for tile in LARGE_TILES:
        assert_repeatable(lambda tile=tile: added(tile))
