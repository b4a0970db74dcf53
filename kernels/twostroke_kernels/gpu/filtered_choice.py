"""Top-k, top-p and min-p without a sort: one program and one row.

The winner of all tokens is a candidate. The tokens that pass are a beginning of the order (logit descending, id
ascending), so the candidate passes if few enough tokens, of little enough mass, stand before it. It is then the winner
among those that pass, too: it won against more. If it does not pass, nothing behind it does either; the next candidate
is the winner of what stands before it, and so on. With top-p the first one passes with probability p. A bisection of
the logits beside it bounds the number of rounds.

`chunk_bests` says where in the row a pass has anything to find.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twostroke_kernels.gpu.logit_rows import LARGEST, NO_ID, first_best, mass, noise, one_logit, precedes, scaled_logits

_DEEP = tl.constexpr(60.0)
"""exp(-60) of the best token's mass is nothing in float32, however many such tokens there are."""


@triton.jit
def mass_of_first(row, chunk_bests, size, heat, k, best, BLOCK: tl.constexpr):
    """The mass of the first k tokens in the order: bisects for the k-th logit, from one existing logit to another."""
    low = tl.maximum(best, -LARGEST) - _DEEP
    high = best
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)
        counts = tl.zeros([BLOCK], tl.int32)
        least = tl.full([BLOCK], float("inf"), tl.float32)
        greatest = tl.full([BLOCK], -float("inf"), tl.float32)
        for start in tl.range(0, size, BLOCK):
            if tl.load(chunk_bests + start // BLOCK) >= low:
                x = scaled_logits(row, start + tl.arange(0, BLOCK), size, heat)
                counts += (x >= middle).to(tl.int32)
                least = tl.minimum(least, tl.where(x >= middle, x, float("inf")))
                greatest = tl.maximum(greatest, tl.where(x < middle, x, -float("inf")))
        count = tl.sum(counts, 0)
        if count >= k:
            low = tl.min(least, 0)
            high = tl.where(count == k, low, high)
        else:
            high = tl.maximum(tl.max(greatest, 0), low)
    above = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, size, BLOCK):
        if tl.load(chunk_bests + start // BLOCK) > low:
            x = scaled_logits(row, start + tl.arange(0, BLOCK), size, heat)
            above += (x > low).to(tl.int32)
            total += tl.where(x > low, mass(x, best), 0.0)
    return tl.sum(total, 0) + (k - tl.sum(above, 0)).to(tl.float32) * mass(low, best)


@triton.jit
def before_and_above(row, chunk_bests, size, heat, best, value, token, middle, BLOCK: tl.constexpr):
    """Count and mass of the tokens before one, and of those above a logit that is no smaller."""
    num_before = tl.zeros([BLOCK], tl.int32)
    num_above = tl.zeros([BLOCK], tl.int32)
    mass_before = tl.zeros([BLOCK], tl.float32)
    mass_above = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, size, BLOCK):
        if tl.load(chunk_bests + start // BLOCK) >= value:
            ids = start + tl.arange(0, BLOCK)
            x = scaled_logits(row, ids, size, heat)
            odds = mass(x, best)
            before, above = precedes(x, ids, value, token), x > middle
            num_before += before.to(tl.int32)
            num_above += above.to(tl.int32)
            mass_before += tl.where(before, odds, 0.0)
            mass_above += tl.where(above, odds, 0.0)
    return tl.sum(num_before, 0), tl.sum(mass_before, 0), tl.sum(num_above, 0), tl.sum(mass_above, 0)


@triton.jit
def winner_before(row, chunk_bests, size, heat, best, floor, key, bound, bound_id, BLOCK: tl.constexpr):
    """The token with the best score of those before a place in the order whose odds reach `floor`."""
    seed, choice, position = key
    score = tl.full([BLOCK], -float("inf"), tl.float32)
    winner = tl.full([BLOCK], NO_ID, tl.int32)
    for start in tl.range(0, size, BLOCK):
        if tl.load(chunk_bests + start // BLOCK) >= bound:
            ids = start + tl.arange(0, BLOCK)
            x = scaled_logits(row, ids, size, heat)
            allowed = precedes(x, ids, bound, bound_id) & (mass(x, best) >= floor)
            if tl.max(allowed.to(tl.int32), 0) > 0:
                scores = tl.where(allowed, x + noise(start, seed, choice, position, BLOCK), -float("inf"))
                winner = tl.where(scores > score, ids, winner)
                score = tl.maximum(scores, score)
    _, token = first_best(score, winner)
    return token


@triton.jit
def choose_filtered(row, chunk_bests, size, heat, k, top_p, min_p, key, best, total, tokens, BLOCK: tl.constexpr):
    """The winner among the tokens that pass; `tokens` are the best one and the winner of all."""
    best_id, candidate = tokens
    floor = tl.minimum(min_p, 1.0)
    limit = float("inf")
    if top_p < 1:
        limit = total
        if k < size:
            limit = mass_of_first(row, chunk_bests, size, heat, k, best, BLOCK)
        limit = top_p * limit
    if (k == 1) | (limit <= 0):
        candidate = best_id
    value = one_logit(row, candidate, heat)
    passes_from = best
    searching = candidate != best_id
    while searching:
        middle = value + (passes_from - value) * 0.5
        num_before, mass_before, num_above, mass_above = before_and_above(
            row, chunk_bests, size, heat, best, value, candidate, middle, BLOCK
        )
        passes = (num_before < k) & (mass_before < limit) & (mass(value, best) >= floor)
        searching = (num_before > 0) & (passes == 0)
        if searching:
            bound, bound_id = value, candidate
            if (num_above > 0) & ((num_above >= k) | (mass_above >= limit)):
                # What stands above `middle` alone is too much already: nothing at or below it passes.
                bound, bound_id = middle, -1
            else:
                passes_from = middle
            candidate = winner_before(row, chunk_bests, size, heat, best, floor, key, bound, bound_id, BLOCK)
            candidate = tl.where(candidate == NO_ID, best_id, candidate)
            value = one_logit(row, candidate, heat)
    return candidate
