"""The small layers: embedding, output head, gated MLP, rotary angles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from twostroke_kernels.backend import RotaryTable

if TYPE_CHECKING:
    from twostroke_kernels.backend import Backend, RowNorm

    from twostroke_engine.model.config import Rope
    from twostroke_engine.model.linear import MergedLinear, RowLinear


@dataclass(frozen=True, slots=True)
class Embedding:
    """Token ids to hidden states."""

    weight: Tensor
    """[V, E]."""

    def write(self, token_ids: Tensor, out: Tensor) -> None:
        """[T] -> `out` [T, E]."""
        torch.index_select(self.weight, 0, token_ids, out=out)


@dataclass(frozen=True, slots=True)
class Head:
    """The last norm, then logits over the whole vocabulary; the weight may be the embedding's."""

    backend: Backend
    norm: RowNorm
    weight: Tensor
    """[V, E]."""

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """float32 logits [R, V] of hidden states [R, E], into `out` if it is there."""
        return self.backend.norm_logits(x, self.norm, self.weight, out)


@dataclass(frozen=True, slots=True)
class GatedMLP:
    """down(silu(gate(x)) * up(x))."""

    gate_up: MergedLinear
    down: RowLinear

    def add(self, hidden: Tensor, norm: RowNorm) -> None:
        """In place: hidden [T, E] += the output for its norm."""
        self.down.add(hidden, self.gate_up.gated(hidden, norm))


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
