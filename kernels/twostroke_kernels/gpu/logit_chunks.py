"""What is known of a chunk of a row of logits before anything is chosen: one program each, over the whole card."""

from __future__ import annotations

import triton
import triton.language as tl

from twostroke_kernels.gpu.likeliest import key_of_best
from twostroke_kernels.gpu.logit_rows import LARGEST, first_best, mass, scaled_logits, with_noise


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
    bests,
    keys,
    row_stride,
    raw_stride,
    plane,
    size,
    DRAW: tl.constexpr,
    LOGPROBS: tl.constexpr,
    LIST: tl.constexpr,
    CHUNK: tl.constexpr,
    STRETCH: tl.constexpr,
    KEY_STRETCH: tl.constexpr,
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
        stretches = tl.arange(0, CHUNK // STRETCH)
        tl.store(bests + at * (CHUNK // STRETCH) + stretches, tl.max(tl.reshape(x, [CHUNK // STRETCH, STRETCH]), 1))
        tl.store(floats + 2 * plane + at, tl.sum(mass(x, best), 0))
        quads = start // 4 + tl.arange(0, CHUNK // 4)
        noisy = with_noise(x, quads, tl.load(seed + row), tl.load(choice + row), tl.load(position + row))
        score, score_id = first_best(noisy, ids)
        tl.store(floats + plane + at, score)
        tl.store(ints + plane + at, score_id)
    raw = tl.load(raw_logits + row * raw_stride + ids, mask=ids < size, other=0.0)
    tl.store(ints + 2 * plane + at, tl.min((tl.abs(raw) <= LARGEST).to(tl.int32), 0))
    if LIST:
        stretches = tl.arange(0, CHUNK // KEY_STRETCH)
        keys_of_chunk = key_of_best(raw, ids, size, CHUNK // KEY_STRETCH, KEY_STRETCH)
        tl.store(keys + at * (CHUNK // KEY_STRETCH) + stretches, keys_of_chunk)
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
