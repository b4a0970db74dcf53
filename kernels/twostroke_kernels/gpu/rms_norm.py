"""RMS norm of rows, alone or of the sum of two tensors: one program a row, rounded as HuggingFace's Llama rounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `Backend.rms_norm`."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, out, None, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `Backend.add_rms_norm`."""
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype}, residual {tuple(residual.shape)} {residual.dtype}")
    x, residual = x.contiguous(), residual.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, out, total, eps)
    return out, total


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, total: Tensor | None, eps: float) -> None:
    num_rows, width = x.shape
    if weight.shape != (width,) or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype} does not fit x {tuple(x.shape)} {x.dtype}")
    if num_rows == 0:
        return
    block = triton.next_power_of_2(width)
    num_warps = min(max(block // 512, 1), 16)
    norm_rows[(num_rows,)](x, residual, weight, out, total, eps, WIDTH=width, BLOCK=block, num_warps=num_warps)


@triton.jit
def norm_rows(x, residual, weight, out, total, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`residual` and `total` are both given or both None."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    value = tl.load(x + row + columns, mask=inside, other=0.0)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        added = tl.load(residual + row + columns, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(value.dtype)
        tl.store(total + row + columns, value, mask=inside)
    wide = value.to(tl.float32)
    factor = 1 / tl.sqrt_rn(tl.sum(wide * wide, 0) / WIDTH + eps)
    normed = (wide * factor).to(value.dtype).to(tl.float32) * scale
    tl.store(out + row + columns, normed.to(value.dtype), mask=inside)
