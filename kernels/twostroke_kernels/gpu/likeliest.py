"""The k best tokens of a row without a sort: k rounds of a tournament between the bests of its stretches."""

from __future__ import annotations

import triton
import triton.language as tl

from twostroke_kernels.gpu.logit_rows import LOWEST_KEY, id_of_key, order_key


@triton.jit
def key_of_best(raw, ids, size, STRETCHES: tl.constexpr, STRETCH: tl.constexpr):
    """[STRETCHES] the largest `order_key` of each of them."""
    keys = tl.where(ids < size, order_key(raw, ids), LOWEST_KEY)
    return tl.max(tl.reshape(keys, [STRETCHES, STRETCH]), 1)


@triton.jit
def list_likeliest(
    raw, keys, num_stretches, size, total, top_ids, top_logprobs, count, STRETCH: tl.constexpr, STRETCHES: tl.constexpr
):
    """Writes the `count` best tokens of a row, best first, and their logprobs, given the logarithm of its mass.

    Each round takes the winner, and from the stretch it came from the next one behind it.
    """
    stretches = tl.arange(0, STRETCHES)
    best = tl.load(keys + stretches, mask=stretches < num_stretches, other=LOWEST_KEY)
    for place in range(count):
        key = tl.max(best, 0)
        token = id_of_key(key)
        tl.store(top_ids + place, token.to(tl.int64))
        tl.store(top_logprobs + place, tl.load(raw + token) - total)
        ids = token // STRETCH * STRETCH + tl.arange(0, STRETCH)
        others = order_key(tl.load(raw + ids, mask=ids < size, other=0.0), ids)
        following = tl.max(tl.where((ids < size) & (others < key), others, LOWEST_KEY), 0)
        best = tl.where(stretches == token // STRETCH, following, best)
