"""The online softmax of `hopper_prefill`, on the scores of a step: a pair of tiles, one twice where a step is one."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def hide_later_of_tile(scores: gl.tensor, positions: gl.tensor, start: gl.tensor, SCORES: gl.constexpr) -> gl.tensor:
    """Minus infinity for keys that come after a row's query."""
    tokens = start + gl.arange(0, 64, layout=gl.SliceLayout(0, SCORES))
    return gl.where(gl.expand_dims(positions, 1) >= gl.expand_dims(tokens, 0), scores, -float("inf"))


@gluon.jit
def hide_later(
    scores: gl.tuple, positions: gl.tensor, i: gl.tensor, SCORES: gl.constexpr, TILES: gl.constexpr
) -> gl.tuple:
    """`hide_later_of_tile` for each tile of step i."""
    first = hide_later_of_tile(scores[0], positions, i * (64 * TILES), SCORES)
    second = first
    if TILES == 2:
        second = hide_later_of_tile(scores[1], positions, i * (64 * TILES) + 64, SCORES)
    return first, second


@gluon.jit
def soften(scores: gl.tuple, best: gl.tensor, total: gl.tensor, scale: gl.tensor, TILES: gl.constexpr) -> gl.tuple:
    """One step of the online softmax: weights (float32), new best and total, and what the sum so far shrinks by."""
    new_best = gl.maximum(best, gl.max(scores[0], 1))
    if TILES == 2:
        new_best = gl.maximum(new_best, gl.max(scores[1], 1))
    shift = new_best * scale
    # Exactly 1 where no key was better, hidden ones included: with `best * scale - shift`, a fused multiply-add, a row
    # would depend on how many hidden keys its tile walks over.
    shrink = gl.exp2((best - new_best) * scale)
    first = gl.exp2(scores[0] * scale - gl.expand_dims(shift, 1))
    total = total * shrink + gl.sum(first, 1)
    second = first
    if TILES == 2:
        second = gl.exp2(scores[1] * scale - gl.expand_dims(shift, 1))
        total = total + gl.sum(second, 1)
    return (first, second), new_best, total, shrink


@gluon.jit
def as_operand(weights: gl.tuple, OUT: gl.constexpr, DTYPE: gl.constexpr, TILES: gl.constexpr) -> gl.tuple:
    """Weights rounded for the product with values; no data leaves its thread."""
    first = gl.convert_layout(weights[0].to(DTYPE), gl.DotOperandLayout(0, OUT, 2))
    second = first
    if TILES == 2:
        second = gl.convert_layout(weights[1].to(DTYPE), gl.DotOperandLayout(0, OUT, 2))
    return first, second
