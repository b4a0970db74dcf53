"""KV blocks gathered into a segment, scattered back, and digested; gathering and digesting are one pass.

A block's layers lie one after another, so a segment is one stretch of each block. The digest is a sum of integers:
the order in which programs add to it changes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.gpu.block_copy import block_words

_BLOCK = 4096
_NUM_WARPS = 8


def pack_kv(pool: Tensor, block_ids: Tensor, first_layer: int, num_layers: int) -> tuple[Tensor, Tensor]:
    """See `Backend.pack_kv`."""
    count, words = block_ids.shape[0], block_words(pool)
    segment = torch.empty((count, num_layers, *pool.shape[2:]), dtype=pool.dtype, device=pool.device)
    digest = torch.zeros(count, dtype=torch.int64, device=pool.device)
    if segment.numel():
        into = segment.view(count, -1).view(torch.int32)
        size, layer_size = into.shape[1], into.shape[1] // num_layers
        grid = (count, triton.cdiv(size, _BLOCK))
        gather_words[grid](
            words, block_ids, into, digest, words.shape[1], first_layer * layer_size, size, _BLOCK, num_warps=_NUM_WARPS
        )
    return segment, digest


def unpack_kv(pool: Tensor, block_ids: Tensor, first_layer: int, segment: Tensor) -> None:
    """See `Backend.unpack_kv`."""
    if segment.shape[0] != block_ids.shape[0] or segment.shape[2:] != pool.shape[2:] or segment.dtype != pool.dtype:
        raise ValueError(f"segment {tuple(segment.shape)} {segment.dtype} does not fit pool {tuple(pool.shape)}")
    if segment.numel() == 0:
        return
    words = block_words(pool)
    source = segment.contiguous().view(segment.shape[0], -1).view(torch.int32)
    size = source.shape[1]
    grid = (segment.shape[0], triton.cdiv(size, _BLOCK))
    first = first_layer * (size // segment.shape[1])
    scatter_words[grid](words, block_ids, source, words.shape[1], first, size, _BLOCK, num_warps=_NUM_WARPS)


def digest(segment: Tensor) -> Tensor:
    """See `Backend.digest`."""
    total = torch.zeros(segment.shape[0], dtype=torch.int64, device=segment.device)
    if segment.numel():
        words = segment.contiguous().view(segment.shape[0], -1).view(torch.int32)
        grid = (segment.shape[0], triton.cdiv(words.shape[1], _BLOCK))
        gather_words[grid](words, None, None, total, words.shape[1], 0, words.shape[1], _BLOCK, num_warps=_NUM_WARPS)
    return total


@triton.jit
def multipliers(at):
    """See `digest.multipliers`: splitmix64's finaliser of every index, made odd."""
    z = (at.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15 | 1
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return ((z ^ (z >> 31)) | 1).to(tl.int64, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=["block_ids"])
def gather_words(source, block_ids, into, digest, stride, first, size, BLOCK: tl.constexpr):
    """Without `block_ids` items are taken in order; without `into` they are only digested."""
    item = tl.program_id(0).to(tl.int64)
    block = item
    if block_ids is not None:
        block = tl.load(block_ids + item).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    words = tl.load(source + block * stride + first + at, mask=inside, other=0)
    if into is not None:
        tl.store(into + item * size + at, words, mask=inside)
    tl.atomic_add(digest + item, tl.sum(words.to(tl.int64) * multipliers(at), 0), sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["block_ids"])
def scatter_words(words, block_ids, source, stride, first, size, BLOCK: tl.constexpr):
    """The way back."""
    item = tl.program_id(0).to(tl.int64)
    block = tl.load(block_ids + item).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    values = tl.load(source + item * size + at, mask=inside)
    tl.store(words + block * stride + first + at, values, mask=inside)
