"""Causal attention of prompt chunks over the paged cache, many sequences of any length in one launch.

A program takes a tile of queries of one head and walks over its keys. Tiles of all sequences lie in one list whose
length the host can bound without reading a length from the device; the last tiles, which see the most keys, start
first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.backend import PagedBatch
from twostroke_kernels.gpu.hopper_prefill import LONG, HopperConfig, hopper_prefill_attention, suits_hopper
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

_LOG2_E = 1 / math.log(2)
_LONG = 2048


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the work is cut."""

    queries: int
    """Query rows a program."""
    keys: int
    """Keys a step."""
    num_warps: int
    num_stages: int
    tma: bool
    max_registers: int | None
    """A thread's, where a cap lets two programs share a multiprocessor."""


def prefill_config(kv_layer: Tensor, max_query_len: int) -> PrefillConfig:
    """Tall tiles for long chunks; the cap on registers took 8k tokens from 349 to 493 TFLOP/s on an H100."""
    row_bytes = triton.next_power_of_2(kv_layer.shape[4]) * kv_layer.element_size()
    if kv_layer.dtype == torch.float32:
        return PrefillConfig(32, 32, 4, 1, tma=False, max_registers=None)
    if row_bytes > 256:
        return PrefillConfig(64, 32, 4, 2, suits_tma(kv_layer, 32), None)
    tma = suits_tma(kv_layer, 64)
    if max_query_len < _LONG:
        return PrefillConfig(64, 64, 4, 2, tma, None)
    return PrefillConfig(128, 64, 8, 2, tma, 128 if tma else None)


def fixed_prefill_config(q: Tensor, kv_layer: Tensor) -> PrefillConfig | HopperConfig:
    """The one for long prompts, whatever their lengths: the batch-invariant mode's."""
    return LONG if suits_hopper(q, kv_layer) else prefill_config(kv_layer, _LONG)


def prefill_attention(
    q: Tensor,
    kv_layer: Tensor,
    batch: PagedBatch,
    scale: float,
    config: PrefillConfig | HopperConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `Backend.prefill_attention`. Without a `config`, Hopper's own kernel where it suits, else the plain one."""
    check_layer(q, kv_layer)
    q = dense_heads(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if q.shape[0] == 0:
        return out
    if isinstance(config, HopperConfig) or (config is None and suits_hopper(q, kv_layer)):
        hopper_prefill_attention(q, kv_layer, batch, scale, out, config)
    else:
        _plain(q, kv_layer, batch, scale, config or prefill_config(kv_layer, batch.max_query_len), out)
    return out


def _plain(q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, config: PrefillConfig, out: Tensor) -> None:
    num_tokens, num_heads, head_size = q.shape
    _, _, block_size, num_kv_heads, _ = kv_layer.shape
    # A sequence has at most one tile more than its share of the whole.
    max_tiles = num_tokens // config.queries + batch.num_sequences
    extra = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    prefill_tile[(num_heads, max_tiles)](
        q,
        kv_layer,
        layer_rows(kv_layer, config.keys) if config.tma else None,
        batch.block_tables,
        batch.query_starts,
        batch.context_lens,
        out,
        q.stride(0),
        kv_layer.stride(0),
        batch.block_tables.stride(0),
        batch.num_sequences,
        scale * _LOG2_E,
        GROUP=num_heads // num_kv_heads,
        HEADS=num_kv_heads,
        D=head_size,
        DIMS=triton.next_power_of_2(head_size),
        BLOCK=block_size,
        QUERIES=config.queries,
        KEYS=config.keys,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        **extra,
    )


@triton.jit
def locate_tile(query_starts: tl.tensor, num_sequences: tl.tensor, index: tl.tensor, QUERIES: tl.constexpr) -> tl.tuple:
    """(sequence, tile within it) of the list's tile `index`: a sequence's first is `start // QUERIES + sequence`."""
    LANES: tl.constexpr = 128
    lanes = tl.arange(0, LANES)
    before = tl.zeros([LANES], tl.int32)
    for first in range(0, num_sequences, LANES):
        sequences = first + lanes
        exists = sequences < num_sequences
        starts = tl.load(query_starts + sequences, mask=exists, other=0).to(tl.int32)
        before += (exists & (starts // QUERIES + sequences <= index)).to(tl.int32)
    sequence = tl.sum(before, 0) - 1
    return sequence, index - tl.load(query_starts + sequence).to(tl.int32) // QUERIES - sequence


@triton.jit(
    do_not_specialize=["table_stride", "num_sequences"],
    do_not_specialize_on_alignment=["tables", "query_starts", "context_lens"],
)
def prefill_tile(
    q: tl.tensor,
    layer: tl.tensor,
    boxes: tl.tensor_descriptor,
    tables: tl.tensor,
    query_starts: tl.tensor,
    context_lens: tl.tensor,
    out: tl.tensor,
    q_stride: tl.tensor,
    block_stride: tl.tensor,
    table_stride: tl.tensor,
    num_sequences: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Keys come in three stretches: seen by every query, crossing the diagonal, and the cache's last, unfilled tile."""
    TMA: tl.constexpr = boxes is not None
    ROW: tl.constexpr = HEADS * D
    head = tl.program_id(0)
    sequence, tile = locate_tile(query_starts, num_sequences, tl.num_programs(1) - 1 - tl.program_id(1), QUERIES)
    first_row = tl.load(query_starts + sequence)
    query_len = (tl.load(query_starts + sequence + 1) - first_row).to(tl.int32)
    if tile * QUERIES >= query_len:
        return
    context_len = tl.load(context_lens + sequence).to(tl.int32)
    table = tables + sequence.to(tl.int64) * table_stride
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    exists = rows < query_len
    positions = context_len - query_len + rows
    first_position = context_len - query_len + tile * QUERIES
    end = tl.minimum(first_position + QUERIES, context_len)
    diagonal = (first_position + 1) // KEYS * KEYS
    dims = tl.arange(0, DIMS)
    queries = load_rows(q + head * D, (first_row + rows) * q_stride, dims, exists, D, True)
    state = nothing_yet(QUERIES, DIMS)
    slots = (table, layer + head // GROUP * D, block_stride)
    if TMA:
        rest = tl.minimum(end, context_len // KEYS * KEYS)
        place = (table, head // GROUP * D, (block_stride // ROW).to(tl.int32))
        state = fold_boxes(state, queries, positions, boxes, place, 0, diagonal, scale, False, BLOCK, KEYS, STAGES)
        state = fold_boxes(state, queries, positions, boxes, place, diagonal, rest, scale, True, BLOCK, KEYS, STAGES)
        # Only a context's last, unfilled tile may be left: one step, to start where the loop above should have stopped.
        rest = tl.cdiv(rest, KEYS) * KEYS
    else:
        rest = diagonal
        state = fold_slots(state, queries, positions, slots, 0, rest, rest, scale, False, D, ROW, BLOCK, KEYS, STAGES)
    LOADS: tl.constexpr = 1 if TMA else STAGES
    _, total, acc = fold_slots(
        state, queries, positions, slots, rest, end, context_len, scale, True, D, ROW, BLOCK, KEYS, LOADS
    )
    acc = acc / total[:, None]
    pointers = out + (first_row + rows)[:, None] * (HEADS * GROUP * D) + head * D + dims[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=exists[:, None] & (dims < D)[None, :])
