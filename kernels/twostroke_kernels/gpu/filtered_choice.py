"""Top-k, top-p and min-p without a sort: one program and one row.

The winner of all tokens is a candidate. The tokens that pass are a beginning of the order (logit descending, id
ascending), so the candidate passes if few enough tokens, of little enough mass, stand before it. It is then the winner
among those that pass, too: it won against more. If it does not pass, nothing behind it does either; the next candidate
is the winner of what stands before it, and so on. With top-p the first one passes with probability p. A bisection of
the logits beside it bounds the number of rounds.

No token below the first candidate matters, and none below the k-th best. A row is cut into short stretches whose best
logits are known: if k of them reach a logit, so do k tokens. The stretches that reach the bound are listed once, and
every pass reads the listed ones alone: with a small k about k of them, whatever the size of the vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from twostroke_kernels.gpu.logit_rows import (
    LARGEST,
    NO_ID,
    first_best,
    mass,
    one_logit,
    precedes,
    scaled_logits,
    with_noise,
)

_DEEP = tl.constexpr(60.0)
"""exp(-60) of the best token's mass is nothing in float32, however many such tokens there are."""
_CUTS = tl.constexpr(12)
"""Bisections of the first bound: it lies within 60 / 4096 of the best one that stretches can give."""


@triton.jit
def bound_of_first(bests, k, best):
    """A logit that k stretches reach, and so k tokens; else one below which nothing counts."""
    low = tl.maximum(best, -LARGEST) - _DEEP
    high = best
    for _ in range(_CUTS):
        middle = low + (high - low) * 0.5
        enough = tl.sum((bests >= middle).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def list_stretches(bests, bound, listing):
    """Writes the numbers of the stretches that reach the bound, in order; their count."""
    reach = ((bests >= bound) & (bests > -float("inf"))).to(tl.int32)
    numbers = tl.arange(0, bests.shape[0])
    tl.store(listing + tl.cumsum(reach, 0) - 1, numbers, mask=reach > 0)
    tl.debug_barrier()  # other lanes of this program read them
    return tl.sum(reach, 0)


@triton.jit
def listed_numbers(listed, start, STRETCH: tl.constexpr, COUNT: tl.constexpr):
    """[COUNT] of the listed stretches, from the `start`-th on; beyond the last, one that holds no token's id."""
    listing, num_listed = listed
    places = start + tl.arange(0, COUNT)
    return tl.load(listing + places, mask=places < num_listed, other=NO_ID // STRETCH)


@triton.jit
def parts_of(numbers, PARTS: tl.constexpr):
    """[stretches] -> [stretches, PARTS]: the parts of each, as all parts of the row are numbered."""
    return numbers[:, None] * PARTS + tl.arange(0, PARTS)[None, :]


@triton.jit
def mass_of_first(row, listed, size, heat, k, best, bound, STRETCH: tl.constexpr, BLOCK: tl.constexpr):
    """The mass of the first k tokens in the order: bisects for the k-th logit, from one existing logit to another."""
    STRETCHES: tl.constexpr = BLOCK // STRETCH
    low = bound
    high = best
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where(middle > low, middle, high)
        counts = tl.zeros([STRETCHES, STRETCH], tl.int32)
        least = tl.full([STRETCHES, STRETCH], float("inf"), tl.float32)
        greatest = tl.full([STRETCHES, STRETCH], -float("inf"), tl.float32)
        for start in tl.range(0, listed[1], STRETCHES):
            ids = parts_of(listed_numbers(listed, start, STRETCH, STRETCHES), STRETCH)
            x = scaled_logits(row, ids, size, heat)
            counts += (x >= middle).to(tl.int32)
            least = tl.minimum(least, tl.where(x >= middle, x, float("inf")))
            greatest = tl.maximum(greatest, tl.where(x < middle, x, -float("inf")))
        count = tl.sum(counts)
        if count >= k:
            low = tl.min(least)
            high = tl.where(count == k, low, high)
        else:
            high = tl.maximum(tl.max(greatest), low)
    above = tl.zeros([STRETCHES, STRETCH], tl.int32)
    total = tl.zeros([STRETCHES, STRETCH], tl.float32)
    for start in tl.range(0, listed[1], STRETCHES):
        ids = parts_of(listed_numbers(listed, start, STRETCH, STRETCHES), STRETCH)
        x = scaled_logits(row, ids, size, heat)
        above += (x > low).to(tl.int32)
        total += tl.where(x > low, mass(x, best), 0.0)
    return tl.sum(total) + (k - tl.sum(above)).to(tl.float32) * mass(low, best)


@triton.jit
def before_and_above(row, listed, size, heat, best, value, token, middle, STRETCH: tl.constexpr, BLOCK: tl.constexpr):
    """Count and mass of the tokens before one, and of those above a logit that is no smaller."""
    STRETCHES: tl.constexpr = BLOCK // STRETCH
    num_before = tl.zeros([STRETCHES, STRETCH], tl.int32)
    num_above = tl.zeros([STRETCHES, STRETCH], tl.int32)
    mass_before = tl.zeros([STRETCHES, STRETCH], tl.float32)
    mass_above = tl.zeros([STRETCHES, STRETCH], tl.float32)
    for start in tl.range(0, listed[1], STRETCHES):
        ids = parts_of(listed_numbers(listed, start, STRETCH, STRETCHES), STRETCH)
        x = scaled_logits(row, ids, size, heat)
        odds = mass(x, best)
        before, above = precedes(x, ids, value, token), x > middle
        num_before += before.to(tl.int32)
        num_above += above.to(tl.int32)
        mass_before += tl.where(before, odds, 0.0)
        mass_above += tl.where(above, odds, 0.0)
    return tl.sum(num_before), tl.sum(mass_before), tl.sum(num_above), tl.sum(mass_above)


@triton.jit
def winner_before(
    row, listed, size, heat, best, floor, key, bound, bound_id, STRETCH: tl.constexpr, BLOCK: tl.constexpr
):
    """The token with the best score of those before a place in the order whose odds reach `floor`; or NO_ID."""
    STRETCHES: tl.constexpr = BLOCK // STRETCH
    seed, choice, position = key
    score = tl.full([STRETCHES, STRETCH], -float("inf"), tl.float32)
    winner = tl.full([STRETCHES, STRETCH], NO_ID, tl.int32)
    for start in tl.range(0, listed[1], STRETCHES):
        numbers = listed_numbers(listed, start, STRETCH, STRETCHES)
        ids = parts_of(numbers, STRETCH)
        x = scaled_logits(row, ids, size, heat)
        allowed = precedes(x, ids, bound, bound_id) & (mass(x, best) >= floor)
        if tl.max(allowed.to(tl.int32)) > 0:
            noisy = with_noise(x, parts_of(numbers, STRETCH // 4), seed, choice, position)
            scores = tl.where(allowed, noisy, -float("inf"))
            winner = tl.where(scores > score, ids, winner)
            score = tl.maximum(scores, score)
    _, token = first_best(tl.reshape(score, [BLOCK]), tl.reshape(winner, [BLOCK]))
    return token


@triton.jit
def choose_filtered(
    row, stretches, size, heat, filters, key, known, STRETCHES: tl.constexpr, STRETCH: tl.constexpr, BLOCK: tl.constexpr
):
    """The winner among the tokens that pass.

    `stretches`: the best logits of the row's stretches, room for as many numbers, and their count. `filters`: k, the p
    of top-p and of min-p. `known`: the best logit, the mass of all tokens, the ids of the best one and of the winner.
    """
    bests_at, listing, num_stretches = stretches
    k, top_p, min_p = filters
    best, total, best_id, candidate = known
    numbers = tl.arange(0, STRETCHES)
    bests = tl.load(bests_at + numbers, mask=numbers < num_stretches, other=-float("inf"))
    floor = tl.minimum(min_p, 1.0)
    limit = float("inf")
    value = one_logit(row, candidate, heat)
    bound = value
    if k < size:
        bound = bound_of_first(bests, k, best)
    listed = listing, list_stretches(bests, bound, listing)
    if top_p < 1:
        limit = total
        if k < size:
            limit = mass_of_first(row, listed, size, heat, k, best, bound, STRETCH, BLOCK)
        limit = top_p * limit
    if (k == 1) | (limit <= 0):
        candidate = best_id
    elif value < bound:
        # k tokens stand before it.
        candidate = winner_before(row, listed, size, heat, best, floor, key, bound, NO_ID, STRETCH, BLOCK)
        candidate = tl.where(candidate == NO_ID, best_id, candidate)
    value = one_logit(row, candidate, heat)
    passes_from = best
    searching = candidate != best_id
    while searching:
        middle = value + (passes_from - value) * 0.5
        num_before, mass_before, num_above, mass_above = before_and_above(
            row, listed, size, heat, best, value, candidate, middle, STRETCH, BLOCK
        )
        passes = (num_before < k) & (mass_before < limit) & (mass(value, best) >= floor)
        searching = (num_before > 0) & (passes == 0)
        if searching:
            below, below_id = value, candidate
            if (num_above > 0) & ((num_above >= k) | (mass_above >= limit)):
                # What stands above `middle` alone is too much already: nothing at or below it passes.
                below, below_id = middle, -1
            else:
                passes_from = middle
            candidate = winner_before(row, listed, size, heat, best, floor, key, below, below_id, STRETCH, BLOCK)
            candidate = tl.where(candidate == NO_ID, best_id, candidate)
            value = one_logit(row, candidate, heat)
    return candidate
