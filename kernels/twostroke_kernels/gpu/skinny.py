"""Linear layers of a few rows, limited by the bandwidth that reads the weight: tensor cores over tiles of it.

A program takes all rows and one tile of outputs over the whole width, in one order: a row's bits depend neither on the
other rows nor on their number. No norm is fused here: a tile of activations that is both multiplied and summed in the
same pipelined loop came out wrong, differently each time, on Triton 3.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from twostroke_kernels.gpu.dependent_launch import await_earlier, dependent, release_later
from twostroke_kernels.gpu.fusion import Fusion, output_for, output_width
from twostroke_kernels.gpu.gemv import load_tile, silu

MAX_SKINNY_ROWS = 128
_LONG_TILE_ROWS = 16
_FEW_ROWS = 32
_PAIRED_ROWS = 64
_WIDE = 16384
_HEAD_WIDTH = 65536
_DEEP = 1024


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """Tile of the weight, [outputs, inputs] a step (if gated: of the gate rows, and as many up rows)."""

    outputs: int
    inputs: int
    num_warps: int
    num_stages: int
    weight_left: bool
    """The weight is the left factor: its outputs are rows of the product."""
    tma: bool = False
    """Its tiles come as boxes of a TMA descriptor, else by pointers."""
    min_rows: int = 16
    """Rows are padded to a power of two that is not smaller (16 at least unless `weight_left`: then 8)."""


def skinny_config(num_rows: int, width_out: int, width_in: int, gated: bool) -> SkinnyConfig | None:
    """Wide layers have programs enough with large tiles; narrow ones need small tiles, deep ones long ones.

    None: cuBLAS is as fast. `width_out` counts the rows of the weight.
    """
    if gated:
        return _gated_config(num_rows, width_out)
    if num_rows > _PAIRED_ROWS:
        return SkinnyConfig(128, 128, 8, 3, weight_left=True, tma=True) if width_out >= _HEAD_WIDTH else None
    if num_rows > _FEW_ROWS:
        return _half_config(width_out, width_in)
    if width_out >= _WIDE:
        return SkinnyConfig(128, 128, num_warps=4, num_stages=4, weight_left=True)
    if width_in >= 2 * width_out:
        longer = num_rows <= _LONG_TILE_ROWS
        return SkinnyConfig(32, 512 if longer else 256, 4, num_stages=3 if longer else 4, weight_left=False)
    if width_in >= _DEEP:
        return SkinnyConfig(64, 128, num_warps=4, num_stages=5, weight_left=True)
    return None


def _half_config(width_out: int, width_in: int) -> SkinnyConfig | None:
    """Of 33 to 64 rows."""
    if width_out >= _WIDE:
        return SkinnyConfig(128, 128, num_warps=8, num_stages=3, weight_left=True)
    if width_in >= 2 * width_out:
        return SkinnyConfig(32, 128, num_warps=4, num_stages=6, weight_left=False)
    if width_in < _DEEP:
        return None
    if width_out > 4096:
        return SkinnyConfig(64, 128, num_warps=4, num_stages=5, weight_left=False)
    return SkinnyConfig(32, 256, num_warps=4, num_stages=4, weight_left=False)


def _gated_config(num_rows: int, width_out: int) -> SkinnyConfig | None:
    """The same bytes in flight as the plain wide product has."""
    if num_rows > _PAIRED_ROWS or width_out < 2048:
        return None
    return SkinnyConfig(64, 128, num_warps=4, num_stages=4 if num_rows <= _FEW_ROWS else 3, weight_left=True)


def skinny(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: SkinnyConfig, fusion: Fusion, out: Tensor | None
) -> Tensor:
    """x [up to 128, in], weight [out, in] -> [up to 128, out], half precision; `fusion` has no norm."""
    out = output_for(x, weight, bias, fusion, out)
    num_rows, width_out = x.shape[0], output_width(weight, fusion)
    skinny_tile[(triton.cdiv(width_out, config.outputs),)](
        x.contiguous(),
        weight,
        _boxes(weight, config),
        None if bias is None else bias.contiguous(),
        out,
        num_rows,
        N=width_out,
        K=weight.shape[1],
        ROWS=max(8 if config.weight_left else 16, config.min_rows, triton.next_power_of_2(num_rows)),
        OUTPUTS=config.outputs,
        INPUTS=config.inputs,
        WEIGHT_LEFT=config.weight_left,
        GATED=fusion.gated,
        ADDS=fusion.adds,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        **dependent(x.device),
    )
    return out


def _boxes(weight: Tensor, config: SkinnyConfig) -> TensorDescriptor | None:
    """What a box has outside of the weight reads as zero."""
    if not config.tma or weight.data_ptr() % 16 or weight.shape[1] * weight.element_size() % 16:
        return None
    return TensorDescriptor(weight, list(weight.shape), list(weight.stride()), [config.outputs, config.inputs])


def suits_skinny(dtype: torch.dtype) -> bool:
    """Whether the kernel is written for this dtype."""
    return dtype in (torch.float16, torch.bfloat16)


@triton.jit
def load_weights(
    boxes,
    from_gate,
    first,
    start,
    exists,
    inside,
    N: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A tile of the weight, and the tile N rows below it if GATED; by TMA if there are boxes."""
    if boxes is not None:
        gate = boxes.load([first, start])
    else:
        gate = load_tile(from_gate + start, exists, inside, WHOLE)
    up = gate
    if GATED:
        if boxes is not None:
            up = boxes.load([N + first, start])
        else:
            up = load_tile(from_gate + N * K + start, exists, inside, WHOLE)
    return gate, up


