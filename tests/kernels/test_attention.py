"""Paged attention of prompt chunks and of single queries; what lies in unused slots must not matter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from twostroke_kernels.backend import Backend, PagedBatch

from tests.support.tolerance import assert_as_good_as_torch

DTYPES = [torch.float32, torch.bfloat16]
BLOCK_SIZE = 16
SHAPES = [(1, 64), (3, 64), (4, 80), (8, 128)]


def make_batch(rng: torch.Generator, query_lens: list[int], context_lens: list[int], num_blocks: int) -> PagedBatch:
    width = max(1, max(-(-length // BLOCK_SIZE) for length in context_lens))
    order = torch.randperm(num_blocks, generator=rng)
    tables = torch.zeros(len(context_lens), width, dtype=torch.int64)
    taken = 0
    for row, length in enumerate(context_lens):
        needed = -(-length // BLOCK_SIZE)
        tables[row, :needed] = order[taken : taken + needed]
        taken += needed
    starts = torch.tensor([0, *query_lens]).cumsum(0)
    return PagedBatch(tables, starts, torch.tensor(context_lens), max(query_lens), max(context_lens))


def make_pool(rng: torch.Generator, batch: PagedBatch, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> Tensor:
    """Three layers; every slot of every layer that no sequence uses holds NaN."""
    num_blocks = sum(-(-length // BLOCK_SIZE) for length in batch.context_lens.tolist()) + 3
    pool = torch.full((num_blocks, 3, 2, BLOCK_SIZE, num_kv_heads, head_size), float("nan"), dtype=dtype)
    for table, length in zip(batch.block_tables, batch.context_lens.tolist(), strict=True):
        for token in range(length):
            values = torch.randn(2, num_kv_heads, head_size, generator=rng)
            pool[table[token // BLOCK_SIZE], 1, :, token % BLOCK_SIZE] = values.to(dtype)
    return pool


def plain_attention(q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float) -> Tensor:
    """PyTorch's own, one sequence at a time."""
    out = torch.zeros_like(q)
    for row, length in enumerate(batch.context_lens.tolist()):
        first, end = batch.query_starts[row : row + 2].tolist()
        blocks = kv_layer[batch.block_tables[row]]
        keys, values = (blocks[:, which].flatten(0, 1)[:length].transpose(0, 1) for which in (0, 1))
        mask = torch.ones(end - first, length, dtype=torch.bool).tril(length - (end - first))
        queries = q[first:end].transpose(0, 1)
        ratio = queries.shape[0] // keys.shape[0]
        keys, values = keys.repeat_interleave(ratio, 0), values.repeat_interleave(ratio, 0)
        result = F.scaled_dot_product_attention(queries[None], keys[None], values[None], attn_mask=mask, scale=scale)
        out[first:end] = result[0].transpose(0, 1)
    return out


