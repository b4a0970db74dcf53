"""KV items converted between a pool's number format and a wire's, in one pass with gathering and digesting.

A program takes some heads of some tokens (rows) of one item. What it makes leaves as 32-bit words, `PER` numbers in
each, which are also what the digest is made of.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.backend import SCALE_FLOOR, KVWire
from twostroke_kernels.gpu.wire_words import (
    bfloat16_code,
    e4m3_code,
    e4m3_number,
    float16_code,
    int8_code,
    multipliers,
)

_TILE = 4096
_NUM_WARPS = 4
_FLOOR = tl.constexpr(SCALE_FLOOR)
_FLOAT32, _BFLOAT16, _FLOAT16, _E4M3, _INT8 = (tl.constexpr(code) for code in range(5))
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3, torch.int8: 4}
_CODES = {4: torch.int32, 2: torch.int16}


def encode(
    pool: Tensor, items: Tensor, first_layer: int, num_layers: int, wire: KVWire, into: Tensor, digest: Tensor
) -> None:
    """Fills `into`, int32 [n, words], and adds to `digest` [n], which must be zero."""
    shape = _Shape(pool, num_layers, wire)
    encode_rows[shape.grid(items)](
        pool, items, into, digest, pool.stride(0), first_layer * pool.stride(1), into.shape[1], shape.num_rows,
        wire.peak, *shape.constants, _FORMATS[wire.dtype], num_warps=_NUM_WARPS,
    )  # fmt: skip


def decode(pool: Tensor, items: Tensor, first_layer: int, source: Tensor, wire: KVWire) -> None:
    """`source`, int32 [n, words], into the pool."""
    num_layers = source.shape[1] * 4 // wire.layer_bytes(pool.shape[4], pool.shape[5])
    shape = _Shape(pool, num_layers, wire)
    decode_rows[shape.grid(items)](
        pool.view(_CODES[pool.dtype.itemsize]), items, source, pool.stride(0), first_layer * pool.stride(1),
        source.shape[1], shape.num_rows, *shape.constants, _FORMATS[wire.dtype], _FORMATS[pool.dtype],
        num_warps=_NUM_WARPS,
    )  # fmt: skip


class _Shape:
    """How an item's rows are cut into programs."""

    def __init__(self, pool: Tensor, num_layers: int, wire: KVWire) -> None:
        if not pool.is_contiguous():
            raise ValueError(f"pool: must be contiguous, not of strides {pool.stride()}")
        num_heads, head_size = pool.shape[4:]
        run = wire.block_size * num_heads
        self.num_rows = num_layers * 2 * run
        size, per = triton.next_power_of_2(head_size), 4 // wire.dtype.itemsize
        self._rows = max(1, _TILE // size)
        self.constants = (wire.split(pool), run, head_size, size, self._rows, per)

    def grid(self, items: Tensor) -> tuple[int, int]:
        """Items, then tiles of rows."""
        return items.shape[0], triton.cdiv(self.num_rows, self._rows)


@triton.jit
def pool_rows(item, row, stride, first, SPLIT: tl.constexpr, RUN: tl.constexpr, D: tl.constexpr):
    """Offset in the pool of an item's rows: heads of tokens of layers, `RUN` of which lie together."""
    place = row // RUN * (RUN * SPLIT) + item % SPLIT * RUN + row % RUN
    return item // SPLIT * stride + first + place.to(tl.int64) * D


@triton.jit(do_not_specialize_on_alignment=["items"])
def encode_rows(
    pool, items, into, digest, stride, first, size, num_rows, peak,
    SPLIT: tl.constexpr, RUN: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    PER: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """One tile of rows: loaded, scaled, rounded, stored and digested."""
    place = tl.program_id(0).to(tl.int64)
    item = tl.load(items + place).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, SIZE)
    inside = (row < num_rows)[:, None] & (column < D)[None, :]
    offsets = pool_rows(item, row, stride, first, SPLIT, RUN, D)[:, None] + column[None, :]
    x = tl.load(pool + offsets, mask=inside, other=0).to(tl.float32)
    total = tl.zeros((), tl.int64)
    if FORMAT >= _E4M3:  # both have scales
        largest = tl.max(tl.abs(x), 1)
        is_bad = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 1) > 0
        scale = tl.maximum(tl.div_rn(largest, tl.zeros_like(largest) + peak), _FLOOR)
        x = tl.where(is_bad[:, None], 0.0, tl.div_rn(x, tl.zeros_like(x) + scale[:, None]))
        bits = tl.where(is_bad, 0x7FC00000, scale.to(tl.int32, bitcast=True))
        scale_at = num_rows * (D // 4) + row
        tl.store(into + place * size + scale_at, bits, mask=row < num_rows)
        total += tl.sum(tl.where(row < num_rows, bits.to(tl.int64) * multipliers(scale_at), 0), 0)
    if FORMAT == _FLOAT32:
        words = x.to(tl.int32, bitcast=True)
    else:
        if FORMAT == _BFLOAT16:
            code = bfloat16_code(x)
        elif FORMAT == _FLOAT16:
            code = float16_code(x)
        elif FORMAT == _E4M3:
            code = e4m3_code(x)
        else:
            code = int8_code(x)
        shift = tl.arange(0, PER) * (32 // PER)
        words = tl.sum(tl.reshape(code, (ROWS, SIZE // PER, PER)) << shift[None, None, :], 2)
    word = tl.arange(0, SIZE // PER)
    at = row[:, None] * (D // PER) + word[None, :]
    stored = (row < num_rows)[:, None] & (word < D // PER)[None, :]
    tl.store(into + place * size + at, words, mask=stored)
    products = tl.where(stored, words.to(tl.int64) * multipliers(at), 0)
    total += tl.sum(tl.sum(products, 1), 0)
    tl.atomic_add(digest + place, total, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["items"])
def decode_rows(
    pool, items, source, stride, first, size, num_rows,
    SPLIT: tl.constexpr, RUN: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    PER: tl.constexpr, FORMAT: tl.constexpr, POOL_FORMAT: tl.constexpr,
):  # fmt: skip
    """The way back; `pool` is seen as integers of its width."""
    place = tl.program_id(0).to(tl.int64)
    item = tl.load(items + place).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    word = tl.arange(0, SIZE // PER)
    stored = (row < num_rows)[:, None] & (word < D // PER)[None, :]
    words = tl.load(source + place * size + row[:, None] * (D // PER) + word[None, :], mask=stored, other=0)
    if FORMAT == _FLOAT32:
        x = words.to(tl.float32, bitcast=True)
    else:
        shift = tl.arange(0, PER) * (32 // PER)
        code = tl.reshape((words[:, :, None] >> shift[None, None, :]) & ((1 << (32 // PER)) - 1), (ROWS, SIZE))
        if FORMAT == _BFLOAT16:
            x = (code << 16).to(tl.float32, bitcast=True)
        elif FORMAT == _FLOAT16:
            x = code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            if FORMAT == _E4M3:
                x = e4m3_number(code)
            else:
                x = ((code << 24) >> 24).to(tl.float32)
            scale_at = place * size + num_rows * (D // 4) + row
            bits = tl.load(source + scale_at, mask=row < num_rows, other=0)
            x = x * bits.to(tl.float32, bitcast=True)[:, None]
    if POOL_FORMAT == _FLOAT32:
        values = x.to(tl.int32, bitcast=True)
    elif POOL_FORMAT == _BFLOAT16:
        values = bfloat16_code(x).to(tl.int16)
    else:
        values = float16_code(x).to(tl.int16)
    column = tl.arange(0, SIZE)
    inside = (row < num_rows)[:, None] & (column < D)[None, :]
    offsets = pool_rows(item, row, stride, first, SPLIT, RUN, D)[:, None] + column[None, :]
    tl.store(pool + offsets, values, mask=inside)
