"""Causal attention of prompt chunks for Hopper cards, in Gluon: the arrangement of FlashAttention-3 on a paged pool.

A program takes 128 queries of one head. One warp fetches keys and values through the tensor memory accelerator into a
ring in shared memory; two warpgroups of 64 queries each multiply. A warpgroup issues the scores of step i and the
values' product of step i - 1 back to back and takes the softmax of step i while the second one runs. A step is one or
two tiles of 64 keys. Every score of a row is float32, as in the plain kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from twostroke_kernels.backend import PagedBatch
from twostroke_kernels.gpu.held_launch import HeldKernels, Place, row_boxes
from twostroke_kernels.gpu.hopper_softmax import as_operand, hide_later, soften

_LOG2_E = 1 / math.log(2)
_QUERIES = 128
_TILE = 64
_LONG = 4096
_GLUON_TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """A step of the kernel: one or two tiles of keys, and how many steps are fetched ahead."""

    tiles: int
    stages: int


SHORT = HopperConfig(tiles=1, stages=4)
LONG = HopperConfig(tiles=2, stages=3)


def suits_hopper(q: Tensor, kv_layer: Tensor) -> bool:
    """Whether this kernel is written for such queries, such a layer and the card."""
    block_size, head_size = kv_layer.shape[2], kv_layer.shape[4]
    if kv_layer.dtype not in _GLUON_TYPES or not _is_hopper(kv_layer.device):
        return False
    aligned = (q.data_ptr() | kv_layer.data_ptr() | q.stride(0) * q.element_size()) % 16 == 0
    return aligned and head_size in (64, 128) and block_size % _TILE == 0


@cache
def _is_hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


@cache
def _box_layout(head_size: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([_TILE, head_size], _GLUON_TYPES[dtype])


def hopper_prefill_attention(
    q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor, config: HopperConfig | None = None
) -> None:
    """See `Backend.prefill_attention`; `q` and `out` [T, H, D] have their heads side by side, `out` its rows too."""
    config = config or (LONG if batch.max_context_len >= _LONG else SHORT)
    num_tokens, num_heads, head_size = q.shape
    num_blocks, _, block_size, num_kv_heads, _ = kv_layer.shape
    row = num_kv_heads * head_size
    block_rows = kv_layer.stride(0) // row
    box, layout = (_TILE, head_size), _box_layout(head_size, q.dtype)
    num_rows = (num_blocks - 1) * block_rows + 2 * block_size
    _KERNELS.launch(
        (q.device, q.dtype, num_heads, row, head_size, block_size, block_rows, config, out.data_ptr() % 16),
        (num_heads, num_tokens // _QUERIES + batch.num_sequences),
        (
            row_boxes(Place.of(q), num_tokens, num_heads * head_size, q.stride(0), box, layout),
            row_boxes(Place.of(kv_layer), num_rows, row, row, box, layout),
            batch.block_tables,
            batch.query_starts,
            batch.context_lens,
            out,
            batch.block_tables.stride(0),
            batch.num_sequences,
            block_rows,
            scale * _LOG2_E,
        ),
        {
            "H": num_heads,
            "GROUP": num_heads // num_kv_heads,
            "D": head_size,
            "BLOCK": block_size,
            "TILES": config.tiles,
            "STAGES": config.stages,
        },
        num_warps=4,
    )


@gluon.jit
def tile_row(table: gl.tensor, tile: gl.tensor, block_rows: gl.tensor, BLOCK: gl.constexpr) -> gl.tensor:
    """The layer's row of the first key of a context's `tile`."""
    start = tile * 64
    return gl.load(table + start // BLOCK).to(gl.int32) * block_rows + start % BLOCK


@gluon.jit
def fetch(
    kv_rows: tma.tensor_descriptor,
    rows: gl.tuple,
    column: gl.tensor,
    barrier: gl.shared_memory_descriptor,
    ring: gl.shared_memory_descriptor,
    slot: gl.tensor,
    D: gl.constexpr,
    TILES: gl.constexpr,
) -> None:
    """Starts the copies of one step's tiles into a slot of the ring."""
    mbarrier.expect(barrier, TILES * 64 * D * 2)
    for i in gl.static_range(TILES):
        tma.async_copy_global_to_shared(kv_rows, [rows[i], column], barrier, ring.index(slot * TILES + i))


