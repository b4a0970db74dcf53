"""KV items copied from one pool's blocks into another's, digested on the way, and digested where they lie.

The other pool may be another process's memory. A few programs go over all of the work: enough of them to fill the link,
and no more, because a step computes meanwhile.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.backend import KVItems, KVWire, check_push
from twostroke_kernels.gpu.kv_pack import gather_words, pack_kv, stretch_offsets, stretches, unpack_kv
from twostroke_kernels.gpu.wire_words import multipliers

_BLOCK = 4096
_NUM_WARPS = 8
_PROGRAMS_PER_PROCESSOR = 2


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
    per_item = triton.cdiv(size, _BLOCK)
    if count and size:
        push_words[(min(count * per_item, _num_programs(source.pool.device)),)](
            words, source.ids, their_words, target.ids, digest, words.shape[1], their_words.shape[1],
            first_layer * layer_words, first_layer * their_layer_words, size, per_item, count * per_item,
            split, their_split, run, _BLOCK, num_warps=_NUM_WARPS,
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
        gather_words[(count, triton.cdiv(size, _BLOCK))](
            words, items.ids, None, total, words.shape[1], first_layer * layer_words, size, split, run, _BLOCK,
            num_warps=_NUM_WARPS,
        )  # fmt: skip
    return total


@cache
def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # interpreted: the loop is to be run
    return _PROGRAMS_PER_PROCESSOR * int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit(do_not_specialize=["per_item", "total"], do_not_specialize_on_alignment=["items", "their_items"])
def push_words(
    words, items, their_words, their_items, digest, stride, their_stride, first, their_first, size, per_item, total,
    SPLIT: tl.constexpr, THEIR_SPLIT: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program takes every so-manieth stretch of all items."""
    for tile in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        place = (tile // per_item).to(tl.int64)
        item, theirs = tl.load(items + place).to(tl.int64), tl.load(their_items + place).to(tl.int64)
        at = tile % per_item * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        from_ = stretch_offsets(at, (item % SPLIT).to(tl.int32), SPLIT, RUN)
        to = stretch_offsets(at, (theirs % THEIR_SPLIT).to(tl.int32), THEIR_SPLIT, RUN)
        found = tl.load(words + item // SPLIT * stride + first + from_, mask=inside, other=0)
        tl.store(their_words + theirs // THEIR_SPLIT * their_stride + their_first + to, found, mask=inside)
        tl.atomic_add(digest + place, tl.sum(found.to(tl.int64) * multipliers(at), 0), sem="relaxed")
