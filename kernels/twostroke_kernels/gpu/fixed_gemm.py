"""A linear layer of any shape on any card, always cut the same way: a row's bits depend on it and the weight alone.

The batch-invariant mode's kernel for what the faster ones are not written for: float32, odd widths, cards without a
tensor memory accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.gpu.fusion import Fusion, output_for


@dataclass(frozen=True, slots=True)
class _Tile:
    rows: int
    outputs: int
    inputs: int
    num_stages: int


_HALF = _Tile(rows=64, outputs=64, inputs=64, num_stages=3)
_WHOLE = _Tile(rows=32, outputs=32, inputs=32, num_stages=2)


def fixed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, adds: bool = False, out: Tensor | None = None
) -> Tensor:
    """x [T, in] times weight [out, in] -> [T, out] in x's dtype or, given `out`, in its; float32 products are exact.

    With `adds` the result is added to what `out` holds, and the sum is rounded once.

    Raises:
        ValueError: operands that do not fit each other.
    """
    out = output_for(x, weight, bias, Fusion(adds=adds), out)
    num_rows, (width_out, width_in) = x.shape[0], weight.shape
    tile = _WHOLE if x.dtype == torch.float32 else _HALF
    if num_rows:
        fixed_tile[(triton.cdiv(width_out, tile.outputs), triton.cdiv(num_rows, tile.rows))](
            x.contiguous(),
            weight,
            None if bias is None else bias.contiguous(),
            out,
            num_rows,
            N=width_out,
            K=width_in,
            ROWS=tile.rows,
            OUTPUTS=tile.outputs,
            INPUTS=tile.inputs,
            STAGES=tile.num_stages,
            ADDS=adds,
            num_warps=4,
        )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def fixed_tile(
    x,
    weight,
    bias,
    out,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    STAGES: tl.constexpr,
    ADDS: tl.constexpr,
):
    """One program: a tile of the product over the whole of K, in one order. Every load is masked, needed or not."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, INPUTS)
    used, exists = rows < num_rows, outputs < N
    from_x = x + rows[:, None].to(tl.int64) * K + inputs[None, :]
    from_weight = weight + outputs[:, None].to(tl.int64) * K + inputs[None, :]
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in tl.range(0, K, INPUTS, num_stages=STAGES):
        inside = start + inputs < K
        values = tl.load(from_x + start, mask=used[:, None] & inside[None, :], other=0.0)
        w = tl.load(from_weight + start, mask=exists[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(values, w.T, acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + outputs, mask=exists, other=0.0).to(tl.float32)[None, :]
    to_out = out + rows[:, None].to(tl.int64) * N + outputs[None, :]
    stored = used[:, None] & exists[None, :]
    if ADDS:
        acc += tl.load(to_out, mask=stored, other=0.0).to(tl.float32)
    tl.store(to_out, acc.to(out.dtype.element_ty), mask=stored)
