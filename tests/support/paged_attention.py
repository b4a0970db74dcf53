"""Batches over a paged pool whose unused slots hold NaN, and PyTorch's own attention over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from twostroke_kernels.backend import PagedBatch

LAYER = 1


@dataclass(frozen=True)
class Shape:
    """Heads and blocks."""

    group: int
    num_kv_heads: int
    head_size: int
    block_size: int

    def __str__(self) -> str:
        return f"g{self.group}x{self.num_kv_heads}-d{self.head_size}-b{self.block_size}"

    @property
    def num_heads(self) -> int:
        """Of queries."""
        return self.group * self.num_kv_heads


@dataclass
class PagedCase:
    """Random queries over a pool of three layers, the middle one in use."""

    q: Tensor
    pool: Tensor
    batch: PagedBatch
    scale: float

    @property
    def layer(self) -> Tensor:
        """The view that a backend gets."""
        return self.pool[:, LAYER]

    def plain(self, dtype: torch.dtype | None = None) -> Tensor:
        """PyTorch's own attention, computed at `dtype` or at the case's."""
        return plain_attention(self.q.to(dtype or self.q.dtype), self.layer, self.batch, self.scale)


def make_tables(rng: torch.Generator, context_lens: list[int], block_size: int) -> Tensor:
    """Blocks in no order; a row is padded with its own first block."""
    counts = [max(1, -(-length // block_size)) for length in context_lens]
    ids = torch.randperm(sum(counts) + 3, generator=rng)[: sum(counts)].split(counts)
    return torch.stack([torch.cat((row, row[:1].expand(max(counts) - len(row)))) for row in ids])


def make_case(
    rng: torch.Generator,
    shape: Shape,
    query_lens: list[int],
    context_lens: list[int],
    dtype: torch.dtype,
    device: torch.device,
) -> PagedCase:
    """Every slot that no sequence uses holds NaN."""
    tables = make_tables(rng, context_lens, shape.block_size)
    tail = (2, shape.block_size, shape.num_kv_heads, shape.head_size)
    pool = torch.full((int(tables.max()) + 3, 3, *tail), float("nan"), dtype=dtype, device=device)
    for table, length in zip(tables, context_lens, strict=True):
        token = torch.arange(length)
        values = torch.randn(length, 2, shape.num_kv_heads, shape.head_size, generator=rng)
        where = table[token // shape.block_size].to(device), LAYER, slice(None), (token % shape.block_size).to(device)
        pool[where] = values.to(device=device, dtype=dtype)
    q = torch.randn(sum(query_lens), shape.num_heads, shape.head_size, generator=rng).to(device=device, dtype=dtype)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(device)
    lengths = torch.tensor(context_lens, device=device)
    batch = PagedBatch(tables.to(device), starts, lengths, max(query_lens), max(context_lens))
    return PagedCase(q, pool, batch, shape.head_size**-0.5)


def plain_attention(q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float) -> Tensor:
    """`scaled_dot_product_attention` at the dtype of `q`, one sequence at a time."""
    out = torch.zeros_like(q)
    for row, length in enumerate(batch.context_lens.tolist()):
        first, end = batch.query_starts[row : row + 2].tolist()
        if first == end or length == 0:
            continue
        blocks = kv_layer[batch.block_tables[row, : -(-length // kv_layer.shape[2])]].to(q.dtype)
        keys, values = (blocks[:, which].flatten(0, 1)[:length].transpose(0, 1) for which in (0, 1))
        mask = torch.ones(end - first, length, dtype=torch.bool, device=q.device).tril(length - (end - first))
        queries = q[first:end].transpose(0, 1)
        ratio = queries.shape[0] // keys.shape[0]
        keys, values = keys.repeat_interleave(ratio, 0), values.repeat_interleave(ratio, 0)
        result = F.scaled_dot_product_attention(queries[None], keys[None], values[None], attn_mask=mask, scale=scale)
        out[first:end] = result[0].transpose(0, 1)
    return out
