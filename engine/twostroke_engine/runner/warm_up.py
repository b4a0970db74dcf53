"""Runs once, before the first request, what a request may be the first to ask for: nothing is compiled while serving.

Captured graphs and the profile run have compiled the layers by then. What is left depends on requests: how tokens are
chosen, forks, transfers, and attention beside prompt chunks, whose split depends on lengths.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import torch
from twostroke_kernels.backend import KVItems, KVWire, PagedBatch, Penalties, SamplingRows

from twostroke_engine.kv.hashing import HASH_UNIT_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from twostroke_kernels.backend import Backend

    from twostroke_engine.model.config import ModelConfig

NUM_TOP_LOGPROBS = (0, 5)
QUERY_TOKENS = 16


@torch.inference_mode()
def warm_up(backend: Backend, kv_pool: Tensor, model: ModelConfig, max_rows: int, max_model_len: int) -> None:
    """Leaves the first block of the pool as it was, and overwrites the second; waits for the device at the end."""
    warm_sampling(backend, model.vocab_size)
    warm_blocks(backend, kv_pool)
    warm_attention(backend, kv_pool, model, max_rows, max_model_len)
    if backend.device.type == "cuda":
        torch.cuda.synchronize(backend.device)


def warm_sampling(backend: Backend, vocab_size: int) -> None:
    """Every way of choosing: greedy or not, with every filter, with logprobs or not, after penalties or not."""
    device = backend.device
    logits = torch.zeros(2, vocab_size, dtype=torch.float32, device=device)
    backend.penalize(logits, _penalties(device))
    for rows in _ways(device):
        for num_logprobs in (-1, *NUM_TOP_LOGPROBS):
            backend.sample(logits, logits, replace(rows, num_logprobs=min(num_logprobs, vocab_size)))


def _penalties(device: torch.device) -> Penalties:
    cells = torch.zeros(1, dtype=torch.int64, device=device)
    return Penalties(cells, cells, torch.ones(1, device=device), torch.zeros(1, device=device))


def _ways(device: torch.device) -> Iterator[SamplingRows]:
    """All greedy, and one row with every filter beside one with none."""

    def floats(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    greedy = SamplingRows(floats(0, 0), zeros, floats(1, 1), floats(0, 0), zeros, zeros, zeros, True, -1)
    yield greedy
    top_k = torch.tensor([2, 0], device=device)
    yield replace(
        greedy, temperature=floats(1, 1), top_k=top_k, top_p=floats(0.5, 1), min_p=floats(0.1, 0), all_greedy=False
    )


def warm_blocks(backend: Backend, kv_pool: Tensor) -> None:
    """Copies of blocks, and both ends of a transfer, of one layer and of all, whatever the peer stores."""
    if kv_pool.shape[0] < 2:
        return
    both = torch.arange(2, device=backend.device)
    first, second = both[:1], both[1:]
    backend.copy_blocks(kv_pool, first, second)
    for wire, num_layers in product(_wires(kv_pool), {1, kv_pool.shape[1]}):
        segment, _ = backend.pack_kv(kv_pool, first, 0, num_layers, wire)
        target = second * wire.split(kv_pool)
        backend.unpack_kv(kv_pool, target, 0, segment, wire)
        backend.digest(segment)
        if wire.dtype is kv_pool.dtype:
            backend.push_kv(KVItems(kv_pool, first), KVItems(kv_pool, target), 0, num_layers, wire)
            backend.digest_kv(KVItems(kv_pool, target), 0, num_layers, wire)


def _wires(kv_pool: Tensor) -> Iterator[KVWire]:
    """Blocks as they are, or as small as they may be; numbers as they are, or in one byte. All as they are comes last,
    so that the second block ends as a copy of the first."""
    block_size, head_size = kv_pool.shape[3], kv_pool.shape[5]
    dtypes = (*(() if head_size % 4 else (torch.float8_e4m3fn, torch.int8)), kv_pool.dtype)
    for size, dtype in product(sorted({HASH_UNIT_TOKENS, block_size}), dtypes):
        yield KVWire(size, dtype)


def warm_attention(backend: Backend, kv_pool: Tensor, model: ModelConfig, max_rows: int, max_model_len: int) -> None:
    """One token of context each, in the first block; how the work is cut follows from the bound on lengths."""
    layer, scale, dtype = kv_pool[:, 0], model.head_dim**-0.5, kv_pool.dtype
    shape = (max(max_rows, QUERY_TOKENS), model.num_heads, model.head_dim)
    q = torch.zeros(shape, dtype=dtype, device=backend.device)
    for max_context_len in _powers(layer.shape[2], max_model_len):
        for num_sequences in _powers(1, max_rows):
            batch = _batch(backend.device, num_sequences, 1, max_context_len)
            backend.decode_attention(q[:num_sequences], layer, batch, scale)
        chunk = _batch(backend.device, 1, QUERY_TOKENS, max_context_len)
        backend.prefill_attention(q[:QUERY_TOKENS], layer, chunk, scale)


def _batch(device: torch.device, num_sequences: int, queries: int, max_context_len: int) -> PagedBatch:
    return PagedBatch(
        block_tables=torch.zeros(num_sequences, 1, dtype=torch.int64, device=device),
        query_starts=torch.arange(num_sequences + 1, device=device) * queries,
        context_lens=torch.full((num_sequences,), queries, dtype=torch.int64, device=device),
        max_query_len=queries,
        max_context_len=max_context_len,
    )


def _powers(first: int, last: int) -> Iterator[int]:
    """`first`, doubled up to `last`, and `last` itself."""
    while first < last:
        yield first
        first *= 2
    yield last