@triton.jit
def multiply(tiles, values, sums, WEIGHT_LEFT: tl.constexpr, GATED: tl.constexpr):
    """`sums` plus the products of tiles of the weight [outputs, inputs] and one of the rows [rows, inputs]."""
    gate, up = tiles
    acc, acc_up = sums
    if WEIGHT_LEFT:
        acc = tl.dot(gate, values.T, acc)
        if GATED:
            acc_up = tl.dot(up, values.T, acc_up)
    else:
        acc = tl.dot(values, gate.T, acc)
        if GATED:
            acc_up = tl.dot(values, up.T, acc_up)
    return acc, acc_up


@triton.jit
def finish(acc, bias, outputs, exists, WEIGHT_LEFT: tl.constexpr):
    """[rows, outputs] in float32, bias added."""
    if WEIGHT_LEFT:
        acc = acc.T
    if bias is not None:
        acc += tl.load(bias + outputs, mask=exists, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["num_rows"])
def skinny_tile(
    x,
    weight,
    boxes,
    bias,
    out,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    WEIGHT_LEFT: tl.constexpr,
    GATED: tl.constexpr,
    ADDS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: all rows of x times a tile of outputs; if GATED, up rows of the weight come N after gate rows."""
    WHOLE: tl.constexpr = K % INPUTS == 0 and N % OUTPUTS == 0
    first = tl.program_id(0) * OUTPUTS
    outputs, inputs, rows = first + tl.arange(0, OUTPUTS), tl.arange(0, INPUTS), tl.arange(0, ROWS)
    exists, used = outputs < N, rows < num_rows
    from_gate = weight + outputs[:, None].to(tl.int64) * K + inputs[None, :]
    from_x = x + rows[:, None] * K + inputs[None, :]
    to_out = out + rows[:, None] * N + outputs[None, :]
    stored = used[:, None] & exists[None, :]
    acc = tl.zeros([OUTPUTS, ROWS] if WEIGHT_LEFT else [ROWS, OUTPUTS], tl.float32)
    sums = (acc, acc)
    await_earlier(PDL)
    if ADDS:
        held = tl.load(to_out, mask=stored, other=0.0)
    for start in tl.range(0, K, INPUTS, num_stages=STAGES):
        inside = start + inputs < K
        tiles = load_weights(boxes, from_gate, first, start, exists, inside, N, K, GATED, WHOLE)
        values = tl.load(from_x + start, mask=used[:, None] & inside[None, :], other=0.0)
        sums = multiply(tiles, values, sums, WEIGHT_LEFT, GATED)
    release_later(PDL)
    result = finish(sums[0], bias, outputs, exists, WEIGHT_LEFT)
    if GATED:
        up_bias = None if bias is None else bias + N
        result = silu(result) * finish(sums[1], up_bias, outputs, exists, WEIGHT_LEFT)
    if ADDS:
        result += held.to(tl.float32)
    tl.store(to_out, result.to(out.dtype.element_ty), mask=stored)
