"""`Attention`: projections, rotation, the KV cache, and the two kinds of attention over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from twostroke_kernels.backend import Backend, HeadNorm, RotaryTable

    from twostroke_engine.model.linear import QKVLinear, RowLinear
    from twostroke_engine.runner.inputs import ForwardInputs


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal self-attention of one layer over the paged cache."""

    backend: Backend
    rotary: RotaryTable
    layer: int
    qkv: QKVLinear
    out: RowLinear
    head_norm: HeadNorm | None
    head_dim: int

    def __call__(self, x: Tensor, inputs: ForwardInputs) -> Tensor:
        """x [T, E] -> [T, E]; writes the layer's KV on the way."""
        kv_layer = inputs.kv_layers[self.layer]
        q = self.backend.rotate_and_write_kv(
            self.qkv(x), inputs.positions, self.rotary, self.head_norm, kv_layer, inputs.slots
        )
        # Told before attention runs, so that sending the layer overlaps with the rest of its work.
        inputs.sink.layer_written(self.layer)
        return self.out(self._attend(q, kv_layer, inputs).flatten(1))

    def _attend(self, q: Tensor, kv_layer: Tensor, inputs: ForwardInputs) -> Tensor:
        """Decoding rows come first, rows of prompt chunks after them; either may be absent."""
        scale = self.head_dim**-0.5
        decode, prefill = inputs.decode, inputs.prefill
        if prefill is None:
            assert decode is not None
            return self.backend.decode_attention(q, kv_layer, decode, scale)
        if decode is None:
            return self.backend.prefill_attention(q, kv_layer, prefill, scale)
        num_decode = decode.num_sequences
        return torch.cat(
            (
                self.backend.decode_attention(q[:num_decode], kv_layer, decode, scale),
                self.backend.prefill_attention(q[num_decode:], kv_layer, prefill, scale),
            )
        )
