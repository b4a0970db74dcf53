"""Whole blocks of the KV pool copied onto others."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_NUM_WARPS = 8


def block_words(pool: Tensor) -> Tensor:
    """The pool as [N, words of 32 bits], sharing memory."""
    if not pool.is_contiguous():
        raise ValueError(f"pool: must be contiguous, not of strides {pool.stride()}")
    return pool.view(pool.shape[0], -1).view(torch.int32)


def copy_blocks(pool: Tensor, sources: Tensor, targets: Tensor) -> None:
    """See `Backend.copy_blocks`."""
    if sources.shape != targets.shape:
        raise ValueError(f"sources {tuple(sources.shape)}, targets {tuple(targets.shape)}: not as many")
    words = block_words(pool)
    size = words.shape[1]
    if sources.shape[0] == 0 or size == 0:
        return
    grid = (sources.shape[0], triton.cdiv(size, _BLOCK))
    copy_words[grid](words, sources, targets, size, BLOCK=_BLOCK, num_warps=_NUM_WARPS)


@triton.jit(do_not_specialize_on_alignment=["sources", "targets"])
def copy_words(words, sources, targets, size, BLOCK: tl.constexpr):
    """One program: a stretch of one block."""
    source = tl.load(sources + tl.program_id(0)).to(tl.int64)
    target = tl.load(targets + tl.program_id(0)).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    values = tl.load(words + source * size + at, mask=inside)
    tl.store(words + target * size + at, values, mask=inside)
