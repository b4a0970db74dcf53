"""Linear layers of many rows on Hopper's tensor cores, the residual stream's sum included.

Every output is summed over the inputs in one order, in the tensor cores' steps of 16, whatever the tile and whatever
the number of rows: a row's bits depend on that row and the weight alone. That is what the batch-invariant mode is
built on; there is no split of the inputs between programs for the same reason.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.gpu.gemm_tiles import (
    GemmTile,
    are_factors,
    choose_tile,
    count_tiles,
    is_hopper,
    matrix_boxes,
    num_processors,
    num_programs,
    place_tile,
    suits_tma,
)

LARGE_TILES = (
    GemmTile(rows=128, outputs=256, inputs=64, num_warps=8, num_stages=3, cost=8.0),
    GemmTile(rows=128, outputs=128, inputs=64, num_warps=8, num_stages=4, cost=4.3),
    GemmTile(rows=64, outputs=128, inputs=64, num_warps=4, num_stages=6, cost=2.7),
    GemmTile(rows=64, outputs=64, inputs=128, num_warps=4, num_stages=5, cost=1.7),
)
"""From many rows to few: small tiles keep every multiprocessor busy where there are few rows."""


def suits_large_gemm(x: Tensor, weight: Tensor) -> bool:
    """Whether this kernel is written for such operands and the card."""
    return weight.shape[0] % 8 == 0 and are_factors(x, weight) and is_hopper(x.device)


def beats_cublas(x: Tensor, weight: Tensor) -> bool:
    """Where this kernel was measured to be faster: 65 to 128 rows of a deep layer, by 9 % with the residual added.

    (Llama-3.1-8B's down projection on an H100. Everywhere else cuBLAS is as fast or faster.)
    """
    deep = weight.shape[1] >= 2 * weight.shape[0]
    return deep and 64 < x.shape[0] <= 128 and suits_large_gemm(x, weight)


def large_config(num_rows: int, width_out: int, device: torch.device) -> GemmTile:
    """How [num_rows, in] becomes [num_rows, width_out]."""
    return choose_tile(LARGE_TILES, num_rows, width_out, num_processors(device))


def large_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    config: GemmTile | None = None,
) -> Tensor:
    """See `Backend.linear`; half precision, both widths multiples of 8. A float32 `out` gets the sums unrounded."""
    if out is None:
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, None, out, config)
    return out


def add_large_linear(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, config: GemmTile | None = None
) -> None:
    """See `Backend.add_linear`; half precision, both widths multiples of 8."""
    if residual.dtype != x.dtype:
        raise ValueError(f"residual {residual.dtype} does not fit x {x.dtype}")
    _launch(x, weight, bias, residual, residual, config)


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, out: Tensor, config: GemmTile | None
) -> None:
    num_rows, width_in = x.shape
    width_out = weight.shape[0]
    if width_out % 8 or not are_factors(x, weight):
        raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype} does not fit x {tuple(x.shape)} {x.dtype}")
    if out.shape != (num_rows, width_out) or out.dtype not in (x.dtype, torch.float32) or not suits_tma(out):
        raise ValueError(f"the output {tuple(out.shape)} {out.dtype} does not fit x {tuple(x.shape)} {x.dtype}")
    if bias is not None and bias.shape != (width_out,):
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    if num_rows == 0:
        return
    tile = config or large_config(num_rows, width_out, x.device)
    parts = 2 if tile.outputs > 128 else 1
    to_out = matrix_boxes(out, tile.rows, tile.outputs // parts)
    num_tiles = count_tiles(tile, num_rows, width_out)
    product_tiles[(num_programs(tile, num_tiles, x.device),)](
        matrix_boxes(x, tile.rows, tile.inputs),
        matrix_boxes(weight, tile.outputs, tile.inputs),
        bias if bias is None else bias.contiguous(),
        residual if residual is None else to_out,
        to_out,
        num_rows,
        N=width_out,
        K=width_in,
        ROWS=tile.rows,
        OUTPUTS=tile.outputs,
        INPUTS=tile.inputs,
        PARTS=parts,
        GROUP=tile.group,
        STAGES=tile.num_stages,
        num_warps=tile.num_warps,
    )


@triton.jit
def finish_tile(acc, bias, residual, out, row, column, N: tl.constexpr, WIDTH: tl.constexpr):
    """Adds bias and residual in float32, rounds once and writes [rows, WIDTH] of the output."""
    if bias is not None:
        columns = column + tl.arange(0, WIDTH)
        acc += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        acc += residual.load([row, column]).to(tl.float32)
    out.store([row, column], acc.to(out.dtype))


@triton.jit(do_not_specialize=["num_rows"])
def product_tiles(
    x,
    weight,
    bias,
    residual,
    out,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: tile after tile, each over the whole of K in one fixed order.

    A wide tile is finished in two parts: a whole one would not fit into shared memory beside the stages.
    """
    row_tiles = tl.cdiv(num_rows, ROWS)
    output_tiles: tl.constexpr = (N + OUTPUTS - 1) // OUTPUTS
    for index in tl.range(tl.program_id(0), row_tiles * output_tiles, tl.num_programs(0), flatten=True):
        row_tile, output_tile = place_tile(index, row_tiles, output_tiles, GROUP)
        row, column = row_tile * ROWS, output_tile * OUTPUTS
        acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
        for start in tl.range(0, K, INPUTS, num_stages=STAGES):
            acc = tl.dot(x.load([row, start]), weight.load([column, start]).T, acc)
        if PARTS == 2:
            left, right = acc.reshape(ROWS, 2, OUTPUTS // 2).permute(0, 2, 1).split()
            finish_tile(left, bias, residual, out, row, column, N, OUTPUTS // 2)
            finish_tile(right, bias, residual, out, row, column + OUTPUTS // 2, N, OUTPUTS // 2)
        else:
            finish_tile(acc, bias, residual, out, row, column, N, OUTPUTS)
