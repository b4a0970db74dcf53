"""What the attention kernels share: where a tile of keys lies in the paged pool, and one step of the online softmax.

A layer of the pool is `[N, 2, B, G, D]`: dense within a block, any distance (`block_stride`, in elements) between
blocks. Offsets are 64-bit from the block id on, because a pool outgrows 2^31 elements. Seen through a TMA descriptor
the layer is a matrix of rows `[G * D]`, one a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def slot_offsets(
    table: tl.tensor,
    start: tl.tensor,
    tokens: tl.tensor,
    end: tl.tensor,
    block_stride: tl.tensor,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Element offsets of the keys at `start + tokens`; those from `end` on are somewhere in the pool, to be masked."""
    if BLOCK % TILE == 0:
        block = tl.load(table + start // BLOCK).to(tl.int64)
        return block * block_stride + (start % BLOCK + tokens) * ROW
    else:
        positions = start + tokens
        blocks = tl.load(table + positions // BLOCK, mask=positions < end, other=0).to(tl.int64)
        return blocks * block_stride + (positions % BLOCK) * ROW


@triton.jit
def load_rows(
    base: tl.tensor, offsets: tl.tensor, dims: tl.tensor, valid: tl.tensor, D: tl.constexpr, MASKED: tl.constexpr
) -> tl.tensor:
    """[offsets, dims] elements; zero beyond D, and where not `valid` if `MASKED`."""
    pointers = base + offsets[:, None] + dims[None, :]
    if dims.shape[0] == D:
        if MASKED:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        return tl.load(pointers)
    if MASKED:
        return tl.load(pointers, mask=valid[:, None] & (dims < D)[None, :], other=0.0)
    return tl.load(pointers, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def fold(
    scores: tl.tensor, values: tl.tensor, best: tl.tensor, total: tl.tensor, acc: tl.tensor, scale: tl.tensor
) -> tl.tuple:
    """One step of the online softmax in base 2; `scale` (above 0) holds log2(e). Every row has had a visible key."""
    new_best = tl.maximum(best, tl.max(scores, 1))
    shift = new_best * scale
    weights = tl.math.exp2(scores * scale - shift[:, None])
    # Exactly 1 where no key was better, hidden ones included: with `best * scale - shift`, a fused multiply-add, a row
    # would depend on how many hidden keys its tile walks over.
    shrink = tl.math.exp2((best - new_best) * scale)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return new_best, total, acc


@triton.jit
def nothing_yet(ROWS: tl.constexpr, DIMS: tl.constexpr) -> tl.tuple:
    """The state of an online softmax: each row's best score, its sum of weights, its sum of weighted values."""
    best = tl.full([ROWS], -float("inf"), tl.float32)
    return best, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, DIMS], tl.float32)


@triton.jit
def fold_boxes(
    state: tl.tuple,
    queries: tl.tensor,
    positions: tl.tensor,
    boxes: tl.tensor_descriptor,
    place: tl.tuple,
    first: tl.tensor,
    last: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tuple:
    """Folds whole tiles of keys, fetched through a descriptor; if `MASKED`, a row sees those up to its position."""
    best, total, acc = state
    table, column, block_rows = place
    tokens = tl.arange(0, TILE)
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        row = tl.load(table + start // BLOCK).to(tl.int32) * block_rows + start % BLOCK
        scores = tl.dot(queries, boxes.load([row, column]).T)
        if MASKED:
            scores = tl.where(positions[:, None] >= (start + tokens)[None, :], scores, -float("inf"))
        values = boxes.load([row + BLOCK, column])
        best, total, acc = fold(scores, values, best, total, acc, scale)
    return best, total, acc


@triton.jit
def fold_slots(
    state: tl.tuple,
    queries: tl.tensor,
    positions: tl.tensor,
    place: tl.tuple,
    first: tl.tensor,
    last: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tuple:
    """As `fold_boxes`, by pointers and for any tile: if `MASKED`, slots from `end` on are not read."""
    best, total, acc = state
    table, base, block_stride = place
    tokens = tl.arange(0, TILE)
    dims = tl.arange(0, queries.shape[1])
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        valid = start + tokens < end
        offsets = slot_offsets(table, start, tokens, end, block_stride, ROW, BLOCK, TILE)
        keys = load_rows(base, offsets, dims, valid, D, MASKED)
        scores = tl.dot(queries, keys.T, input_precision="ieee")
        if MASKED:
            scores = tl.where(positions[:, None] >= (start + tokens)[None, :], scores, -float("inf"))
        values = load_rows(base + BLOCK * ROW, offsets, dims, valid, D, MASKED)
        best, total, acc = fold(scores, values, best, total, acc, scale)
    return best, total, acc


def check_layer(q: Tensor, kv_layer: Tensor) -> None:
    """Refuses a layer that is not dense within its blocks, or that `q` does not fit."""
    _, two, block_size, num_kv_heads, head_size = kv_layer.shape
    row = num_kv_heads * head_size
    if two != 2 or kv_layer.stride()[1:] != (block_size * row, row, head_size, 1) or kv_layer.stride(0) % row:
        raise ValueError(f"kv_layer: a view pool[:, layer] is needed, not strides {kv_layer.stride()}")
    if q.dtype != kv_layer.dtype or q.shape[-1] != head_size or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype} does not fit kv_layer {tuple(kv_layer.shape)}, {kv_layer.dtype}"
        )


def dense_heads(q: Tensor) -> Tensor:
    """`q` [T, H, D] with its heads side by side; rows may lie apart."""
    return q if q.stride()[1:] == (q.shape[2], 1) else q.contiguous()


def layer_rows(kv_layer: Tensor, tile: int) -> TensorDescriptor:
    """A descriptor of tiles of `tile` tokens of one head."""
    num_blocks, _, block_size, num_kv_heads, head_size = kv_layer.shape
    row = num_kv_heads * head_size
    num_rows = (num_blocks - 1) * (kv_layer.stride(0) // row) + 2 * block_size
    return TensorDescriptor(kv_layer, [num_rows, row], [row, 1], [tile, head_size])


def suits_tma(kv_layer: Tensor, tile: int) -> bool:
    """Whether tiles of `tile` tokens of one head are boxes that the card's tensor memory accelerator can fetch."""
    _, _, block_size, _, head_size = kv_layer.shape
    shaped = head_size in (64, 128, 256) and block_size % tile == 0 and kv_layer.element_size() == 2
    return shaped and kv_layer.data_ptr() % 16 == 0 and _has_tma(kv_layer.device)


def _has_tma(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
