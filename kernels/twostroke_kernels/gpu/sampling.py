"""Choosing tokens without sorting and without asking the host.

First the row's chunks, over the whole card: the best logit, the best logit plus noise, masses. Then one program a row
puts the chunks together: what a row without filters needs is then known, and `filtered_choice` does the others. A row
is read by the same program in the same order whatever the batch, so its token does not depend on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.backend import SampledRows, SamplingRows
from twostroke_kernels.gpu.filtered_choice import choose_filtered
from twostroke_kernels.gpu.logit_rows import LARGEST, NO_ID, first_best, mass, noise, scaled_logits

_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class _ChunkResults:
    """What is known of each chunk of each row."""

    floats: Tensor
    """[5, R, chunks]: best logit, best score, mass; largest raw logit, raw mass (masses relative to their largest)."""
    ints: Tensor
    """[3, R, chunks]: ids of best logit and score; whether the raw logits are finite."""


def sample(raw_logits: Tensor, logits: Tensor, rows: SamplingRows) -> SampledRows:
    """See `Backend.sample`."""
    _check(raw_logits, logits)
    num_rows, size = logits.shape
    device = logits.device
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    finite = torch.empty(num_rows, dtype=torch.bool, device=device)
    best = max(rows.num_logprobs, 0)
    top_logprobs = torch.empty((num_rows, min(best, size)), dtype=torch.float32, device=device)
    top_ids = best_ids(raw_logits, top_logprobs.shape[1])
    if num_rows:
        chunks = _read_chunks(raw_logits, logits, rows)
        _choose(raw_logits, logits, rows, chunks, (token_ids, logprobs, finite))
    if top_ids.numel():
        total = raw_logits.gather(1, token_ids[:, None]) - logprobs[:, None]
        torch.sub(raw_logits.gather(1, top_ids), total, out=top_logprobs)
    return SampledRows(token_ids, logprobs, top_ids, top_logprobs, finite)


def best_ids(logits: Tensor, count: int) -> Tensor:
    """[R, count] ids by (logit descending, id ascending): one `topk` of integers that hold both."""
    num_rows, size = logits.shape
    if count == 0 or num_rows == 0:
        return torch.empty((num_rows, count), dtype=torch.int64, device=logits.device)
    bits = (logits + 0.0).view(torch.int32)  # plus zero: the two zeros are equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    keys = (ordered << 32) + torch.arange(size - 1, -1, -1, device=logits.device)
    return size - 1 - (keys.topk(count).values & 0xFFFFFFFF)


def _check(raw_logits: Tensor, logits: Tensor) -> None:
    for name, tensor in (("raw_logits", raw_logits), ("logits", logits)):
        if tensor.dtype != torch.float32 or tensor.stride(-1) != 1 or tensor.shape != logits.shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype}: float32 rows are needed, as in logits")


def _chunk_size(size: int) -> int:
    return min(_CHUNK, max(1 << (size - 1).bit_length(), 16))


def _read_chunks(raw_logits: Tensor, logits: Tensor, rows: SamplingRows) -> _ChunkResults:
    num_rows, size = logits.shape
    chunk = _chunk_size(size)
    num_chunks = triton.cdiv(size, chunk)
    floats = torch.empty((5, num_rows, num_chunks), dtype=torch.float32, device=logits.device)
    ints = torch.empty((3, num_rows, num_chunks), dtype=torch.int32, device=logits.device)
    read_chunk[(num_rows, num_chunks)](
        logits,
        raw_logits,
        rows.temperature,
        rows.seed,
        rows.choice,
        rows.position,
        floats,
        ints,
        logits.stride(0),
        raw_logits.stride(0),
        floats.stride(0),
        size,
        SAME=raw_logits.data_ptr() == logits.data_ptr() and raw_logits.stride(0) == logits.stride(0),
        DRAW=not rows.all_greedy,
        LOGPROBS=rows.num_logprobs >= 0,
        CHUNK=chunk,
        num_warps=4,
    )
    return _ChunkResults(floats, ints)


def _choose(
    raw_logits: Tensor, logits: Tensor, rows: SamplingRows, chunks: _ChunkResults, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    num_rows, size = logits.shape
    num_chunks = chunks.floats.shape[2]
    choose_token[(num_rows,)](
        logits,
        raw_logits,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        rows.seed,
        rows.choice,
        rows.position,
        chunks.floats,
        chunks.ints,
        *out,
        logits.stride(0),
        raw_logits.stride(0),
        chunks.floats.stride(0),
        size,
        num_chunks,
        DRAW=not rows.all_greedy,
        LOGPROBS=rows.num_logprobs >= 0,
        CHUNKS=triton.next_power_of_2(num_chunks),
        BLOCK=_chunk_size(size),
        num_warps=4 if rows.all_greedy else 16,
    )


@triton.jit(
    do_not_specialize=["plane"],
    do_not_specialize_on_alignment=["temperature", "seed", "choice", "position"],
)
def read_chunk(
    logits,
    raw_logits,
    temperature,
    seed,
    choice,
    position,
    floats,
    ints,
    row_stride,
    raw_stride,
    plane,
    size,
    SAME: tl.constexpr,
    DRAW: tl.constexpr,
    LOGPROBS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one row."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * CHUNK
    ids = start + tl.arange(0, CHUNK)
    at = row * tl.num_programs(1) + tl.program_id(1)
    heat = 1.0
    if DRAW:
        heat = tl.load(temperature + row)
        heat = tl.where(heat > 0, heat, 1.0)
    x = scaled_logits(logits + row * row_stride, ids, size, heat)
    best, best_id = first_best(x, ids)
    tl.store(floats + at, best)
    tl.store(ints + at, best_id)
    if DRAW:
        tl.store(floats + 2 * plane + at, tl.sum(mass(x, best), 0))
        score, score_id = first_best(
            x + noise(start, tl.load(seed + row), tl.load(choice + row), tl.load(position + row), CHUNK), ids
        )
        tl.store(floats + plane + at, score)
        tl.store(ints + plane + at, score_id)
    raw = tl.load(raw_logits + row * raw_stride + ids, mask=ids < size, other=0.0)
    tl.store(ints + 2 * plane + at, tl.min((tl.abs(raw) <= LARGEST).to(tl.int32), 0))
    if LOGPROBS:
        raw = tl.where(ids < size, raw, -float("inf"))
        most = tl.max(raw, 0)
        tl.store(floats + 3 * plane + at, most)
        tl.store(floats + 4 * plane + at, tl.sum(mass(raw, most), 0))


@triton.jit
def log_total(largest, masses, exists):
    """The logarithm of a row's whole mass, from its chunks'."""
    each = tl.load(largest, mask=exists, other=-float("inf"))
    most = tl.max(each, 0)
    return most + tl.log(tl.sum(tl.load(masses, mask=exists, other=0.0) * mass(each, most), 0))


@triton.jit(
    do_not_specialize=["plane", "num_chunks"],
    do_not_specialize_on_alignment=["temperature", "top_k", "top_p", "min_p", "seed", "choice", "position"],
)
def choose_token(
    logits,
    raw_logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    choice,
    position,
    floats,
    ints,
    token_ids,
    logprobs,
    finite,
    row_stride,
    raw_stride,
    plane,
    size,
    num_chunks,
    DRAW: tl.constexpr,
    LOGPROBS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, from its chunks."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    exists = chunks < num_chunks
    at = row * num_chunks + chunks
    bests = tl.load(floats + at, mask=exists, other=-float("inf"))
    best, best_id = first_best(bests, tl.load(ints + at, mask=exists, other=NO_ID))
    token = best_id
    if DRAW:
        heat = tl.load(temperature + row)
        if heat > 0:
            scores = tl.load(floats + plane + at, mask=exists, other=-float("inf"))
            _, token = first_best(scores, tl.load(ints + plane + at, mask=exists, other=NO_ID))
            total = tl.sum(tl.load(floats + 2 * plane + at, mask=exists, other=0.0) * mass(bests, best), 0)
            k = tl.load(top_k + row).to(tl.int32)
            k = tl.where((k > 0) & (k < size), k, size)
            p, floor = tl.load(top_p + row), tl.load(min_p + row)
            if (k < size) | (p < 1) | (floor > 0):
                key = tl.load(seed + row), tl.load(choice + row), tl.load(position + row)
                start = logits + row * row_stride
                tokens = best_id, token
                token = choose_filtered(
                    start, floats + row * num_chunks, size, heat, k, p, floor, key, best, total, tokens, BLOCK
                )
    tl.store(token_ids + row, token.to(tl.int64))
    tl.store(finite + row, tl.min(tl.load(ints + 2 * plane + at, mask=exists, other=1), 0) > 0)
    logprob = 0.0
    if LOGPROBS:
        raw = tl.load(raw_logits + row * raw_stride + token)
        logprob = raw - log_total(floats + 3 * plane + at, floats + 4 * plane + at, exists)
    tl.store(logprobs + row, logprob)
