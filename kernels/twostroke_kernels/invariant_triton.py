"""`InvariantTritonBackend`: our kernels, every operation cut so that a row's bits do not depend on the rows beside it.

Norms, SwiGLU, rotation, penalties and the choice of tokens are so by nature: a program reads one row, in one order.
Products, and attention in both forms, take one way out of several that the other backend chooses among by size. No
product is fused with the norm before it or the activation after it: those fusions exist for some numbers of rows only.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from twostroke_kernels.backend import PagedBatch, RowNorm, SampledRows, SamplingRows
from twostroke_kernels.gpu.decode_attention import decode_attention, decode_config
from twostroke_kernels.gpu.invariant_products import invariant_linear
from twostroke_kernels.gpu.prefill_attention import fixed_prefill_config, prefill_attention
from twostroke_kernels.triton_backend import TritonBackend

_STRETCH = 256
"""Keys that a program of decode attention folds before its result is rounded into a sum: fewer spread one sequence over
more of the card, more write fewer partial results."""


class InvariantTritonBackend(TritonBackend):
    """`Backend` in Triton for the batch-invariant mode."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.linear`."""
        return invariant_linear(x, weight, bias)

    def norm_linear(self, x: Tensor, norm: RowNorm, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.norm_linear`."""
        return self.linear(self.rms_norm(x, norm.weight, norm.eps), weight, bias)

    def norm_gated_linear(self, x: Tensor, norm: RowNorm, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.norm_gated_linear`."""
        return self.silu_mul(self.norm_linear(x, norm, weight, bias))

    def add_linear(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See `Backend.add_linear`; the sum is rounded once."""
        invariant_linear(x, weight, bias, adds=True, out=residual)

    def norm_logits(self, x: Tensor, norm: RowNorm, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Backend.norm_logits`."""
        if out is None:
            out = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
        return invariant_linear(self.rms_norm(x, norm.weight, norm.eps), weight, None, out=out)

    def prefill_attention(
        self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor | None = None
    ) -> Tensor:
        """See `Backend.prefill_attention`."""
        return prefill_attention(q, kv_layer, batch, scale, fixed_prefill_config(q, kv_layer), out)

    def decode_attention(
        self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor | None = None
    ) -> Tensor:
        """See `Backend.decode_attention`."""
        config = decode_config(kv_layer, q.shape[0], batch.max_context_len, _STRETCH)
        return decode_attention(q, kv_layer, batch, scale, config, out)

    def sample(self, raw_logits: Tensor, logits: Tensor, rows: SamplingRows) -> SampledRows:
        """See `Backend.sample`. A batch that only wants the best tokens is read by fewer threads, which sum logprobs in
        another order."""
        if rows.num_logprobs >= 0:
            rows = dataclasses.replace(rows, all_greedy=False)
        return super().sample(raw_logits, logits, rows)
