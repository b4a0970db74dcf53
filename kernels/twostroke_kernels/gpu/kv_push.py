"""KV items copied from one pool's blocks into another's, digested on the way, and digested where they lie.

The other pool may be another process's memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.backend import KVItems, KVWire, check_push
from twostroke_kernels.gpu.kv_pack import gather_words, pack_kv, stretch_offsets, stretches, unpack_kv
from twostroke_kernels.gpu.wire_words import multipliers

_PUSH_BLOCK = 2048
_DIGEST_BLOCK = 4096
_NUM_WARPS = 8


def push_kv(source: KVItems, target: KVItems, first_layer: int, num_layers: int, wire: KVWire) -> Tensor:
    """See `Backend.push_kv`."""
    check_push(target, wire)
    if source.pool.dtype is not wire.dtype:
        segment, digest = pack_kv(source.pool, source.ids, first_layer, num_layers, wire)
        unpack_kv(target.pool, target.ids, first_layer, segment, wire)
        return digest
    count = source.ids.shape[0]
    digest = torch.zeros(count, dtype=torch.int64, device=source.pool.device)
    words, split, run = stretches(source.pool, wire)
    their_words, their_split, their_run = stretches(target.pool, wire)
    if target.ids.shape[0] != count or their_run != run or source.pool.shape[1] != target.pool.shape[1]:
        raise ValueError(f"{count} items of {tuple(source.pool.shape)} do not fit {tuple(target.pool.shape)}")
    layer_words, their_layer_words = (found.shape[1] // source.pool.shape[1] for found in (words, their_words))
    size = num_layers * layer_words // split
    if count and size:
        push_words[(count, triton.cdiv(size, _PUSH_BLOCK))](
            words, source.ids, their_words, target.ids, digest, words.shape[1], their_words.shape[1],
            first_layer * layer_words, first_layer * their_layer_words, size,
            split, their_split, run, _PUSH_BLOCK, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return digest


def digest_kv(items: KVItems, first_layer: int, num_layers: int, wire: KVWire) -> Tensor:
    """See `Backend.digest_kv`."""
    if items.pool.dtype is not wire.dtype:
        return pack_kv(items.pool, items.ids, first_layer, num_layers, wire)[1]
    count = items.ids.shape[0]
    total = torch.zeros(count, dtype=torch.int64, device=items.pool.device)
    words, split, run = stretches(items.pool, wire)
    layer_words = words.shape[1] // items.pool.shape[1]
    size = num_layers * layer_words // split
    if count and size:
        gather_words[(count, triton.cdiv(size, _DIGEST_BLOCK))](
            words, items.ids, None, total, words.shape[1], first_layer * layer_words, size, split, run, _DIGEST_BLOCK,
            num_warps=_NUM_WARPS,
        )  # fmt: skip
    return total


@triton.jit(do_not_specialize_on_alignment=["items", "their_items"])
def push_words(
    words, items, their_words, their_items, digest, stride, their_stride, first, their_first, size,
    SPLIT: tl.constexpr, THEIR_SPLIT: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a stretch of one item."""
    place = tl.program_id(0).to(tl.int64)
    item, theirs = tl.load(items + place).to(tl.int64), tl.load(their_items + place).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    from_ = stretch_offsets(at, (item % SPLIT).to(tl.int32), SPLIT, RUN)
    to = stretch_offsets(at, (theirs % THEIR_SPLIT).to(tl.int32), THEIR_SPLIT, RUN)
    found = tl.load(words + item // SPLIT * stride + first + from_, mask=inside, other=0)
    tl.store(their_words + theirs // THEIR_SPLIT * their_stride + their_first + to, found, mask=inside)
    tl.atomic_add(digest + place, tl.sum(found.to(tl.int64) * multipliers(at), 0), sem="relaxed")
