"""RMS norm of rows: one program a row, rounded as HuggingFace's Llama rounds."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.gpu.dependent_launch import await_earlier, dependent, release_later


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `Backend.rms_norm`."""
    num_rows, width = x.shape
    if weight.shape != (width,) or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype} does not fit x {tuple(x.shape)} {x.dtype}")
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(width)
        num_warps = min(max(block // 512, 1), 16)
        norm_rows[(num_rows,)](
            x,
            weight,
            out,
            eps,
            WIDTH=width,
            BLOCK=block,
            num_warps=num_warps,
            **dependent(x.device),
        )
    return out


@triton.jit
def norm_rows(x, weight, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """[T, WIDTH] -> [T, WIDTH]."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    await_earlier(PDL)
    value = tl.load(x + row + columns, mask=inside, other=0.0)
    release_later(PDL)
    wide = value.to(tl.float32)
    factor = 1 / tl.sqrt_rn(tl.sum(wide * wide, 0) / WIDTH + eps)
    normed = (wide * factor).to(value.dtype).to(tl.float32) * scale
    tl.store(out + row + columns, normed.to(value.dtype), mask=inside)
