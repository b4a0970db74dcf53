"""A linear layer of one row, limited by the bandwidth that reads the weight.

A program owns whole rows of the weight and sums in registers; nothing is staged, thousands of programs keep enough
loads in flight. The first of them are requested before the kernel waits for the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.gpu.dependent_launch import await_earlier, dependent, release_later
from twostroke_kernels.gpu.fusion import Fusion, output_for, output_width

_HEAD_WIDTH = 65536


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """Tile of the weight, [outputs, inputs] a step (if gated: of the gate rows, and as many up rows)."""

    outputs: int
    inputs: int
    num_warps: int = 4


def gemv_config(width_out: int, width_in: int, gated: bool) -> GemvConfig:
    """8 to 16 KB of weights in flight a program; where programs are many, each has one row (if gated, one pair)."""
    if width_in % 4096 == 0 and (gated or width_out >= _HEAD_WIDTH):
        return GemvConfig(outputs=1, inputs=4096, num_warps=8 if gated else 4)
    inputs = min(2048, triton.next_power_of_2(width_in))
    if width_in >= 2 * width_out and not gated:
        return GemvConfig(outputs=4, inputs=inputs, num_warps=8)
    return GemvConfig(outputs=2, inputs=inputs)


def gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: GemvConfig, fusion: Fusion, out: Tensor | None
) -> Tensor:
    """x [1, in], weight [out, in] -> [1, out]."""
    out = output_for(x, weight, bias, fusion, out)
    width_out, norm = output_width(weight, fusion), fusion.norm
    gemv_rows[(triton.cdiv(width_out, config.outputs),)](
        x.contiguous(),
        None if norm is None else norm.weight.contiguous(),
        weight,
        None if bias is None else bias.contiguous(),
        out,
        0.0 if norm is None else norm.eps,
        N=width_out,
        K=weight.shape[1],
        OUTPUTS=config.outputs,
        INPUTS=config.inputs,
        GATED=fusion.gated,
        ADDS=fusion.adds,
        num_warps=config.num_warps,
        **dependent(x.device),
    )
    return out


@triton.jit
def load_tile(pointers, rows, columns, WHOLE: tl.constexpr):
    """A tile whose `rows` and `columns` (masks) exist; masks cost instructions, so WHOLE tiles go without.

    A weight is read once, so it leaves the cache first.
    """
    if WHOLE:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=rows[:, None] & columns[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def load_inputs(pointers, inside, WHOLE: tl.constexpr):
    """Part of a row of inputs, in float32."""
    if WHOLE:
        return tl.load(pointers).to(tl.float32)
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_values(x, norm_weight, squares, at, inside, WHOLE: tl.constexpr):
    """(part of the row, times the norm's weights if there are; `squares` plus the part's own)."""
    values = load_inputs(x + at, inside, WHOLE)
    if norm_weight is not None:
        squares += values * values
        values *= load_inputs(norm_weight + at, inside, WHOLE)
    return values, squares


@triton.jit
def sum_up(acc, squares, bias, norm_weight, eps, outputs, exists, K: tl.constexpr):
    """The outputs of a program, from what its threads hold."""
    total = tl.sum(acc, 1)
    if norm_weight is not None:
        total *= 1 / tl.sqrt_rn(tl.sum(squares, 0) / K + eps)
    if bias is not None:
        total += tl.load(bias + outputs, mask=exists, other=0.0).to(tl.float32)
    return total


@triton.jit
def silu(x):
    """x * sigmoid(x); 0 where x is far below."""
    return x / (1 + tl.exp(-x))


@triton.jit
def gemv_rows(
    x,
    norm_weight,
    weight,
    bias,
    out,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GATED: tl.constexpr,
    ADDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program: OUTPUTS rows of the weight, whole; if GATED, up rows come N after gate rows.

    With a norm every program takes the row's mean square anew: that costs less than a kernel of its own.
    """
    WHOLE: tl.constexpr = K % INPUTS == 0 and N % OUTPUTS == 0
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, INPUTS)
    exists = outputs < N
    from_gate = weight + outputs[:, None].to(tl.int64) * K + inputs[None, :]
    from_up = from_gate + N * K
    gate = load_tile(from_gate, exists, inputs < K, WHOLE)
    if GATED:
        up = load_tile(from_up, exists, inputs < K, WHOLE)
    await_earlier(PDL)
    if ADDS:
        held = tl.load(out + outputs, mask=exists, other=0.0).to(tl.float32)
    squares = tl.zeros([INPUTS], tl.float32)
    acc = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    acc_up = acc
    for start in tl.static_range(0, K, INPUTS):
        inside = start + inputs < K
        if start > 0:
            gate = load_tile(from_gate + start, exists, inside, WHOLE)
            if GATED:
                up = load_tile(from_up + start, exists, inside, WHOLE)
        values, squares = load_values(x, norm_weight, squares, start + inputs, inside, WHOLE=K % INPUTS == 0)
        acc += gate.to(tl.float32) * values[None, :]
        if GATED:
            acc_up += up.to(tl.float32) * values[None, :]
    release_later(PDL)
    total = sum_up(acc, squares, bias, norm_weight, eps, outputs, exists, K)
    if GATED:
        up_bias = None if bias is None else bias + N
        total = silu(total) * sum_up(acc_up, squares, up_bias, norm_weight, eps, outputs, exists, K)
    if ADDS:
        total += held
    tl.store(out + outputs, total.to(out.dtype.element_ty), mask=exists)
