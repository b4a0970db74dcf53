"""Attention of one query per sequence over the paged cache, the context split over programs (FlashDecoding).

A program takes the query heads of one KV head and one stretch of the context; a second kernel adds the stretches up.
All it needs of the host are counts that a captured graph may fix: lengths and blocks are read on the device, which
also decides from a sequence's own length how many stretches it is cut into.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.backend import PagedBatch
from twostroke_kernels.gpu.dependent_launch import await_earlier, dependent, release_later
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
_ENOUGH_PROGRAMS_OF_A_PAIR = 512
_MAX_SPLITS = 64
_FIXED_CHUNK = 16
_LOG2_E = 1 / math.log(2)


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How the work is cut."""

    tile: int
    """Keys a step."""
    num_splits: int
    """Programs that share the context of a sequence and a KV head."""
    num_warps: int
    num_stages: int
    tma: bool
    fixed_stretch: int | None = None
    """Keys of a stretch, a multiple of `tile`: then a sequence's bits depend on no other sequence, nor on `num_splits`.
    None: as many as spread a sequence evenly over its programs."""


def decode_config(
    kv_layer: Tensor, num_sequences: int, max_context_len: int, fixed_stretch: int | None = None
) -> DecodeConfig:
    """Enough programs to fill the card, but never more than there are stretches (of a tile at least).

    Few sequences get more: a long context gains by it, and on a short one those that have no part end at once.
    """
    num_kv_heads, head_size = kv_layer.shape[3:]
    tile = 64 if triton.next_power_of_2(head_size) * kv_layer.element_size() <= 256 else 32
    programs = max(num_sequences, 1) * num_kv_heads
    enough = _ENOUGH_PROGRAMS_OF_A_PAIR if num_sequences <= 2 else _ENOUGH_PROGRAMS
    most = min(_MAX_SPLITS, max_context_len // (fixed_stretch or tile))
    num_splits = 1
    while num_splits * programs < enough and 2 * num_splits <= most:
        num_splits *= 2
    return DecodeConfig(tile, num_splits, 4, 2, suits_tma(kv_layer, tile), fixed_stretch)


def decode_attention(
    q: Tensor,
    kv_layer: Tensor,
    batch: PagedBatch,
    scale: float,
    config: DecodeConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `Backend.decode_attention`. A sequence whose context is empty gets zeros.

    Raises:
        ValueError: tensors, or a config, that do not fit each other.
    """
    check_layer(q, kv_layer)
    q = dense_heads(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} does not fit q {tuple(q.shape)} {q.dtype}")
    if q.shape[0] == 0:
        return out
    config = config or decode_config(kv_layer, q.shape[0], batch.max_context_len)
    num_parts = _num_parts(config, batch.max_context_len)
    if num_parts == 1:
        _attend(q, kv_layer, batch, scale, config, (out, None))
        return out
    shape = (q.shape[0], q.shape[1], num_parts)
    partial = torch.empty((*shape, q.shape[2]), dtype=torch.float32, device=q.device)
    weights = torch.empty(shape, dtype=torch.float32, device=q.device)
    _attend(q, kv_layer, batch, scale, config, (partial, weights))
    _reduce(partial, weights, batch, config, out)
    return out


def _num_parts(config: DecodeConfig, max_context_len: int) -> int:
    """Stretches that the longest context may have."""
    stretch = config.fixed_stretch
    if stretch is None:
        return config.num_splits
    if stretch <= 0 or stretch % config.tile:
        raise ValueError(f"fixed_stretch {stretch}: not a multiple of the tile of {config.tile} keys")
    return max(-(-max_context_len // stretch), 1)


def _attend(
    q: Tensor,
    kv_layer: Tensor,
    batch: PagedBatch,
    scale: float,
    config: DecodeConfig,
    results: tuple[Tensor, Tensor | None],
) -> None:
    _, _, block_size, num_kv_heads, head_size = kv_layer.shape
    group = q.shape[1] // num_kv_heads
    out, weights = results
    decode_split[(num_kv_heads, 1 if weights is None else config.num_splits, q.shape[0])](
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
        1 if weights is None else weights.shape[2],
        config.num_splits,
        scale * _LOG2_E,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        HEADS=num_kv_heads,
        D=head_size,
        DIMS=triton.next_power_of_2(head_size),
        BLOCK=block_size,
        TILE=config.tile,
        STRETCH=config.fixed_stretch or 0,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        **dependent(q.device),
    )


def _reduce(partial: Tensor, weights: Tensor, batch: PagedBatch, config: DecodeConfig, out: Tensor) -> None:
    num_sequences, num_heads, num_parts, head_size = partial.shape
    at_once = triton.next_power_of_2(num_parts) if config.fixed_stretch is None else _FIXED_CHUNK
    decode_reduce[(num_sequences * num_heads,)](
        partial,
        weights,
        batch.context_lens,
        out,
        num_parts,
        config.num_splits,
        HEADS=num_heads,
        D=head_size,
        DIMS=triton.next_power_of_2(head_size),
        TILE=config.tile,
        STRETCH=config.fixed_stretch or 0,
        CHUNK=at_once,
        # What multiplies the result has weights to request while it waits.
        EARLY=num_sequences == 1,
        num_warps=4,
        **dependent(out.device),
    )


@triton.jit
def cut(context_len: tl.tensor, num_splits: tl.tensor, TILE: tl.constexpr, STRETCH: tl.constexpr) -> tl.tuple:
    """(keys of a stretch, stretches that are not empty): as many keys as STRETCH says, else an even share in tiles."""
    if STRETCH > 0:
        stretch = tl.zeros_like(context_len) + STRETCH
    else:
        stretch = tl.maximum(tl.cdiv(tl.cdiv(context_len, TILE), num_splits), 1) * TILE
    return stretch, tl.cdiv(context_len, stretch)


@triton.jit
def attend(
    queries: tl.tensor,
    boxes: tl.tensor_descriptor,
    place: tl.tuple,
    first: tl.tensor,
    last: tl.tensor,
    scale: tl.tensor,
    D: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tuple:
    """(attention over the keys `first` to `last`, logarithm of its weight); zeros if there are none."""
    table, layer, kv_head, block_stride = place
    state = nothing_yet(queries.shape[0], queries.shape[1])
    rest = first
    if boxes is not None:
        # Slots after the context may hold NaN: whole tiles come as boxes, the last by copies that fill up with zeros.
        # No tile is touched but by a product: what is also masked in registers costs both registers and memory.
        rest = first + tl.maximum(last - first, 0) // TILE * TILE
        boxed = (table, kv_head * D, (block_stride // ROW).to(tl.int32))
        state = fold_boxes(state, queries, None, boxes, boxed, first, rest, scale, False, BLOCK, TILE, STAGES)
    newest = tl.zeros([queries.shape[0]], tl.int32) + last - 1
    slots = (table, layer + kv_head * D, block_stride)
    best, total, acc = fold_slots(
        state, queries, newest, slots, rest, last, last, scale, True, D, ROW, BLOCK, TILE, STAGES
    )
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    weight = tl.where(nothing, -float("inf"), best * scale + tl.math.log2(total))
    return acc / total[:, None], weight


@triton.jit
def store_part(
    out: tl.tensor, out_weights: tl.tensor, rows: tl.tensor, result: tl.tensor, weight: tl.tensor, stored: tl.tuple
) -> None:
    """One stretch's own result, and its weight, for each head."""
    head_exists, dims, D = stored
    tl.store(out_weights + rows, weight, mask=head_exists)
    pointers = out + rows[:, None] * D + dims[None, :]
    tl.store(pointers, result, mask=head_exists[:, None] & (dims < D)[None, :])


@triton.jit(
    do_not_specialize=["table_stride", "num_parts", "num_splits"],
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
    num_parts: tl.tensor,
    num_splits: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STRETCH: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """With `out_weights`, `out` is each stretch's own result and they are the logarithms of its weight in the whole.

    A program takes every `num_splits`-th stretch: one or none, unless their length is fixed.
    """
    ROW: tl.constexpr = HEADS * D
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    context_len = tl.load(context_lens + sequence).to(tl.int32)
    table = tables + sequence * table_stride
    heads = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    head_exists = heads < GROUP
    head_offsets = (kv_head * GROUP + heads) * D
    row = sequence * (HEADS * GROUP) + kv_head * GROUP + heads
    await_earlier(PDL)
    queries = load_rows(q + sequence * q_stride, head_offsets, dims, head_exists, D, True)
    place = (table, layer, kv_head, block_stride)
    if out_weights is None:
        result, _ = attend(queries, boxes, place, 0, context_len, scale, D, ROW, BLOCK, TILE, STAGES)
        pointers = out + row[:, None] * D + dims[None, :]
        tl.store(pointers, result.to(out.dtype.element_ty), mask=head_exists[:, None] & (dims < D)[None, :])
    else:
        stretch, used = cut(context_len, num_splits, TILE, STRETCH)
        row *= num_parts
        if STRETCH > 0:
            for part in tl.range(split, used, num_splits, num_stages=1):
                last = tl.minimum(part * stretch + stretch, context_len)
                result, weight = attend(queries, boxes, place, part * stretch, last, scale, D, ROW, BLOCK, TILE, STAGES)
                store_part(out, out_weights, row + part, result, weight, (head_exists, dims, D))
        elif split < used:
            last = tl.minimum(split * stretch + stretch, context_len)
            result, weight = attend(queries, boxes, place, split * stretch, last, scale, D, ROW, BLOCK, TILE, STAGES)
            store_part(out, out_weights, row + split, result, weight, (head_exists, dims, D))
    release_later(PDL)


@triton.jit(
    do_not_specialize=["num_parts", "num_splits"],
    do_not_specialize_on_alignment=["context_lens"],
)
def decode_reduce(
    partial: tl.tensor,
    weights: tl.tensor,
    context_lens: tl.tensor,
    out: tl.tensor,
    num_parts: tl.tensor,
    num_splits: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    STRETCH: tl.constexpr,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One program adds up the stretches of one sequence's query head, in their order, CHUNK at once."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, DIMS)
    _, used = cut(tl.load(context_lens + row // HEADS).to(tl.int32), num_splits, TILE, STRETCH)
    best = -float("inf")
    total = 0.0
    acc = tl.zeros([DIMS], tl.float32)
    release_later(PDL and EARLY)
    await_earlier(PDL)
    for start in tl.range(0, used, CHUNK, num_stages=1):
        parts = start + tl.arange(0, CHUNK)
        there = parts < used
        logs = tl.load(weights + row * num_parts + parts, mask=there, other=-float("inf"))
        pointers = partial + (row * num_parts + parts)[:, None] * D + dims[None, :]
        values = tl.load(pointers, mask=there[:, None] & (dims < D)[None, :], other=0.0)
        new_best = tl.maximum(best, tl.max(logs, 0))
        shares = tl.math.exp2(logs - new_best)
        shrink = tl.math.exp2(best - new_best)
        total = total * shrink + tl.sum(shares, 0)
        acc = acc * shrink + tl.sum(values * shares[:, None], 0)
        best = new_best
    release_later(PDL and not EARLY)
    result = acc / tl.where(total == 0, 1.0, total)
    tl.store(out + row * D + dims, result.to(out.dtype.element_ty), mask=dims < D)
