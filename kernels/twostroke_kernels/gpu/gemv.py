"""Linear layers of few rows, limited by the bandwidth that reads the weights.

One row: a program owns whole rows of the weight and sums in registers; nothing is staged, thousands of programs keep
enough loads in flight. More rows: tensor cores, over tiles of the weight, each over its whole width in one order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_ROWS = 64


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """Tile of the weight, [outputs, inputs] a step."""

    outputs: int
    inputs: int
    num_warps: int = 4


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """Tile of the weight; whether it is the left factor (then its outputs are rows of the product)."""

    outputs: int
    inputs: int
    num_warps: int
    num_stages: int
    weight_left: bool


def linear_config(num_rows: int, width_out: int, width_in: int, dtype: torch.dtype) -> GemvConfig | SkinnyConfig | None:
    """How a linear layer is done; None: by cuBLAS.

    Measured on an H100 in bfloat16 with Llama-3.1-8B's layers: up to 32 rows ours are faster by 2 to 20 % in each of
    them, at 64 rows in the wide and in the deep ones. More rows were not faster, and a GEMV of two rows was slower than
    tensor cores that are mostly idle.
    """
    if num_rows == 1:
        return gemv_config(width_in)
    if 2 <= num_rows <= _MAX_ROWS and dtype in (torch.float16, torch.bfloat16):
        return skinny_config(num_rows, width_out, width_in)
    return None


def gemv_config(width_in: int) -> GemvConfig:
    """8 KB of weights in flight a program where the width divides so, else 16 KB in narrower steps."""
    if width_in % 4096 == 0:
        return GemvConfig(outputs=1, inputs=4096)
    return GemvConfig(outputs=4, inputs=min(2048, triton.next_power_of_2(width_in)))


def skinny_config(num_rows: int, width_out: int, width_in: int) -> SkinnyConfig | None:
    """Wide layers have programs enough with large tiles; narrow ones need small tiles, deep ones long ones."""
    few = num_rows <= 32
    if width_out >= 16384:
        return SkinnyConfig(128, 128, num_warps=4 if few else 8, num_stages=4 if few else 3, weight_left=True)
    if width_in >= 2 * width_out:
        return SkinnyConfig(32, 256, num_warps=4, num_stages=4, weight_left=False)
    if few and width_in >= 1024:
        return SkinnyConfig(64, 128, num_warps=4, num_stages=5, weight_left=True)
    return None


def small_linear(x: Tensor, weight: Tensor, bias: Tensor | None, config: GemvConfig | SkinnyConfig) -> Tensor:
    """See `Backend.linear`; few rows, as `config` says."""
    width_out, width_in = weight.shape
    if x.shape[1] != width_in or x.dtype != weight.dtype or not weight.is_contiguous():
        raise ValueError(f"weight {tuple(weight.shape)} {weight.dtype} does not fit x {tuple(x.shape)} {x.dtype}")
    if bias is not None and bias.shape != (width_out,):
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    return gemv(x, weight, bias, config) if isinstance(config, GemvConfig) else skinny(x, weight, bias, config)


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None, config: GemvConfig) -> Tensor:
    """x [1, in], weight [out, in] -> [1, out]."""
    width_out, width_in = weight.shape
    out = torch.empty((1, width_out), dtype=x.dtype, device=x.device)
    gemv_rows[(triton.cdiv(width_out, config.outputs),)](
        x,
        weight,
        bias,
        out,
        N=width_out,
        K=width_in,
        OUTPUTS=config.outputs,
        INPUTS=config.inputs,
        num_warps=config.num_warps,
    )
    return out


@triton.jit
def load_tile(pointers, rows, columns, WHOLE: tl.constexpr):
    """A tile whose `rows` and `columns` (masks) exist; masks cost instructions, so WHOLE tiles go without."""
    if WHOLE:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=rows[:, None] & columns[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def gemv_rows(
    x,
    weight,
    bias,
    out,
    N: tl.constexpr,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """One program: OUTPUTS rows of the weight, whole. The weight is read once, so it leaves the cache."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, INPUTS)
    exists = outputs < N
    from_weight = weight + outputs[:, None].to(tl.int64) * K + inputs[None, :]
    acc = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    for start in tl.range(0, K, INPUTS, num_stages=1):
        inside = start + inputs < K
        w = load_tile(from_weight + start, exists, inside, WHOLE=K % INPUTS == 0 and N % OUTPUTS == 0)
        if K % INPUTS == 0:
            values = tl.load(x + start + inputs)
        else:
            values = tl.load(x + start + inputs, mask=inside, other=0.0)
        acc += w.to(tl.float32) * values.to(tl.float32)[None, :]
    total = tl.sum(acc, 1)
    if bias is not None:
        total += tl.load(bias + outputs, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + outputs, total.to(out.dtype.element_ty), mask=exists)


def skinny(x: Tensor, weight: Tensor, bias: Tensor | None, config: SkinnyConfig) -> Tensor:
    """x [up to 64, in], weight [out, in] -> [up to 64, out], half precision."""
    num_rows, width_in = x.shape
    width_out = weight.shape[0]
    out = torch.empty((num_rows, width_out), dtype=x.dtype, device=x.device)
    skinny_tile[(triton.cdiv(width_out, config.outputs),)](
        x,
        weight,
        bias,
        out,
        num_rows,
        N=width_out,
        K=width_in,
        ROWS=max(16, triton.next_power_of_2(num_rows)),
        OUTPUTS=config.outputs,
        INPUTS=config.inputs,
        WEIGHT_LEFT=config.weight_left,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def skinny_tile(
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
    WEIGHT_LEFT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: all rows of x times a tile of outputs, over the whole of K in one fixed order."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, INPUTS)
    rows = tl.arange(0, ROWS)
    exists, used = outputs < N, rows < num_rows
    from_weight = weight + outputs[:, None].to(tl.int64) * K + inputs[None, :]
    from_x = x + rows[:, None] * K + inputs[None, :]
    if WEIGHT_LEFT:
        acc = tl.zeros([OUTPUTS, ROWS], tl.float32)
    else:
        acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for start in tl.range(0, K, INPUTS, num_stages=STAGES):
        inside = start + inputs < K
        w = load_tile(from_weight + start, exists, inside, WHOLE=K % INPUTS == 0 and N % OUTPUTS == 0)
        values = tl.load(from_x + start, mask=used[:, None] & inside[None, :], other=0.0)
        if WEIGHT_LEFT:
            acc = tl.dot(w, values.T, acc)
        else:
            acc = tl.dot(values, w.T, acc)
    if WEIGHT_LEFT:
        acc = acc.T
    if bias is not None:
        acc += tl.load(bias + outputs, mask=exists, other=0.0).to(tl.float32)[None, :]
    to_out = out + rows[:, None] * N + outputs[None, :]
    tl.store(to_out, acc.to(out.dtype.element_ty), mask=used[:, None] & exists[None, :])
