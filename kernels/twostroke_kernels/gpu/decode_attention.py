"""Attention of one query per sequence over the paged cache, the context split over programs (FlashDecoding).

A program takes the query heads of one KV head and one stretch of the context; a second kernel adds the stretches up.
All it needs of the host are counts that a captured graph may fix: lengths and blocks are read on the device, and a
sequence shorter than the longest is split just as evenly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.backend import PagedBatch
from twostroke_kernels.gpu.paged_kv import (
    check_layer,
    dense_heads,
    fold_boxes,
    fold_slots,
    layer_rows,
    load_rows,
    nothing_yet,
    suits_tma,
)

_ENOUGH_PROGRAMS = 256
_MAX_SPLITS = 64
_LOG2_E = 1 / math.log(2)


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the work is cut."""

    tile: int
    """Keys a step."""
    num_splits: int
    num_warps: int
    num_stages: int
    tma: bool


def decode_config(kv_layer: Tensor, num_sequences: int, max_context_len: int) -> DecodeConfig:
    """Enough programs to fill the card, but never more stretches than tiles."""
    num_kv_heads, head_size = kv_layer.shape[3:]
    tile = 64 if triton.next_power_of_2(head_size) * kv_layer.element_size() <= 256 else 32
    num_splits, programs = 1, max(num_sequences, 1) * num_kv_heads
    while num_splits * programs < _ENOUGH_PROGRAMS and 2 * num_splits <= min(_MAX_SPLITS, max_context_len // tile):
        num_splits *= 2
    return DecodeConfig(tile, num_splits, num_warps=4, num_stages=2, tma=suits_tma(kv_layer, tile))


def decode_attention(
    q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, config: DecodeConfig | None = None
) -> Tensor:
    """See `Backend.decode_attention`. A sequence whose context is empty gets zeros."""
    check_layer(q, kv_layer)
    q = dense_heads(q)
    num_sequences, num_heads, head_size = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_sequences == 0:
        return out
    config = config or decode_config(kv_layer, num_sequences, batch.max_context_len)
    if config.num_splits == 1:
        _attend(q, kv_layer, batch, scale, config, out, None)
        return out
    shape = (num_sequences, num_heads, config.num_splits)
    partial = torch.empty((*shape, head_size), dtype=torch.float32, device=q.device)
    weights = torch.empty(shape, dtype=torch.float32, device=q.device)
    _attend(q, kv_layer, batch, scale, config, partial, weights)
    decode_reduce[(num_sequences * num_heads,)](
        partial,
        weights,
        out,
        NUM_SPLITS=config.num_splits,
        SPLITS=triton.next_power_of_2(config.num_splits),
        D=head_size,
        DIMS=triton.next_power_of_2(head_size),
        num_warps=4,
    )
    return out


def _attend(
    q: Tensor,
    kv_layer: Tensor,
    batch: PagedBatch,
    scale: float,
    config: DecodeConfig,
    out: Tensor,
    weights: Tensor | None,
) -> None:
    _, _, block_size, num_kv_heads, head_size = kv_layer.shape
    group = q.shape[1] // num_kv_heads
    decode_split[(num_kv_heads, config.num_splits, q.shape[0])](
        q,
        kv_layer,
        layer_rows(kv_layer, config.tile) if config.tma else None,
        batch.block_tables,
        batch.context_lens,
        out,
        weights,
        q.stride(0),
        kv_layer.stride(0),
        batch.block_tables.stride(0),
        config.num_splits,
        scale * _LOG2_E,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        HEADS=num_kv_heads,
        D=head_size,
        DIMS=triton.next_power_of_2(head_size),
        BLOCK=block_size,
        TILE=config.tile,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )


@triton.jit(
    do_not_specialize=["table_stride", "num_splits"],
    do_not_specialize_on_alignment=["tables", "context_lens"],
)
def decode_split(
    q: tl.tensor,
    layer: tl.tensor,
    boxes: tl.tensor_descriptor,
    tables: tl.tensor,
    context_lens: tl.tensor,
    out: tl.tensor,
    out_weights: tl.tensor,
    q_stride: tl.tensor,
    block_stride: tl.tensor,
    table_stride: tl.tensor,
    num_splits: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """With `out_weights`, `out` is each stretch's own result and they are the logarithms of its weight in the whole."""
    TMA: tl.constexpr = boxes is not None
    ROW: tl.constexpr = HEADS * D
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    context_len = tl.load(context_lens + sequence).to(tl.int32)
    stretch = tl.cdiv(tl.cdiv(context_len, TILE), num_splits) * TILE
    first = split * stretch
    last = tl.minimum(first + stretch, context_len)
    table = tables + sequence * table_stride
    heads = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    head_exists = heads < GROUP
    head_offsets = (kv_head * GROUP + heads) * D
    queries = load_rows(q + sequence * q_stride, head_offsets, dims, head_exists, D, True)
    state = nothing_yet(ROWS, DIMS)
    rest = first
    if TMA:
        # The last slots of a context's last block may hold NaN: whole tiles come as boxes, the rest by masked loads.
        rest = first + tl.maximum(last - first, 0) // TILE * TILE
        place = (table, kv_head * D, (block_stride // ROW).to(tl.int32))
        state = fold_boxes(state, queries, None, boxes, place, first, rest, scale, False, BLOCK, TILE, STAGES)
    place = (table, layer + kv_head * D, block_stride)
    newest = tl.zeros([ROWS], tl.int32) + last - 1
    LOADS: tl.constexpr = 1 if TMA else STAGES
    best, total, acc = fold_slots(
        state, queries, newest, place, rest, last, last, scale, True, D, ROW, BLOCK, TILE, LOADS
    )
    nothing = total == 0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    row = sequence * (HEADS * GROUP) + kv_head * GROUP + heads
    if out_weights is not None:
        row = row * num_splits + split
        weight = tl.where(nothing, -float("inf"), best * scale + tl.math.log2(tl.where(nothing, 1.0, total)))
        tl.store(out_weights + row, weight, mask=head_exists)
    pointers = out + row[:, None] * D + dims[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=head_exists[:, None] & (dims < D)[None, :])


@triton.jit
def decode_reduce(
    partial: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
) -> None:
    """One program adds up the stretches of one sequence's query head."""
    row = tl.program_id(0).to(tl.int64)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, DIMS)
    logs = tl.load(weights + row * NUM_SPLITS + splits, mask=splits < NUM_SPLITS, other=-float("inf"))
    best = tl.max(logs, 0)
    shares = tl.math.exp2(logs - tl.where(best == -float("inf"), 0.0, best))
    pointers = partial + (row * NUM_SPLITS + splits)[:, None] * D + dims[None, :]
    parts = tl.load(pointers, mask=(logs > -float("inf"))[:, None] & (dims < D)[None, :], other=0.0)
    total = tl.sum(shares, 0)
    result = tl.sum(parts * shares[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + row * D + dims, result.to(out.dtype.element_ty), mask=dims < D)
