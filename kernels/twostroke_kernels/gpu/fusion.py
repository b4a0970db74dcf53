"""What a product of few rows does beside multiplying, and the checks of its operands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twostroke_kernels.backend import RowNorm


@dataclass(frozen=True, slots=True)
class Fusion:
    """The neighbours of a linear layer that are done in the same kernel."""

    norm: RowNorm | None = None
    """x is normed first, without rounding in between."""
    gated: bool = False
    """The weight [2 I, in] is gate rows, then up rows; the result is silu(gate) * up, [T, I]."""
    adds: bool = False
    """The result is added to what the output holds; the sum is rounded once."""


PLAIN = Fusion()


def output_width(weight: Tensor, fusion: Fusion) -> int:
    """Columns of the result."""
    return weight.shape[0] // 2 if fusion.gated else weight.shape[0]


def output_for(x: Tensor, weight: Tensor, bias: Tensor | None, fusion: Fusion, out: Tensor | None) -> Tensor:
    """`out`, or a new tensor of x's dtype where none is given.

    Raises:
        ValueError: operands that do not fit each other.
    """
    width_out, width_in = weight.shape
    if x.shape[1] != width_in or x.dtype != weight.dtype or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype} does not fit x {tuple(x.shape)} {x.dtype}")
    if bias is not None and bias.shape != (width_out,):
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    if fusion.norm is not None and fusion.norm.weight.shape != (width_in,):
        raise ValueError(f"norm weight {tuple(fusion.norm.weight.shape)} does not fit x {tuple(x.shape)}")
    if fusion.gated and width_out % 2:
        raise ValueError(f"weight {tuple(weight.shape)}: gate and up are not equally many")
    shape = (x.shape[0], output_width(weight, fusion))
    if out is None:
        if fusion.adds:
            raise ValueError("out: what the result is added to is missing")
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} (strides {out.stride()}) is not {shape}, contiguous")
    return out
