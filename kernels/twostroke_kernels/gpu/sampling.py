"""Choosing tokens without sorting and without asking the host.

First the row's chunks, over the whole card: the best logit, the best logit plus noise, masses. Then one program a row
puts the chunks together: what a row without filters needs is then known, and `filtered_choice` does the others; a third
kernel lists the likeliest tokens where they are asked for. A row is read by the same program in the same order whatever
the batch, so its token does not depend on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.backend import SampledRows, SamplingRows
from twostroke_kernels.gpu.filtered_choice import choose_filtered
from twostroke_kernels.gpu.likeliest import list_likeliest
from twostroke_kernels.gpu.logit_chunks import log_total, read_chunk
from twostroke_kernels.gpu.logit_rows import NO_ID, first_best, mass

_CHUNK = 4096
_FILTER_STRETCH = 64
"""Tokens whose best logit the filters know: few enough to find the best tokens, not so few that there are too many."""
_KEY_STRETCH = 512
"""Tokens whose likeliest one is known when the k likeliest are listed."""
_MOST_LISTED = 64
"""Rounds of `list_likeliest`; more tokens than these take a sort."""


@dataclass(frozen=True, slots=True)
class _ChunkResults:
    """What is known of each chunk of each row."""

    floats: Tensor
    """[5, R, chunks]: best logit, best score, mass; largest raw logit, raw mass (masses relative to their largest)."""
    ints: Tensor
    """[3, R, chunks]: ids of best logit and score; whether the raw logits are finite."""
    bests: Tensor
    """[R, chunks * stretches]: best logit of each filter stretch, if anything is drawn."""
    keys: Tensor
    """[R, chunks * stretches]: largest order key of each key stretch of the raw logits, if the likeliest are listed."""


def sample(raw_logits: Tensor, logits: Tensor, rows: SamplingRows) -> SampledRows:
    """See `Backend.sample`."""
    _check(raw_logits, logits)
    num_rows, size = logits.shape
    device = logits.device
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    finite = torch.empty(num_rows, dtype=torch.bool, device=device)
    count = min(max(rows.num_logprobs, 0), size)
    top_ids = torch.empty((num_rows, count), dtype=torch.int64, device=device)
    top_logprobs = torch.empty((num_rows, count), dtype=torch.float32, device=device)
    if num_rows:
        chunks = _read_chunks(raw_logits, logits, rows)
        totals = torch.empty(num_rows, dtype=torch.float32, device=device)
        _choose(raw_logits, logits, rows, chunks, (token_ids, logprobs, finite, totals))
        if _lists(count):
            _list(raw_logits, chunks, totals, top_ids, top_logprobs)
        elif count:
            top_ids = best_ids(raw_logits, count)
            torch.sub(raw_logits.gather(1, top_ids), totals[:, None], out=top_logprobs)
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


def _lists(count: int) -> bool:
    """Whether so many likeliest tokens are found by rounds."""
    return 0 < count <= _MOST_LISTED


def _chunk_size(size: int) -> int:
    return min(_CHUNK, max(1 << (size - 1).bit_length(), 16))


def _read_chunks(raw_logits: Tensor, logits: Tensor, rows: SamplingRows) -> _ChunkResults:
    num_rows, size = logits.shape
    chunk = _chunk_size(size)
    stretch, key_stretch = min(_FILTER_STRETCH, chunk), min(_KEY_STRETCH, chunk)
    num_chunks = triton.cdiv(size, chunk)
    draws, lists = not rows.all_greedy, _lists(min(rows.num_logprobs, size))
    device = logits.device
    num_bests, num_keys = draws * num_chunks * (chunk // stretch), lists * num_chunks * (chunk // key_stretch)
    out = _ChunkResults(
        torch.empty((5, num_rows, num_chunks), dtype=torch.float32, device=device),
        torch.empty((3, num_rows, num_chunks), dtype=torch.int32, device=device),
        torch.empty((num_rows, num_bests), dtype=torch.float32, device=device),
        torch.empty((num_rows, num_keys), dtype=torch.int64, device=device),
    )
    read_chunk[(num_rows, num_chunks)](
        logits,
        raw_logits,
        rows.temperature,
        rows.seed,
        rows.choice,
        rows.position,
        out.floats,
        out.ints,
        out.bests,
        out.keys,
        logits.stride(0),
        raw_logits.stride(0),
        out.floats.stride(0),
        size,
        DRAW=draws,
        LOGPROBS=rows.num_logprobs >= 0,
        LIST=lists,
        CHUNK=chunk,
        STRETCH=stretch,
        KEY_STRETCH=key_stretch,
        num_warps=4,
    )
    return out


def _choose(
    raw_logits: Tensor, logits: Tensor, rows: SamplingRows, chunks: _ChunkResults, out: tuple[Tensor, ...]
) -> None:
    """`out`: token ids, their logprobs, whether rows are finite, and the logarithm of their whole mass."""
    num_rows, size = logits.shape
    num_chunks, num_stretches = chunks.floats.shape[2], chunks.bests.shape[1]
    chunk = _chunk_size(size)
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
        chunks.bests,
        torch.empty(chunks.bests.shape, dtype=torch.int32, device=logits.device),
        *out,
        logits.stride(0),
        raw_logits.stride(0),
        chunks.floats.stride(0),
        size,
        num_chunks,
        num_stretches,
        DRAW=not rows.all_greedy,
        LOGPROBS=rows.num_logprobs >= 0,
        CHUNKS=triton.next_power_of_2(num_chunks),
        STRETCHES=triton.next_power_of_2(max(1, num_stretches)),
        STRETCH=min(_FILTER_STRETCH, chunk),
        BLOCK=chunk,
        num_warps=4 if rows.all_greedy else 16,
    )


def _list(raw_logits: Tensor, chunks: _ChunkResults, totals: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> None:
    num_rows, count = top_ids.shape
    num_stretches = chunks.keys.shape[1]
    list_row[(num_rows,)](
        raw_logits,
        chunks.keys,
        totals,
        top_ids,
        top_logprobs,
        raw_logits.stride(0),
        raw_logits.shape[1],
        num_stretches,
        count,
        STRETCHES=triton.next_power_of_2(num_stretches),
        STRETCH=min(_KEY_STRETCH, _chunk_size(raw_logits.shape[1])),
        num_warps=1,
    )


@triton.jit
def tokens_kept(top_k, size):
    """By top-k: all of them if it says 0, or more than there are."""
    k = tl.load(top_k).to(tl.int32)
    return tl.where((k > 0) & (k < size), k, size)


@triton.jit(
    do_not_specialize=["plane", "num_chunks", "num_stretches"],
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
    bests,
    listing,
    token_ids,
    logprobs,
    finite,
    totals,
    row_stride,
    raw_stride,
    plane,
    size,
    num_chunks,
    num_stretches,
    DRAW: tl.constexpr,
    LOGPROBS: tl.constexpr,
    CHUNKS: tl.constexpr,
    STRETCHES: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, from its chunks."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    exists = chunks < num_chunks
    at = row * num_chunks + chunks
    largest = tl.load(floats + at, mask=exists, other=-float("inf"))
    best, best_id = first_best(largest, tl.load(ints + at, mask=exists, other=NO_ID))
    token = best_id
    if DRAW:
        heat = tl.load(temperature + row)
        if heat > 0:
            scores = tl.load(floats + plane + at, mask=exists, other=-float("inf"))
            _, token = first_best(scores, tl.load(ints + plane + at, mask=exists, other=NO_ID))
            total = tl.sum(tl.load(floats + 2 * plane + at, mask=exists, other=0.0) * mass(largest, best), 0)
            filters = tokens_kept(top_k + row, size), tl.load(top_p + row), tl.load(min_p + row)
            if (filters[0] < size) | (filters[1] < 1) | (filters[2] > 0):
                key = tl.load(seed + row), tl.load(choice + row), tl.load(position + row)
                of_row = bests + row * num_stretches, listing + row * num_stretches, num_stretches
                known = best, total, best_id, token
                start = logits + row * row_stride
                token = choose_filtered(start, of_row, size, heat, filters, key, known, STRETCHES, STRETCH, BLOCK)
    tl.store(token_ids + row, token.to(tl.int64))
    tl.store(finite + row, tl.min(tl.load(ints + 2 * plane + at, mask=exists, other=1), 0) > 0)
    logprob = 0.0
    if LOGPROBS:
        total = log_total(floats + 3 * plane + at, floats + 4 * plane + at, exists)
        tl.store(totals + row, total)
        logprob = tl.load(raw_logits + row * raw_stride + token) - total
    tl.store(logprobs + row, logprob)


@triton.jit(
    do_not_specialize=["num_stretches", "count"],
    do_not_specialize_on_alignment=["totals", "top_ids", "top_logprobs"],
)
def list_row(
    raw_logits,
    keys,
    totals,
    top_ids,
    top_logprobs,
    raw_stride,
    size,
    num_stretches,
    count,
    STRETCHES: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """The likeliest tokens of one row."""
    row = tl.program_id(0).to(tl.int64)
    to_ids, to_logprobs = top_ids + row * count, top_logprobs + row * count
    raw, keys_of_row, total = raw_logits + row * raw_stride, keys + row * num_stretches, tl.load(totals + row)
    list_likeliest(raw, keys_of_row, num_stretches, size, total, to_ids, to_logprobs, count, STRETCH, STRETCHES)
