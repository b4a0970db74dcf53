"""A row of logits on the device: read as the sampler needs it, in the order of the filters, with its noise."""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234e38)
"""Of float32."""
NO_ID = tl.constexpr(2147483647)
"""Larger than any token's id."""
LOWEST_KEY = tl.constexpr(-(1 << 63))
"""Of `order_key`; no token has it."""


@triton.jit
def with_noise(x, quads, seed, choice, position):
    """Logits plus the Gumbel noise of their tokens, four in each of `quads` (id // 4); see `Backend.sample`."""
    quads = quads.to(tl.uint32)
    zero = quads * 0
    a, b, c, d = tl.philox(seed, quads, zero + position.to(tl.uint32), zero + choice.to(tl.uint32), zero)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), x.shape)
    u = ((words >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return x - tl.log(-tl.log(u))


@triton.jit
def scaled_logits(row, ids, size, temperature):
    """Logits over temperature as PyTorch rounds it; no NaN, none above the largest number."""
    x = tl.load(row + ids, mask=ids < size, other=-float("inf"))
    x = tl.div_rn(x, tl.full(x.shape, 1.0, tl.float32) * temperature)
    return tl.where(x == x, tl.minimum(x, LARGEST), -float("inf"))


@triton.jit
def first_best(x, ids):
    """The largest value and the smallest id that has it."""
    best = tl.max(x, 0)
    return best, tl.min(tl.where(x == best, ids, NO_ID), 0)


@triton.jit
def mass(x, best):
    """Odds against the best."""
    return tl.exp(x - tl.maximum(best, -LARGEST))


@triton.jit
def precedes(x, ids, value, index):
    """Whether tokens stand before the one of this value and id."""
    return (x > value) | ((x == value) & (ids < index))


@triton.jit
def one_logit(row, token, heat):
    """As `scaled_logits` has it."""
    x = tl.div_rn(tl.load(row + token), heat)
    return tl.where(x == x, tl.minimum(x, LARGEST), -float("inf"))


@triton.jit
def order_key(x, ids):
    """int64 that orders tokens by (logit ascending, id descending): the float's bits above, the id's below."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # the two zeros are equal
    ordered = tl.where(bits < 0, bits ^ NO_ID, bits).to(tl.int64)
    return (ordered << 32) + (NO_ID - ids)


@triton.jit
def id_of_key(key):
    """The id in an `order_key`."""
    return NO_ID - (key & NO_ID).to(tl.int32)
