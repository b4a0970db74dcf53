"""Attention over the paged pool: prompts against cuDNN on contiguous tensors, decode steps against the copy rate."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from twostroke_kernels.backend import Backend, PagedBatch

from benchmarks.kernel_case import KernelCase, require_as_good

PREFILL = tuple(f"attention/prefill/bf16/{length}" for length in (1024, 2048, 8192, 16384))
DECODE = ("attention/decode/bf16/b64/c1024", "attention/decode/bf16/b256/c1024", "attention/decode/bf16/b16/c8192")
TINY_ATTENTION = ("attention/prefill/bf16/40", "attention/decode/bf16/b3/c40")
MIN_POOL_BYTES = 1 << 30
"""Decode calls walk over as many layers as keep their KV out of the caches."""
CHECKED_QUERIES = 64
CHECKED_SEQUENCES = 8


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention layer and of the pool's blocks."""

    queries: int
    kv: int
    size: int
    block: int

    def token_bytes(self) -> int:
        """KV of one token in one layer, half precision."""
        return 4 * self.kv * self.size


LLAMA_HEADS = Heads(32, 8, 128, 64)
TINY_HEADS = Heads(4, 2, 32, 16)


def attention_case(name: str, backend: Backend, heads: Heads) -> KernelCase:
    """The case that a name says.

    Raises:
        ValueError: it says none.
    """
    if match := re.fullmatch(r"attention/prefill/bf16/(\d+)", name):
        return _prefill(name, backend, heads, int(match.group(1)))
    if match := re.fullmatch(r"attention/decode/bf16/b(\d+)/c(\d+)", name):
        return _decode(name, backend, heads, *map(int, match.groups()))
    raise ValueError(f"no such case: {name}")


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _batch(device: torch.device, heads: Heads, num_sequences: int, context: int, queries: int) -> PagedBatch:
    """Sequences of one length; their blocks lie in no order."""
    each = -(-context // heads.block)
    tables = torch.randperm(num_sequences * each, device=device).view(num_sequences, each)
    starts = torch.arange(num_sequences + 1, device=device) * queries
    lens = torch.full((num_sequences,), context, device=device)
    return PagedBatch(tables, starts, lens, queries, context)


def _contiguous(layer: Tensor, batch: PagedBatch, sequence: int) -> tuple[Tensor, Tensor]:
    """Keys and values [context, G, D] of a sequence."""
    context = int(batch.context_lens[sequence])
    keys, values = layer[batch.block_tables[sequence]].transpose(0, 1).flatten(1, 2)[:, :context]
    return keys, values


def _plain(q: Tensor, keys: Tensor, values: Tensor, first_position: int) -> Tensor:
    """PyTorch's attention of queries [T, H, D] at `first_position` and after, causal, at the dtype given."""
    group = q.shape[1] // keys.shape[1]
    columns = torch.arange(keys.shape[0], device=q.device)
    rows = first_position + torch.arange(q.shape[0], device=q.device)
    q, k, v = (x.transpose(0, 1) for x in (q, keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=columns[None, :] <= rows[:, None]).transpose(0, 1)


def _prefill(name: str, backend: Backend, heads: Heads, length: int) -> KernelCase:
    device, scale = backend.device, heads.size**-0.5
    q = _random(device, length, heads.queries, heads.size)
    batch = _batch(device, heads, 1, length, length)
    pool = _random(device, batch.block_tables.numel(), 2, 2, heads.block, heads.kv, heads.size)
    layer = pool[:, 1]
    keys, values = _contiguous(layer, batch, 0)
    tail = min(CHECKED_QUERIES, length)

    def check() -> None:
        out = backend.prefill_attention(q, layer, batch, scale)
        for at in (slice(0, tail), slice(length - tail, length)):
            exact = _plain(q[at].double(), keys.double(), values.double(), at.start)
            require_as_good(name, out[at], exact, _plain(q[at], keys, values, at.start))

    group = heads.queries // heads.kv
    dense = [x.transpose(0, 1)[None].contiguous() for x in (q, keys.repeat_interleave(group, 1))]
    dense.append(values.repeat_interleave(group, 1).transpose(0, 1)[None].contiguous())
    return KernelCase(
        name,
        calls=[lambda: backend.prefill_attention(q, layer, batch, scale)] * 4,
        check=check,
        bytes=4 * q.numel() + length * heads.token_bytes(),
        flops=2 * length * length * heads.queries * heads.size,
        peer="cuDNN" if device.type == "cuda" else "PyTorch",
        peer_calls=[lambda: _library(*dense)] * 4,
    )


def _library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[1, H, S, D], every query head with keys and values of its own: the library's best case."""
    if q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _decode(name: str, backend: Backend, heads: Heads, num_sequences: int, context: int) -> KernelCase:
    device, scale = backend.device, heads.size**-0.5
    q = _random(device, num_sequences, heads.queries, heads.size)
    batch = _batch(device, heads, num_sequences, context, 1)
    num_blocks = batch.block_tables.numel()
    layer_bytes = num_blocks * heads.block * heads.token_bytes()
    num_layers = 2 if device.type == "cpu" else max(2, min(16, -(-MIN_POOL_BYTES // layer_bytes)))
    pool = _random(device, num_blocks, num_layers, 2, heads.block, heads.kv, heads.size)

    def check() -> None:
        out = backend.decode_attention(q, pool[:, 1], batch, scale)
        for sequence in range(0, num_sequences, max(1, num_sequences // CHECKED_SEQUENCES)):
            keys, values = _contiguous(pool[:, 1], batch, sequence)
            row = q[sequence : sequence + 1]
            exact = _plain(row.double(), keys.double(), values.double(), context - 1)
            require_as_good(name, out[sequence : sequence + 1], exact, _plain(row, keys, values, context - 1))

    return KernelCase(
        name,
        calls=[partial(backend.decode_attention, q, pool[:, layer], batch, scale) for layer in range(num_layers)],
        check=check,
        bytes=num_sequences * context * heads.token_bytes() + 4 * q.numel(),
    )
