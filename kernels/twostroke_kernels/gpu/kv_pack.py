"""KV items gathered into a segment, scattered back, and digested; gathering and digesting are one pass.

Bytes that travel as they are stored are copied as 32-bit words: an item is one stretch of each block where the wire's
block size is the pool's, else a run for each layer's keys and values. The digest is a sum of integers: the order in
which programs add to it changes nothing. What is converted on the way goes through `kv_convert`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.backend import KVWire
from twostroke_kernels.gpu import kv_convert
from twostroke_kernels.gpu.block_copy import block_words
from twostroke_kernels.gpu.wire_words import multipliers

_BLOCK = 4096
_NUM_WARPS = 8


def pack_kv(pool: Tensor, items: Tensor, first_layer: int, num_layers: int, wire: KVWire) -> tuple[Tensor, Tensor]:
    """See `Backend.pack_kv`."""
    count, size = items.shape[0], num_layers * wire.layer_bytes(pool.shape[4], pool.shape[5])
    segment = torch.empty((count, size), dtype=torch.uint8, device=pool.device)
    digest = torch.zeros(count, dtype=torch.int64, device=pool.device)
    if not segment.numel():
        return segment, digest
    into = segment.view(torch.int32)
    if wire.dtype is not pool.dtype:
        kv_convert.encode(pool, items, first_layer, num_layers, wire, into, digest)
        return segment, digest
    words, split, run = stretches(pool, wire)
    first = first_layer * (words.shape[1] // pool.shape[1])
    grid = (count, triton.cdiv(into.shape[1], _BLOCK))
    gather_words[grid](
        words, items, into, digest, words.shape[1], first, into.shape[1], split, run, _BLOCK, num_warps=_NUM_WARPS
    )
    return segment, digest


def unpack_kv(pool: Tensor, items: Tensor, first_layer: int, segment: Tensor, wire: KVWire) -> None:
    """See `Backend.unpack_kv`."""
    layer_bytes = wire.layer_bytes(pool.shape[4], pool.shape[5])
    if segment.shape[0] != items.shape[0] or segment.dtype != torch.uint8 or segment.shape[1] % layer_bytes:
        raise ValueError(f"segment {tuple(segment.shape)} {segment.dtype} does not fit pool {tuple(pool.shape)}")
    if segment.numel() == 0:
        return
    source = segment.contiguous().view(torch.int32)
    if wire.dtype is not pool.dtype:
        kv_convert.decode(pool, items, first_layer, source, wire)
        return
    words, split, run = stretches(pool, wire)
    first = first_layer * (words.shape[1] // pool.shape[1])
    grid = (segment.shape[0], triton.cdiv(source.shape[1], _BLOCK))
    scatter_words[grid](
        words, items, source, words.shape[1], first, source.shape[1], split, run, _BLOCK, num_warps=_NUM_WARPS
    )


def digest(segment: Tensor) -> Tensor:
    """See `Backend.digest`."""
    total = torch.zeros(segment.shape[0], dtype=torch.int64, device=segment.device)
    if segment.numel():
        words = segment.contiguous().view(segment.shape[0], -1).view(torch.int32)
        size = words.shape[1]
        grid = (segment.shape[0], triton.cdiv(size, _BLOCK))
        gather_words[grid](words, None, None, total, size, 0, size, 1, 1, _BLOCK, num_warps=_NUM_WARPS)
    return total


def stretches(pool: Tensor, wire: KVWire) -> tuple[Tensor, int, int]:
    """The pool's words, the items of a block, and the words of an item that lie together."""
    words, split = block_words(pool), wire.split(pool)
    layers = words.shape[1] // (2 * pool.shape[1])  # the keys of one layer of a block, or its values
    return words, split, layers // split


@triton.jit
def stretch_offsets(at, part, SPLIT: tl.constexpr, RUN: tl.constexpr):
    """Where an item's words lie in the layers of its block."""
    offsets = at
    if SPLIT > 1:
        offsets = at // RUN * (RUN * SPLIT) + part * RUN + at % RUN
    return offsets


@triton.jit(do_not_specialize_on_alignment=["items"])
def gather_words(
    source, items, into, digest, stride, first, size, SPLIT: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr
):
    """Without `items` they are taken in order; without `into` they are only digested."""
    place = tl.program_id(0).to(tl.int64)
    item = place
    if items is not None:
        item = tl.load(items + place).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    offsets = stretch_offsets(at, (item % SPLIT).to(tl.int32), SPLIT, RUN)
    words = tl.load(source + item // SPLIT * stride + first + offsets, mask=inside, other=0)
    if into is not None:
        tl.store(into + place * size + at, words, mask=inside)
    tl.atomic_add(digest + place, tl.sum(words.to(tl.int64) * multipliers(at), 0), sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["items"])
def scatter_words(
    words, items, source, stride, first, size, SPLIT: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr
):
    """The way back."""
    place = tl.program_id(0).to(tl.int64)
    item = tl.load(items + place).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    values = tl.load(source + place * size + at, mask=inside)
    offsets = stretch_offsets(at, (item % SPLIT).to(tl.int32), SPLIT, RUN)
    tl.store(words + item // SPLIT * stride + first + offsets, values, mask=inside)
