"""SwiGLU's element-wise half."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.gpu.dependent_launch import await_earlier, dependent, release_later
from twostroke_kernels.gpu.gemv import silu

_BLOCK = 1024
_NUM_WARPS = 4


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `Backend.silu_mul`."""
    num_rows, both = gate_up.shape
    if both % 2:
        raise ValueError(f"gate_up {tuple(gate_up.shape)}: gate and up are not equally wide")
    gate_up = gate_up.contiguous()
    out = torch.empty((num_rows, both // 2), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        grid = (num_rows, triton.cdiv(both // 2, _BLOCK))
        silu_mul_rows[grid](gate_up, out, WIDTH=both // 2, BLOCK=_BLOCK, num_warps=_NUM_WARPS, **dependent(out.device))
    return out


@triton.jit
def silu_mul_rows(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """[T, 2 WIDTH] -> [T, WIDTH], rounded once."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    source = gate_up + row * (2 * WIDTH) + columns
    await_earlier(PDL)
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    release_later(PDL)
    value = silu(gate) * up
    tl.store(out + row * WIDTH + columns, value.to(out.dtype.element_ty), mask=inside)
