"""The small layers: norm, embedding, output head, gated MLP, rotary angles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from twostroke_kernels.backend import RotaryTable

if TYPE_CHECKING:
    from twostroke_kernels.backend import Backend

    from twostroke_engine.model.config import Rope
    from twostroke_engine.model.linear import MergedLinear, RowLinear


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Root mean square norm, alone or after a residual sum."""

    backend: Backend
    weight: Tensor
    eps: float

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum)."""
        return self.backend.add_rms_norm(x, residual, self.weight, self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of `x`."""
        return self.backend.rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Embedding:
    """Token ids to hidden states."""

    weight: Tensor
    """[V, E]."""

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, E]."""
        return torch.nn.functional.embedding(token_ids, self.weight)


@dataclass(frozen=True, slots=True)
class Head:
    """Hidden states to logits over the whole vocabulary; the weight may be the embedding's."""

    backend: Backend
    weight: Tensor
    """[V, E]."""

    def __call__(self, x: Tensor) -> Tensor:
        """float32 logits."""
        return self.backend.linear(x, self.weight).float()

    def write(self, x: Tensor, out: Tensor) -> None:
        """The same, into `out`: one pass over the logits, not two."""
        out.copy_(self.backend.linear(x, self.weight))


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x))."""

    backend: Backend
    gate_up: MergedLinear
    down: RowLinear

    def __call__(self, x: Tensor) -> Tensor:
        """[T, E] -> [T, E]."""
        return self.down(self.backend.silu_mul(self.gate_up(x)))


def rotary_table(rope: Rope, head_dim: int, num_positions: int, device: torch.device) -> RotaryTable:
    """Angles of every position, in float32 as transformers computes them."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scaled = {"default": _unscaled, "linear": _linear, "llama3": _llama3}[rope.kind](frequencies, rope)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * scaled
    return RotaryTable(cos=angles.cos().to(device), sin=angles.sin().to(device))


def _unscaled(frequencies: Tensor, rope: Rope) -> Tensor:
    return frequencies


def _linear(frequencies: Tensor, rope: Rope) -> Tensor:
    return frequencies / rope.factor


def _llama3(frequencies: Tensor, rope: Rope) -> Tensor:
    """Low frequencies are stretched, high ones kept, those between blended (Llama 3.1)."""
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_positions / wavelengths
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies
