"""Rotary position embedding in PyTorch: angles are gathered once a step, then one fused multiply-add per layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twostroke_kernels.backend import RotaryTable
from twostroke_kernels.kv_rows import LayerRows


@dataclass(frozen=True, slots=True)
class RotaryStep:
    """What every layer of a step shares."""

    cos: Tensor
    """[T, 1, rotary size], float32: each angle's cosine, for both halves."""
    sin: Tensor
    """[T, 1, rotary size], float32: minus the sine, then the sine."""
    key_rows: Tensor
    """[T * G] rows of the layer that take the keys."""
    value_rows: Tensor


def rotary_step(positions: Tensor, rotary: RotaryTable, rows: LayerRows, slots: Tensor) -> RotaryStep:
    """Gathers the angles of `positions` and finds the rows of `slots`."""
    cos, sin = rotary.cos[positions], rotary.sin[positions]
    keys, values = rows.of_slots(slots).flatten(1)
    return RotaryStep(torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None], keys, values)


def rotate(x: Tensor, step: RotaryStep) -> Tensor:
    """[T, heads, D] -> the same, contiguous, its first rotary-size elements turned; the products are float32."""
    size = step.cos.shape[-1]
    wide = x[..., :size].to(torch.promote_types(x.dtype, torch.float32))
    turned = (wide * step.cos).addcmul_(wide.roll(size // 2, -1), step.sin).to(x.dtype)
    return turned if size == x.shape[-1] else torch.cat((turned, x[..., size:]), -1)
