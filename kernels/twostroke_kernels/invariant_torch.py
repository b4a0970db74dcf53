"""`InvariantTorchBackend`: a row's result is the same, to the bit, whatever rows are computed beside it.

What PyTorch computes element by element with correctly rounded operations is so by nature. The rest is put into shapes
that do not depend on the number of rows: products take slabs of a fixed number of rows, attention the shapes of
`invariant_attention`, drawing takes one row at a time. SwiGLU is written with `exp`, because `silu` rounds the elements
at the end of a tensor, which do not fill a vector register, in another way than the rest.

That a product's row does not depend on its place in a slab is a fact about the library, not a promise of it: the tests
look at it on every machine they run on. All this holds for one number of threads.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from twostroke_kernels.backend import PagedBatch, SampledRows, SamplingRows
from twostroke_kernels.invariant_attention import LoneQueries, PositionTiles
from twostroke_kernels.torch_backend import TorchBackend

_SLAB = 16
"""Rows of a product. On a CPU with AVX-512, against one product of as many rows as there are: 1.3 to 1.6 times the time
for up to 32 rows in bfloat16, 1.7 for 512."""
_ROW_FIELDS = ("temperature", "top_k", "top_p", "min_p", "seed", "choice", "position")


class InvariantTorchBackend(TorchBackend):
    """`Backend` in PyTorch for the batch-invariant mode. Not thread-safe, as its parent."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._lone_queries = LoneQueries()
        self._position_tiles = PositionTiles(device)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Backend.linear`."""
        out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
        for start in range(0, x.shape[0], _SLAB):
            rows = x[start : start + _SLAB]
            # A copy of its own: where a slab lies in memory could choose another way to multiply.
            slab = x.new_zeros(_SLAB, x.shape[1])
            slab[: len(rows)] = rows
            out[start : start + _SLAB] = F.linear(slab, weight, bias)[: len(rows)]
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Backend.silu_mul`; rounded once."""
        gate, up = gate_up.chunk(2, -1)
        wide = gate.to(torch.promote_types(gate.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True)
        return wide.div_(wide.neg().exp_().add_(1)).mul_(up).to(gate.dtype)

    def prefill_attention(
        self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor | None = None
    ) -> Tensor:
        """See `Backend.prefill_attention`."""
        return self._position_tiles(q, kv_layer, batch, scale, out)

    def decode_attention(
        self, q: Tensor, kv_layer: Tensor, batch: PagedBatch, scale: float, out: Tensor | None = None
    ) -> Tensor:
        """See `Backend.decode_attention`."""
        return self._lone_queries(q, kv_layer, batch, scale, out)

    def sample(self, raw_logits: Tensor, logits: Tensor, rows: SamplingRows) -> SampledRows:
        """See `Backend.sample`. The best token of a row is exact; masses and logarithms are sums."""
        if rows.all_greedy and rows.num_logprobs < 0:
            return super().sample(raw_logits, logits, rows)
        lone = [slice(row, row + 1) for row in range(raw_logits.shape[0])]
        sampled = [
            super(InvariantTorchBackend, self).sample(raw_logits[at], logits[at], _only(rows, at)) for at in lone
        ]
        if not sampled:
            return super().sample(raw_logits, logits, rows)
        names = [field.name for field in dataclasses.fields(SampledRows)]
        return SampledRows(**{name: torch.cat([getattr(one, name) for one in sampled]) for name in names})


def _only(rows: SamplingRows, at: slice) -> SamplingRows:
    return dataclasses.replace(rows, **{name: getattr(rows, name)[at] for name in _ROW_FIELDS})
