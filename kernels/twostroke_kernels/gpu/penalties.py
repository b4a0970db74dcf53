"""Penalties, bias and masks: sparse changes of logits, in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from twostroke_kernels.backend import Penalties

_BLOCK = 256


def penalize(logits: Tensor, penalties: Penalties) -> None:
    """See `Backend.penalize`. A cell whose repetition is 1 and whose subtract is 0 is not even written."""
    count = penalties.rows.shape[0]
    if count:
        penalize_cells[(triton.cdiv(count, _BLOCK),)](
            logits,
            penalties.rows,
            penalties.tokens,
            penalties.repetition,
            penalties.subtract,
            count,
            logits.stride(0),
            _BLOCK,
            num_warps=4,
        )


@triton.jit(
    do_not_specialize=["count", "row_stride"],
    do_not_specialize_on_alignment=["rows", "tokens", "repetition", "subtract"],
)
def penalize_cells(logits, rows, tokens, repetition, subtract, count, row_stride, BLOCK: tl.constexpr):
    """One lane a cell."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < count
    row = tl.load(rows + cell, mask=inside, other=0).to(tl.int64)
    token = tl.load(tokens + cell, mask=inside, other=0)
    factor = tl.load(repetition + cell, mask=inside, other=1.0)
    less = tl.load(subtract + cell, mask=inside, other=0.0)
    changes = (factor != 1.0) | (less != 0.0)
    at = logits + row * row_stride + token
    value = tl.load(at, mask=inside, other=0.0)
    value = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
    tl.store(at, value - less, mask=inside & changes)
