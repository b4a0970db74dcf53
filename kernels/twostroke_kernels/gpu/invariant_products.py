"""Linear layers whose rows do not depend on each other nor on their number: which kernel computes one, and the call.

On Hopper a layer is computed by several kernels and tiles, by its number of rows: all of them sum a row over its inputs
in the tensor cores' steps of 16, in one order, so they give the same bits. That is a fact about the card, found by
comparing them (tests/kernels/test_invariant_triton.py), which is why a tile that differs must not join the table below.
The GEMV sums in another order and is left out, as is cuBLAS, which chooses as it likes.

Whether a layer takes this way or `fixed_gemm` follows from the weight and the card alone, never from its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twostroke_kernels.gpu.fixed_gemm import fixed_linear
from twostroke_kernels.gpu.fusion import Fusion
from twostroke_kernels.gpu.gemm_tiles import GemmTile, choose_tile, is_hopper, num_processors
from twostroke_kernels.gpu.large_gemm import LARGE_TILES, add_large_linear, large_linear
from twostroke_kernels.gpu.skinny import SkinnyConfig, skinny

Product = SkinnyConfig | GemmTile

SKINNY_ROWS = 64
"""Up to so many rows a wide layer takes the skinny kernel; 0: never."""
SKINNY_OUTPUTS = 8192
"""A wide layer: one that gives every multiprocessor a tile of outputs."""
FEW_ROWS = SkinnyConfig(64, 128, num_warps=4, num_stages=5, weight_left=True)
"""The weight on the left, so that its tiles are tall enough for the instructions that the large kernel uses too."""
NARROW = GemmTile(rows=64, outputs=32, inputs=128, num_warps=4, num_stages=6, cost=1.2)
"""For few rows of a layer that is not wide."""
TILES = (*LARGE_TILES, NARROW)
LEAST_WIDTH = 64
"""Of a weight, both ways: at 8 inputs the ways of computing a product were seen to differ."""


def product_for(num_rows: int, width_out: int, device: torch.device) -> Product:
    """How a layer that suits Hopper's kernels is computed; every answer gives the same bits."""
    if num_rows <= SKINNY_ROWS and width_out >= SKINNY_OUTPUTS:
        return FEW_ROWS
    return choose_tile(TILES, num_rows, width_out, num_processors(device))


def suits_hopper_products(weight: Tensor) -> bool:
    """Whether Hopper's kernels are written for this weight [out, in] and its card."""
    shaped = weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0 and weight.data_ptr() % 16 == 0
    halves = weight.dtype in (torch.float16, torch.bfloat16)
    shaped = shaped and min(weight.shape) >= LEAST_WIDTH
    return shaped and halves and weight.is_contiguous() and is_hopper(weight.device)


def invariant_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, adds: bool = False, out: Tensor | None = None
) -> Tensor:
    """x [T, in] times weight [out, in] -> [T, out] in x's dtype or, given `out` (contiguous), in its.

    With `adds` the result is added to what `out` holds, and the sum is rounded once.
    """
    if not suits_hopper_products(weight):
        return fixed_linear(x, weight, bias, adds=adds, out=out)
    x = x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
    return run_product(product_for(x.shape[0], weight.shape[0], x.device), x, weight, bias, adds=adds, out=out)


def run_product(
    product: Product, x: Tensor, weight: Tensor, bias: Tensor | None, *, adds: bool = False, out: Tensor | None = None
) -> Tensor:
    """See `invariant_linear`, in a given way; the operands are aligned."""
    if isinstance(product, SkinnyConfig):
        return skinny(x, weight, bias, product, Fusion(adds=adds), out)
    if not adds:
        return large_linear(x, weight, bias, out, product)
    if out is None:
        raise ValueError("out: what the result is added to is missing")
    add_large_linear(out, x, weight, bias, product)
    return out