@gluon.jit
def produce(
    work: gl.tuple,
    q_rows: tma.tensor_descriptor,
    kv_rows: tma.tensor_descriptor,
    buffers: gl.tuple,
    barriers: gl.tuple,
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """The fetching warp: queries once, then keys and values of every step as slots become free."""
    table, block_rows, q_row, q_column, kv_column, num_tiles = work
    q_shared, keys, values = buffers
    q_full, keys_full, keys_free, values_full, values_free = barriers
    mbarrier.expect(q_full, 2 * 64 * D * 2)
    tma.async_copy_global_to_shared(q_rows, [q_row, q_column], q_full, q_shared.index(0))
    tma.async_copy_global_to_shared(q_rows, [q_row + 64, q_column], q_full, q_shared.index(1))
    for i in range((num_tiles + TILES - 1) // TILES):
        slot = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        first = tile_row(table, i * TILES, block_rows, BLOCK)
        second = first
        if TILES == 2:
            # Past the last tile it is fetched twice: the scores of the second copy are masked.
            second = tile_row(table, gl.minimum(i * TILES + 1, num_tiles - 1), block_rows, BLOCK)
        mbarrier.wait(keys_free.index(slot), phase)
        fetch(kv_rows, (first, second), kv_column, keys_full.index(slot), keys, slot, D, TILES)
        mbarrier.wait(values_free.index(slot), phase)
        fetch(kv_rows, (first + BLOCK, second + BLOCK), kv_column, values_full.index(slot), values, slot, D, TILES)


@gluon.jit
def start_scores(
    q: gl.tensor, keys: gl.shared_memory_descriptor, slot: gl.tensor, SCORES: gl.constexpr, TILES: gl.constexpr
) -> gl.tuple:
    """Issues the products of a step's scores; the second is the first where a step is one tile."""
    zero = gl.zeros([64, 64], gl.float32, SCORES)
    first = warpgroup_mma(q, keys.index(slot * TILES).permute((1, 0)), zero, use_acc=False, is_async=True)
    second = first
    if TILES == 2:
        second = warpgroup_mma(q, keys.index(slot * TILES + 1).permute((1, 0)), zero, use_acc=False, is_async=True)
    return first, second


@gluon.jit
def start_values(
    weights: gl.tuple, values: gl.shared_memory_descriptor, slot: gl.tensor, acc: gl.tensor, TILES: gl.constexpr
) -> gl.tensor:
    """Issues the products of a step's weights and values."""
    acc = warpgroup_mma(weights[0], values.index(slot * TILES), acc, is_async=True)
    if TILES == 2:
        acc = warpgroup_mma(weights[1], values.index(slot * TILES + 1), acc, is_async=True)
    return acc


@gluon.jit
def step(
    i: gl.tensor,
    state: gl.tuple,
    q: gl.tensor,
    positions: gl.tensor,
    scale: gl.tensor,
    rings: gl.tuple,
    barriers: gl.tuple,
    MASKED: gl.constexpr,
    SCORES: gl.constexpr,
    OUT: gl.constexpr,
    DTYPE: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
) -> gl.tuple:
    """Scores and softmax of step i beside the values' product of step i - 1."""
    acc, weights, best, total = state
    keys, values = rings
    keys_full, keys_free, values_full, values_free = barriers
    slot = i % STAGES
    before = (i - 1) % STAGES
    mbarrier.wait(keys_full.index(slot), (i // STAGES) & 1)
    started = start_scores(q, keys, slot, SCORES, TILES)
    mbarrier.wait(values_full.index(before), ((i - 1) // STAGES) & 1)
    product = start_values(weights, values, before, acc, TILES)
    if TILES == 2:
        scores = warpgroup_mma_wait(2, deps=[started[0], started[1]])
    else:
        only = warpgroup_mma_wait(1, deps=[started[0]])
        scores = (only, only)
    mbarrier.arrive(keys_free.index(slot), count=1)
    if MASKED:
        scores = hide_later(scores, positions, i, SCORES, TILES)
    fresh, best, total, shrink = soften(scores, best, total, scale, TILES)
    acc = warpgroup_mma_wait(0, deps=[product])
    mbarrier.arrive(values_free.index(before), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
    return acc, as_operand(fresh, OUT, DTYPE, TILES), best, total


@gluon.jit
def last_product(
    weights: gl.tensor,
    tile: gl.shared_memory_descriptor,
    spare: gl.shared_memory_descriptor,
    num_valid: gl.tensor,
    acc: gl.tensor,
    D: gl.constexpr,
    DTYPE: gl.constexpr,
) -> gl.tensor:
    """acc + weights . values of a tile of which only `num_valid` rows were ever written; the others may be NaN."""
    if num_valid >= 64:
        acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(weights, tile, acc, is_async=True)])
    else:
        PLAIN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        rows = gl.arange(0, 64, layout=gl.SliceLayout(1, PLAIN))
        written = gl.expand_dims(rows < num_valid, 1)
        spare.store(gl.where(written, tile.load(PLAIN), gl.zeros([64, D], DTYPE, PLAIN)))
        fence_async_shared()
        acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(weights, spare, acc, is_async=True)])
    return acc


@gluon.jit
def consume(
    which: gl.tensor,
    work: gl.tuple,
    out: gl.tensor,
    scale: gl.tensor,
    buffers: gl.tuple,
    barriers: gl.tuple,
    H: gl.constexpr,
    D: gl.constexpr,
    DTYPE: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """One warpgroup: 64 queries against all the keys that the last of them sees."""
    first_row, row, query_len, context_len, column = work
    q_shared, keys, values = buffers
    q_full, keys_full, keys_free, values_full, values_free = barriers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    KEYS: gl.constexpr = 64 * TILES
    row = row + which * 64
    first_position = context_len - query_len + row
    num_steps = (gl.minimum(first_position + 64, context_len) + KEYS - 1) // KEYS
    num_whole = gl.minimum((first_position + 1) // KEYS, num_steps)
    positions = first_position + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    mbarrier.wait(q_full, 0)
    q = q_shared.index(which).load(gl.DotOperandLayout(0, SCORES, 2))
    mbarrier.wait(keys_full.index(0), 0)
    started = start_scores(q, keys, 0, SCORES, TILES)
    if TILES == 2:
        scores = warpgroup_mma_wait(0, deps=[started[0], started[1]])
    else:
        only = warpgroup_mma_wait(0, deps=[started[0]])
        scores = (only, only)
    mbarrier.arrive(keys_free.index(0), count=1)
    scores = hide_later(scores, positions, 0, SCORES, TILES)
    best = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    fresh, best, total, _ = soften(scores, best, total, scale, TILES)
    state = (gl.zeros([64, D], gl.float32, OUT), as_operand(fresh, OUT, DTYPE, TILES), best, total)
    rings = (keys, values)
    signals = (keys_full, keys_free, values_full, values_free)
    for i in range(1, num_whole):
        state = step(i, state, q, positions, scale, rings, signals, False, SCORES, OUT, DTYPE, TILES, STAGES)
    for i in range(gl.maximum(num_whole, 1), num_steps):
        state = step(i, state, q, positions, scale, rings, signals, True, SCORES, OUT, DTYPE, TILES, STAGES)
    acc, weights, best, total = state
    last = num_steps - 1
    slot = last % STAGES
    mbarrier.wait(values_full.index(slot), (last // STAGES) & 1)
    for i in gl.static_range(TILES):
        # The queries are in registers by now: their shared memory takes the copy of a tile with unwritten rows.
        num_valid = context_len - last * KEYS - i * 64
        acc = last_product(weights[i], values.index(slot * TILES + i), q_shared.index(which), num_valid, acc, D, DTYPE)
    mbarrier.arrive(values_free.index(slot), count=1)
    acc = acc / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, OUT)), 1)
    rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    dims = column + gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
    pointers = out + gl.expand_dims(first_row + rows, 1) * (H * D) + gl.expand_dims(dims, 0)
    gl.store(pointers, acc.to(DTYPE), mask=gl.expand_dims(rows < query_len, 1))


@gluon.jit
def find_sequence(query_starts: gl.tensor, num_sequences: gl.tensor, index: gl.tensor) -> gl.tensor:
    """The last sequence whose tiles start at or before the list's tile `index`."""
    low = index * 0
    high = low + num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        begun = gl.load(query_starts + middle).to(gl.int32) // 128 + middle <= index
        low = gl.where(begun, middle, low)
        high = gl.where(begun, high, middle)
    return low


@gluon.jit
def new_barriers(count: gl.tensor, STAGES: gl.constexpr) -> gl.shared_memory_descriptor:
    """A barrier for each slot of a ring."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=count)
    return barriers


@gluon.jit(
    do_not_specialize=["table_stride", "num_sequences"],
    do_not_specialize_on_alignment=["tables", "query_starts", "context_lens"],
)
def attend(
    q_rows: tma.tensor_descriptor,
    kv_rows: tma.tensor_descriptor,
    tables: gl.tensor,
    query_starts: gl.tensor,
    context_lens: gl.tensor,
    out: gl.tensor,
    table_stride: gl.tensor,
    num_sequences: gl.tensor,
    block_rows: gl.tensor,
    scale: gl.tensor,
    H: gl.constexpr,
    GROUP: gl.constexpr,
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
) -> None:
    """The list of tiles is that of the plain kernel; the last come first."""
    DTYPE: gl.constexpr = q_rows.dtype
    head = gl.program_id(0)
    index = gl.num_programs(1) - 1 - gl.program_id(1)
    sequence = find_sequence(query_starts, num_sequences, index)
    first_row = gl.load(query_starts + sequence)
    query_len = (gl.load(query_starts + sequence + 1) - first_row).to(gl.int32)
    context_len = gl.load(context_lens + sequence).to(gl.int32)
    row = (index - first_row.to(gl.int32) // 128 - sequence) * 128
    if row >= query_len:
        return
    table = tables + sequence.to(gl.int64) * table_stride
    num_tiles = (gl.minimum(context_len - query_len + row + 128, context_len) + 63) // 64
    q_shared = gl.allocate_shared_memory(DTYPE, [2, 64, D], q_rows.layout)
    keys = gl.allocate_shared_memory(DTYPE, [STAGES * TILES, 64, D], kv_rows.layout)
    values = gl.allocate_shared_memory(DTYPE, [STAGES * TILES, 64, D], kv_rows.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    buffers = (q_shared, keys, values)
    barriers = (
        q_full,
        new_barriers(1, STAGES),
        new_barriers(2, STAGES),
        new_barriers(1, STAGES),
        new_barriers(2, STAGES),
    )
    fetched = (table, block_rows, first_row.to(gl.int32) + row, head * D, head // GROUP * D, num_tiles)
    computed = (first_row, row, query_len, context_len, head * D)
    gl.warp_specialize(
        [
            (consume, (0, computed, out, scale, buffers, barriers, H, D, DTYPE, TILES, STAGES)),
            (consume, (1, computed, out, scale, buffers, barriers, H, D, DTYPE, TILES, STAGES)),
            (produce, (fetched, q_rows, kv_rows, buffers, barriers, D, BLOCK, TILES, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


_KERNELS = HeldKernels(attend)
