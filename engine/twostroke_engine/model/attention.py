"""`Attention`: projections, rotation, the KV cache, and the two kinds of attention over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from twostroke_kernels.backend import Backend, PagedBatch, Rotation, RowNorm

    from twostroke_engine.model.linear import QKVLinear, RowLinear
    from twostroke_engine.runner.inputs import ForwardInputs


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Rows of a step that one kind of attention computes."""

    batch: PagedBatch
    q: Tensor
    """[rows, H, D]."""
    out: Tensor
    """[rows, H, D], written."""


@dataclass(frozen=True, slots=True)
class StepAttention:
    """What attention of every layer of a step reads and writes; only the layer's keys and values differ."""

    decode: AttentionRows | None
    prefill: AttentionRows | None

    @staticmethod
    def of(inputs: ForwardInputs, q: Tensor, out: Tensor) -> StepAttention:
        """Decoding rows come first in `q` and `out`, rows of prompt chunks after them; either may be absent."""
        decode, prefill = inputs.decode, inputs.prefill
        first = 0 if decode is None else decode.num_sequences
        return StepAttention(
            None if decode is None else AttentionRows(decode, q[:first], out[:first]),
            None if prefill is None else AttentionRows(prefill, q[first:], out[first:]),
        )


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal self-attention of one layer over the paged cache, in three parts.

    A step is cut here: what comes before and after attention has the same shape whatever the sequences are.
    """

    backend: Backend
    rotation: Rotation
    layer: int
    qkv: QKVLinear
    out: RowLinear
    head_dim: int

    def begin(self, hidden: Tensor, norm: RowNorm, inputs: ForwardInputs, q: Tensor) -> None:
        """Queries of `hidden` [T, E] go into `q` [T, H, D], keys and values into the cache."""
        qkv = self.qkv(hidden, norm)
        kv_layer = inputs.kv_layers[self.layer]
        self.backend.rotate_and_write_kv(qkv, inputs.positions, self.rotation, kv_layer, inputs.slots, out=q)

    def attend(self, step: StepAttention, kv_layer: Tensor) -> None:
        """Attention itself, of the rows that `step` names."""
        scale = self.head_dim**-0.5
        if (rows := step.decode) is not None:
            self.backend.decode_attention(rows.q, kv_layer, rows.batch, scale, out=rows.out)
        if (rows := step.prefill) is not None:
            self.backend.prefill_attention(rows.q, kv_layer, rows.batch, scale, out=rows.out)

    def finish(self, hidden: Tensor, attended: Tensor) -> None:
        """In place: hidden [T, E] += the output projection of `attended` [T, H, D]."""
        self.out.add(hidden, attended.flatten(1))