def num_blocks_of(context_lens: list[int]) -> int:
    return sum(-(-length // BLOCK_SIZE) for length in context_lens) + 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ratio", "head_size"), SHAPES)
@pytest.mark.parametrize(
    "context_lens",
    [[1], [15, 16, 17], [200, 1, 33, 31, 32], [5] * 16],
    ids=["one-token", "block-boundary", "very-different", "batch-16"],
)
def test_decode_attention(
    backend: Backend,
    reference: Backend,
    rng: torch.Generator,
    dtype: torch.dtype,
    ratio: int,
    head_size: int,
    context_lens: list[int],
) -> None:
    batch = make_batch(rng, [1] * len(context_lens), context_lens, num_blocks_of(context_lens))
    layer = make_pool(rng, batch, 2, head_size, dtype)[:, 1]
    q = torch.randn(len(context_lens), 2 * ratio, head_size, generator=rng).to(dtype)
    scale = head_size**-0.5
    out = backend.decode_attention(q, layer, batch, scale)
    ref64 = reference.decode_attention(q, layer, batch, scale)
    assert_as_good_as_torch(out, ref64, plain_attention(q, layer, batch, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ratio", "head_size"), SHAPES)
@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [([1], [1]), ([15, 16, 17], [15, 16, 17]), ([3, 1, 20], [50, 49, 20]), ([130], [147])],
    ids=["one-token", "whole-prompts", "chunks-after-prefix", "several-tiles"],
)
def test_prefill_attention(
    backend: Backend,
    reference: Backend,
    rng: torch.Generator,
    dtype: torch.dtype,
    ratio: int,
    head_size: int,
    query_lens: list[int],
    context_lens: list[int],
) -> None:
    batch = make_batch(rng, query_lens, context_lens, num_blocks_of(context_lens))
    layer = make_pool(rng, batch, 2, head_size, dtype)[:, 1]
    q = torch.randn(sum(query_lens), 2 * ratio, head_size, generator=rng).to(dtype)
    scale = head_size**-0.5
    out = backend.prefill_attention(q, layer, batch, scale)
    ref64 = reference.prefill_attention(q, layer, batch, scale)
    assert_as_good_as_torch(out, ref64, plain_attention(q, layer, batch, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(backend: Backend, reference: Backend, rng: torch.Generator, dtype: torch.dtype) -> None:
    """Tokens that compete at scores near a hundred: scores rounded to bfloat16 would be half a unit apart."""
    batch = make_batch(rng, [1, 1], [90, 64], num_blocks_of([90, 64]))
    layer = make_pool(rng, batch, 2, 64, dtype)[:, 1]
    layer[:, 0] = layer[:, 0] * 0.1 + 1
    q = (1.5 + 0.5 * torch.randn(2, 6, 64, generator=rng)).to(dtype)
    for attention in ("decode_attention", "prefill_attention"):
        out = getattr(backend, attention)(q, layer, batch, 1.0)
        ref64 = getattr(reference, attention)(q, layer, batch, 1.0)
        assert_as_good_as_torch(out, ref64, plain_attention(q, layer, batch, 1.0))


def test_no_sequences(backend: Backend) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    batch = PagedBatch(none.view(0, 1), torch.zeros(1, dtype=torch.int64), none, 0, 0)
    pool = torch.zeros(2, 1, 2, BLOCK_SIZE, 1, 64)
    for attention in (backend.decode_attention, backend.prefill_attention):
        assert attention(torch.zeros(0, 3, 64), pool[:, 0], batch, 1.0).shape == (0, 3, 64)


def test_the_next_batch_and_layer_are_noticed(backend: Backend, reference: Backend, rng: torch.Generator) -> None:
    """The backend remembers a batch's indices; neither another layer nor another batch may get what was another's."""
    for lengths in ([20, 3], [20, 4], [4, 20]):
        batch = make_batch(rng, [1, 1], lengths, num_blocks_of(lengths))
        pool = make_pool(rng, batch, 2, 64, torch.float32)
        pool[:, 2] = pool[:, 1].flip(-1)
        q = torch.randn(2, 6, 64, generator=rng)
        for layer in (pool[:, 1], pool[:, 2]):
            for attention in ("decode_attention", "prefill_attention"):
                out, ref64 = (getattr(b, attention)(q, layer, batch, 0.125) for b in (backend, reference))
                torch.testing.assert_close(out, ref64.float(), rtol=1e-5, atol=1e-5)


def test_one_batch_over_layers_of_different_shape(backend: Backend, reference: Backend, rng: torch.Generator) -> None:
    batch = make_batch(rng, [1, 1], [20, 3], num_blocks_of([20, 3]))
    for num_kv_heads, head_size in [(2, 64), (1, 64), (2, 32)]:
        layer = make_pool(rng, batch, num_kv_heads, head_size, torch.float32)[:, 1]
        q = torch.randn(2, 4, head_size, generator=rng)
        for attention in ("decode_attention", "prefill_attention"):
            out, ref64 = (getattr(b, attention)(q, layer, batch, 0.125) for b in (backend, reference))
            torch.testing.assert_close(out, ref64.float(), rtol=1e-5, atol=1e-5)
